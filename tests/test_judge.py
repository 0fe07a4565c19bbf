"""The judge: which gates run, which block, which judgements are kept, and how they are reported.

- after a decisive gate has failed the others are not asked;
- without an evaluation set the settings say what blocks;
- a judgement is kept for its bundle, evaluation set, settings and champion;
- settings that make no sense are refused with a sentence.
"""

import json
from dataclasses import replace

import pytest

from mlflow_tracking.digests import short
from mlflow_tracking.promotion.gates.base import NO_SET, Outcome
from mlflow_tracking.promotion.gates.judge import GATES, GateSettingsError, Judgement, load_gates
from mlflow_tracking.promotion.gates.judgement_report import html, tags, write_replay, write_report
from tests.gates_world import CHAMPION, SETTINGS, answer

pytest_plugins = ["tests.fixtures_gates"]


def test_the_shipped_settings_name_every_gate_and_show_their_defaults():
    gates = load_gates(SETTINGS)
    assert [type(gate) for gate in gates] == list(GATES)
    for gate in gates:
        allowed = {"not_evaluated": "allow"} if gate.name in ("alarm", "unknown detection", "malignant calls") else {}
        assert gate == type(gate)(**allowed), f"{gate.name}: gates.yaml shows other values than the defaults"


def test_after_a_decisive_gate_the_others_are_not_asked(case):
    case.server.golden_shift = 0.002
    judgement = case.judgement()
    rest = [verdict for verdict in judgement.verdicts if verdict.gate not in ("digest and signature", "golden parity")]
    assert {verdict.reason for verdict in rest} == {"Skipped because golden parity failed."}
    assert judgement.blocking[0].gate == "golden parity"
    assert len(judgement.blocking) == 1
    assert case.server.requests == 1


@pytest.mark.parametrize(
    ("policy", "first", "passes"),
    [
        ("first", True, True),
        ("first", False, False),
        ("unfrozen", True, True),
        ("unfrozen", False, True),
        ("allow", False, True),
        ("block", True, False),
    ],
)
def test_without_a_set_a_gate_blocks_as_the_settings_say(case, policy, first, passes):
    case.gates = {"calibration": case.gates["calibration"].model_copy(update={"not_evaluated": policy})}
    case.candidate.evaluation = None
    case.candidate.champion = None if first else CHAMPION
    judgement = case.judgement()
    [verdict] = judgement.verdicts
    assert (verdict.outcome, verdict.reason) == (Outcome.NOT_EVALUATED, NO_SET)
    assert judgement.passed is passes
    assert judgement.reason == f"calibration: not evaluated. {NO_SET}", "shown, whether it blocks or not"


@pytest.mark.parametrize(("champion", "passes"), [(None, True), (CHAMPION, False)])
def test_once_a_set_is_frozen_what_is_not_evaluated_blocks_all_but_the_first(case, champion, passes):
    case.gates = {"melanoma sensitivity": case.limit("melanoma sensitivity", images=1000)}
    case.candidate.champion = champion
    assert case.judgement().passed is passes


def test_a_judgement_is_kept_for_its_question_alone(case):
    judge = case.judge()
    judgement = judge.judge(case.candidate)
    judge.keep(judgement)
    digest = case.candidate.release.digest
    question = judge.question(case.candidate.release, case.candidate.evaluation, CHAMPION)
    assert judge.kept(question) == judgement
    assert judge.newest(digest) == judgement
    for other in (replace(question, champion=None), replace(question, evaluation_set=None)):
        assert judge.kept(other) is None
    case.gates["stress"] = case.gates["stress"].model_copy(update={"ceiling": 0.2})
    stricter = case.judge()
    assert stricter.kept(stricter.question(case.candidate.release, case.candidate.evaluation, CHAMPION)) is None
    judge.forget(digest)
    assert judge.kept(question) is None
    assert judge.newest(digest) is None


def test_a_bundle_that_is_forgotten_is_asked_anew(case):
    _, _ = case.candidate.answers, case.candidate.champion_answers
    of_both = sorted((case.folder / "judgements").glob("answers-*"))
    case.candidate.book.forget(case.candidate.release.digest)
    [left] = (case.folder / "judgements").glob("answers-*")
    assert left in of_both
    assert short(CHAMPION.digest) in left.name


def test_the_judgement_that_counts_last_is_the_newest(case):
    judge = case.judge()
    judgement = judge.judge(case.candidate)
    judge.keep(judgement)
    forced = replace(judgement, forced={"by": "ann@lab", "reason": "urgent"})
    first = replace(judgement, question=replace(judgement.question, champion=None))
    judge.keep(first)
    assert judge.newest(judgement.question.bundle) == first
    judge.keep(forced)
    assert judge.newest(judgement.question.bundle) == forced
    assert forced.outcome == "forced"
    assert forced.id != judgement.id


def test_the_report_is_for_programs_and_for_people(case, tmp_path):
    case.server.models["2"] = {"AK": answer(BKL=0.97)}
    judgement = replace(case.judgement(), forced={"by": "ann@lab", "reason": "<script>"})
    write_report(tmp_path, judgement)
    values = json.loads((tmp_path / "report.json").read_text())
    assert Judgement.from_dict(values) == judgement
    page = (tmp_path / "report.html").read_text()
    assert page == html(judgement)
    for words in ("Overruled by ann@lab: &lt;script&gt;", "balanced accuracy", "Against version 1", "failed (blocks)"):
        assert words in page
    assert "<script>" not in page
    told = tags(judgement)
    assert told["gates.outcome"] == "forced"
    assert told["gates.balanced_accuracy"].startswith("failed: ")
    assert all(len(value) <= 5000 for value in told.values()), "MLflow takes no longer ones"
    write_replay(tmp_path, "1", "2", {"clinic <a>": judgement.comparison})
    assert "clinic &lt;a&gt;" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("text", "sentence"), [
    ("speed: {}", "names speed, but the gates are digest and signature, golden parity"),
    ("- leakage", "is not a table of gates"),
    ("calibration: {ceiling: 2}", "calibration.ceiling: Input should be less than or equal to 1"),
    ("calibration: {cieling: 0.1}", "calibration.cieling: Extra inputs are not permitted"),
    ("calibration: {not_evaluated: maybe}", "not_evaluated"),
    ("calibration: {", "cannot be read"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(tmp_path, text, sentence):
    path = tmp_path / "gates.yaml"
    path.write_text(text)
    with pytest.raises(GateSettingsError, match=sentence):
        load_gates(path)
    with pytest.raises(GateSettingsError, match="cannot be read"):
        load_gates(tmp_path / "nowhere.yaml")


def test_a_gate_that_is_not_named_is_not_asked(tmp_path):
    path = tmp_path / "gates.yaml"
    path.write_text("calibration: {ceiling: 0.2}\nleakage:\n")
    assert [gate.name for gate in load_gates(path)] == ["leakage", "calibration"]
