"""The gates: each asks one question, and each has a candidate here that fails it and no other.

- a good candidate passes all of them, with the limits of the gates.yaml that is shipped;
- a gate that lacks what it needs says so, and the settings say whether that blocks;
- after a decisive gate has failed the others are not asked;
- a judgement is kept for its bundle, evaluation set, settings and champion, and no question is asked twice;
- asking that was stopped goes on where it was, and what it is about can be seen meanwhile;
- settings that make no sense are refused with a sentence.

TorchServe is a stand-in that sees what a picture shows: its hue is the class.
"""

import hashlib
import io
import json
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from handlers.bundle import CONFIG, WEIGHTS, Bundle, seal, write_json
from handlers.metadata import Metadata
from handlers.predictor import Predictor
from handlers.preprocessing import ImageError
from handlers.taxonomy import CODES
from mlflow_tracking.promotion.answers import AnswerBook, Answers, short
from mlflow_tracking.promotion.evaluation_set import COLUMNS, EvaluationSet, freeze
from mlflow_tracking.promotion.gates.base import NO_SET, Candidate, Gate, Outcome
from mlflow_tracking.promotion.gates.judge import GATES, GateSettingsError, Judge, Judgement, load_gates
from mlflow_tracking.promotion.gates.quality import lower_difference
from mlflow_tracking.promotion.gates.report import html, tags, write_replay, write_report
from mlflow_tracking.promotion.plan import Release
from mlflow_tracking.promotion.replay import compare
from mlflow_tracking.promotion.torchserve_client import TorchServeError
from mlflow_tracking.settings import ROOT
from mlflow_tracking.version_card import golden_difference
from tests.models import tiny_bundle
from training.metrics import balanced_accuracy
from training.receipt import DIGITS, Receipt, SeenImages

SETTINGS = ROOT / "mlflow_tracking" / "gates.yaml"
SIGNATURE = ((("image", "binary"),), tuple((code, "double") for code in CODES))
COUNTS = {"MEL": 40, "NV": 90, "BCC": 30, "AK": 30, "BKL": 30, "DF": 30, "VASC": 30, "SCC": 30, "UNK": 24}
CHAMPION = Release("1", "sha256:" + "c" * 64)


def patch(code: str, number: int) -> bytes:
    """A picture of one hue, its class; light and shade differ, so that no two are the same."""
    hue = round(CODES.index(code) * 255 / len(CODES))
    pixels = np.full((24, 24, 3), (hue, 150 + number % 80, 120 + number), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels, "HSV").convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def seen(image: bytes) -> str:
    """The class that a patch shows."""
    hue = np.asarray(Image.open(io.BytesIO(image)).convert("HSV"))[:, :, 0].mean()
    return CODES[round(hue * len(CODES) / 255) % len(CODES)]


def answer(**probabilities: float) -> dict[str, float]:
    """Nine probabilities: those given, the rest shared by the others."""
    others = [code for code in CODES if code not in probabilities]
    rest = (1 - sum(probabilities.values())) / len(others)
    return {code: probabilities.get(code, rest) for code in CODES}


@dataclass
class Server:
    """TorchServe with one version for each entry of `models`: what it answers to a patch of a class."""

    bundle: Bundle
    models: dict[str, dict] = field(default_factory=dict)
    golden_shift: float = 0.0
    seconds: float = 0.0
    disturbed: bool = False  # by any picture that it has not seen as it is
    originals: frozenset[bytes] = frozenset()
    digests: dict[str, str] = field(default_factory=dict)
    asked: int = 0
    fail: list[int] = field(default_factory=list)  # statuses of the next answers
    deaf: bool = False  # to metadata
    takes: dict[str, list] = field(default_factory=dict)
    told: list[tuple[bytes, dict]] = field(default_factory=list)  # pictures of patches and what came with them

    def predict(self, image: bytes, version: str, metadata: dict | None = None) -> dict:
        self.asked += 1
        if self.fail:
            raise TorchServeError(self.fail.pop(0), "busy")
        time.sleep(self.seconds)
        model = {"digest": self.digests[version], "precision": "f32"}
        for case in self.bundle.golden():
            if (case.image, case.metadata) == (image, None if self.deaf else metadata or None):
                top = max(case.probabilities, key=case.probabilities.__getitem__)
                shifted = case.probabilities | {top: case.probabilities[top] + self.golden_shift}
                return {"model": model, "probabilities": shifted}
        assert set(metadata or {}) <= set(self.takes), "TorchServe refuses what the model does not take"
        self.told.append((image, dict(metadata or {})))
        model["takes"] = self.takes
        code = seen(image)
        if self.disturbed and version == "2" and hashlib.sha256(image).digest() not in self.originals:
            code = "NV" if code in ("MEL", "BCC", "SCC") else "MEL"
        return {"model": model, "probabilities": self.models[version].get(code, answer(**{code: 0.97}))}


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> EvaluationSet:
    folder = tmp_path_factory.mktemp("set")
    rows = []
    for code, count in COUNTS.items():
        for number in range(count):
            path = folder / f"{code}{number}.png"
            path.write_bytes(image := patch(code, number))
            digest = hashlib.sha256(image).hexdigest()
            told = (float(number + 20) if number % 2 else None, "female", "palms/soles" if number % 3 else "knee")
            rows.append((str(path), path.stem, code, f"{code}-{number // 2}", "drawn", digest, digest[:16], *told))
    return freeze(pd.DataFrame(rows, columns=["path", *COLUMNS[1:]]), folder)


def receipt(*digests: str) -> Receipt:
    images = SeenImages(tuple(digest[:DIGITS] for digest in digests), ("0123456789abcdef",), (), ("elsewhere",))
    return Receipt("sha256:data", {"train": images})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle", receipt=receipt("f" * 64))


def resealed(bundle: Bundle, folder: Path, **files: object) -> Bundle:
    """A copy of the bundle with some files exchanged, its hashes right."""
    out = Path(shutil.copytree(bundle.path, folder / "bundle"))
    (out / CONFIG).unlink()
    for name, content in files.items():
        if isinstance(content, bytes):
            (out / f"{name}.safetensors").write_bytes(content)
        else:
            write_json(out / f"{name}.json", content)
    return seal(out, bundle.config)


@dataclass
class Case:
    """A candidate that is good, until something is done to it."""

    candidate: Candidate
    server: Server
    gates: dict[str, Gate]
    folder: Path

    def judge(self) -> Judge:
        return Judge(tuple(self.gates.values()), self.folder / "judgements")

    def judgement(self) -> Judgement:
        return self.judge().judge(self.candidate)

    def use(self, bundle: Bundle) -> None:
        """Take another bundle for the candidate's."""
        self.server.bundle, self.server.digests["2"] = bundle, bundle.digest
        self.candidate.bundle, self.candidate.registered_digest = bundle, bundle.digest
        self.candidate.release = Release("2", bundle.digest)


@pytest.fixture
def case(bundle, evaluation, tmp_path) -> Case:
    digests = {"1": CHAMPION.digest, "2": bundle.digest}
    originals = frozenset(bytes.fromhex(digest) for digest in evaluation.frame["sha256"])
    server = Server(bundle, {"1": {}, "2": {}}, originals=originals, digests=digests)
    candidate = Candidate(
        Release("2", bundle.digest),
        bundle,
        server,
        AnswerBook(tmp_path / "judgements"),
        registered_digest=bundle.digest,
        signature=SIGNATURE,
        champion=CHAMPION,
        evaluation=evaluation,
    )
    gates = {gate.name: gate for gate in load_gates(SETTINGS)}
    # Seconds each: the checkpoint has a test of its own.
    gates["golden parity"] = gates["golden parity"].model_copy(update={"checkpoint": False})
    gates["latency"] = gates["latency"].model_copy(update={"requests": 5})
    return Case(candidate, server, gates, tmp_path)


def failed(judgement: Judgement) -> set[str]:
    return {verdict.gate for verdict in judgement.verdicts if verdict.outcome is Outcome.FAILED}


def test_the_shipped_settings_name_every_gate_and_show_their_defaults():
    gates = load_gates(SETTINGS)
    assert [type(gate) for gate in gates] == list(GATES)
    for gate in gates:
        allowed = {"not_evaluated": "allow"} if gate.name in ("unknown detection", "malignant calls") else {}
        assert gate == type(gate)(**allowed), f"{gate.name}: gates.yaml shows other values than the defaults"


def test_a_good_candidate_passes_all(case):
    judgement = case.judgement()
    assert [(one.gate, one.outcome, one.reason) for one in judgement.verdicts if not one.passed] == []
    assert judgement.passed
    assert judgement.word == "passed"
    assert judgement.comparison["agreement"] == 1.0


# What is wrong with a candidate -> the one gate that must see it. Both versions get what only the set's own limits
# shall judge, or it would be inferior to the champion as well.


def other_digest(case):
    case.candidate.registered_digest = "sha256:" + "0" * 64


def other_signature(case):
    case.candidate.signature = (SIGNATURE[0], tuple(reversed(SIGNATURE[1])))


def no_signature(case):
    case.candidate.signature = None


def wrong_answers(case):
    case.server.golden_shift = 0.002


def other_model_answers(case):
    case.server.digests["2"] = "sha256:" + "0" * 64


def other_pixels(case):
    cases = [{"name": one.name, "probabilities": one.probabilities, "grid": one.grid} |
             {"colours": (np.array(one.colours) + 2).tolist()} for one in case.candidate.bundle.golden()]  # fmt: skip
    case.use(resealed(case.candidate.bundle, case.folder, golden=cases))


def seen_in_training(case):
    digest = case.candidate.evaluation.frame["sha256"][5]
    case.use(resealed(case.candidate.bundle, case.folder, receipt=receipt(digest).to_dict()))


def slow(case):
    case.gates["latency"] = case.gates["latency"].model_copy(update={"p95_milliseconds": 20})
    case.server.seconds = 0.03
    # Asking the whole set that slowly proves nothing more.
    case.candidate.evaluation, case.candidate.champion = None, None


def inferior(case):
    case.server.models["2"] = {"AK": answer(BKL=0.97)}


def blind_to_melanoma(case):
    case.server.models = {version: {"MEL": answer(MEL=0.3, NV=0.6)} for version in "12"}


def unsure(case):
    case.server.models["2"] = {code: answer(**{code: 0.4}) for code in CODES}


def knows_all(case):
    case.server.models = {version: {"UNK": answer(NV=0.6, UNK=0.0)} for version in "12"}


def cries_wolf(case):
    case.server.models = {version: {"UNK": answer(MEL=0.5, UNK=0.45)} for version in "12"}


def easily_disturbed(case):
    case.server.disturbed = True


FAULTS = {
    other_digest: "digest and signature",
    other_signature: "digest and signature",
    no_signature: "digest and signature",
    wrong_answers: "golden parity",
    other_model_answers: "golden parity",
    other_pixels: "preprocessing",
    seen_in_training: "leakage",
    slow: "latency",
    inferior: "balanced accuracy",
    blind_to_melanoma: "melanoma sensitivity",
    unsure: "calibration",
    knows_all: "unknown detection",
    cries_wolf: "malignant calls",
    easily_disturbed: "stress",
}


def test_every_gate_has_a_candidate_that_fails_it():
    assert set(FAULTS.values()) == {gate.name for gate in GATES}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_fails_one_gate_and_no_other(case, fault):
    fault(case)
    judgement = case.judgement()
    assert failed(judgement) == {FAULTS[fault]}
    assert not judgement.passed
    assert judgement.reason.startswith(FAULTS[fault])


def test_a_model_that_takes_metadata_is_asked_with_and_without(case, tmp_path):
    takes = Metadata.of(["age", "sex"])
    case.use(tiny_bundle(tmp_path / "takes", metadata=takes, receipt=receipt("f" * 64)))
    [verdict] = [one for one in case.judgement().verdicts if one.gate == "digest and signature"]
    assert verdict.reason == (
        "its signature is not one image and age and sex in, nine probabilities in taxonomy order out"
    )
    inputs = (("image", "binary"), ("age", "double"), ("sex", "string"))
    case.candidate.signature = (inputs, SIGNATURE[1])
    assert failed(case.judgement()) == set()
    case.server.deaf = True
    assert failed(case.judgement()) == {"golden parity"}


@pytest.mark.parametrize("at", [0, 3, 8])
def test_an_answer_that_is_no_number_is_not_close(case, at):
    [expected, *_] = case.candidate.bundle.golden()
    none = dict(expected.probabilities) | {CODES[at]: float("nan")}
    assert np.isnan(expected.difference(none))


def test_a_golden_answer_that_is_no_number_is_refused(case):
    case.server.golden_shift = float("nan")
    assert failed(case.judgement()) == {"golden parity"}


def test_a_golden_picture_that_is_refused_is_no_answer(bundle):
    good, other = bundle.golden()[:2]
    with pytest.raises(ImageError):
        golden_difference(Predictor(bundle), [good, replace(other, image=b"no image")])


def test_a_checkpoint_that_is_another_model_fails_golden_parity(case, tmp_path):
    weights = (tiny_bundle(tmp_path / "other", seed=1).path / WEIGHTS).read_bytes()
    gate = load_gates(SETTINGS)[1]
    assert gate.evaluate(case.candidate).passed, "the checkpoint agrees"
    case.use(resealed(case.candidate.bundle, case.folder, model=weights))
    verdict = gate.evaluate(case.candidate)
    assert verdict.outcome is Outcome.FAILED
    assert "its checkpoint gives a golden probability off by" in verdict.reason


def test_after_a_decisive_gate_the_others_are_not_asked(case):
    wrong_answers(case)
    judgement = case.judgement()
    rest = [verdict for verdict in judgement.verdicts if verdict.gate not in ("digest and signature", "golden parity")]
    assert {verdict.reason for verdict in rest} == {"not asked, since golden parity failed"}
    assert judgement.blocking[0].gate == "golden parity"
    assert len(judgement.blocking) == 1
    assert case.server.asked == 1


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
    assert judgement.reason == f"calibration: not evaluated: {NO_SET}", "shown, whether it blocks or not"


@pytest.mark.parametrize("champion", [None, CHAMPION])
def test_while_no_set_is_frozen_all_pass_and_the_reason_is_shown(case, champion):
    case.candidate.evaluation, case.candidate.champion = None, champion
    judgement = case.judgement()
    assert judgement.passed
    assert NO_SET in judgement.reason


@pytest.mark.parametrize(("champion", "passes"), [(None, True), (CHAMPION, False)])
def test_once_a_set_is_frozen_what_is_not_evaluated_blocks_all_but_the_first(case, tmp_path, champion, passes):
    case.use(tiny_bundle(tmp_path / "bare"))  # without a receipt
    case.gates = {"leakage": case.gates["leakage"]}
    case.candidate.champion = champion
    assert case.judgement().passed is passes


@pytest.mark.parametrize("lacking", ["receipt", "colours", "melanomas", "champion"])
def test_a_gate_says_what_it_lacks(case, tmp_path, lacking):
    gate = {"receipt": "leakage", "colours": "preprocessing", "melanomas": "melanoma sensitivity",
            "champion": "balanced accuracy"}[lacking]  # fmt: skip
    if lacking == "receipt":
        case.use(tiny_bundle(tmp_path / "bare"))
    if lacking == "colours":
        bare = [{"name": one.name, "probabilities": one.probabilities, "grid": one.grid}
                for one in case.candidate.bundle.golden()]  # fmt: skip
        case.use(resealed(case.candidate.bundle, case.folder, golden=bare))
    if lacking == "melanomas":
        few = case.candidate.evaluation.frame.query("label != 'MEL'").reset_index(drop=True)
        case.candidate.evaluation = replace(case.candidate.evaluation, frame=few)
    if lacking == "champion":
        case.candidate.champion = None
    verdict = case.gates[gate].evaluate(case.candidate)
    assert verdict.outcome is Outcome.NOT_EVALUATED
    assert {"receipt": "no receipt.json", "colours": "before fingerprints", "melanomas": "0 melanomas",
            "champion": "it is 1.000"}[lacking] in verdict.reason  # fmt: skip


def test_a_judgement_is_kept_for_its_question_alone(case):
    judge = case.judge()
    judgement = judge.judge(case.candidate)
    judge.keep(judgement)
    digest = case.candidate.release.digest
    question = judge.question(digest, case.candidate.evaluation.digest, CHAMPION.digest)
    assert judge.kept(question) == judgement
    assert judge.newest(digest) == judgement
    for other in (replace(question, champion=None), replace(question, evaluation_set=None)):
        assert judge.kept(other) is None
    case.gates["stress"] = case.gates["stress"].model_copy(update={"ceiling": 0.2})
    stricter = case.judge()
    assert stricter.kept(stricter.question(digest, case.candidate.evaluation.digest, CHAMPION.digest)) is None
    answers = f"answers-{short(digest)}-*"
    assert list((case.folder / "judgements").glob(answers))
    judge.forget(digest)
    assert judge.kept(question) is None
    assert judge.newest(digest) is None
    assert not list((case.folder / "judgements").glob(answers))


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
    assert forced.word == "forced"
    assert forced.id != judgement.id


def test_a_model_that_takes_metadata_is_told_what_the_set_knows(case):
    case.server.takes = {"age": [0, 120], "site": ["palms/soles", "head/neck"]}
    _ = case.candidate.answers
    known = {row.sha256: row for row in case.candidate.evaluation.frame.itertuples()}
    assert len(case.server.told) == 1 + len(known)
    for image, told in case.server.told[1:]:
        row = known[hashlib.sha256(image).hexdigest()]
        number = int(row.image_id.removeprefix(row.label))
        # No sex, which it does not take; no "knee", which it does not know.
        expected = {"age": number + 20.0} if number % 2 else {}
        assert told == expected | ({"site": "palms/soles"} if number % 3 else {})


def test_a_changed_picture_comes_with_the_metadata_of_the_original(case):
    case.server.takes = {"age": [0, 120]}
    _ = case.candidate.answers
    case.server.told.clear()
    gate = case.gates["stress"].model_copy(update={"images": 4})
    assert gate.evaluate(case.candidate).passed
    ages = [{"age": float(age)} if age else {} for age in case.candidate.evaluation.frame["age"][:4]]
    assert {} in ages and any(ages)
    told = [told for _, told in case.server.told[1:]]
    for start in range(0, 16, 4):  # the four of one change, in whatever order they arrived
        assert sorted(told[start : start + 4], key=str) == sorted(ages, key=str)


def test_answers_are_asked_once_and_asking_goes_on_where_it_stopped(case):
    remarks = []

    class Stop(Exception):
        pass

    def progress(remark):
        remarks.append(remark)
        if "has answered 160" in remark:
            raise Stop

    case.candidate.progress = progress
    with pytest.raises(Stop):
        _ = case.candidate.answers
    assert case.server.asked == 1 + 160, "the first is asked what the model takes"
    assert remarks[0] == f"version 2 has answered 16 of {len(case.candidate.evaluation)} pictures"
    [path] = (case.folder / "judgements").glob("answers-*")
    path.write_bytes(path.read_bytes()[:-20])  # and the machine went down within a line
    case.candidate.progress = remarks.append
    answers = case.candidate.answers
    assert case.server.asked == 2 + len(case.candidate.evaluation) + 1, "one answer was lost"
    assert balanced_accuracy(case.candidate.evaluation.labels, answers.probabilities) == 1.0
    case.candidate.book.complete(case.server, case.candidate.release, case.candidate.evaluation)
    assert case.server.asked == 2 + len(case.candidate.evaluation) + 1


def test_a_busy_worker_is_asked_again_and_a_broken_one_is_not_the_candidates_fault(case, monkeypatch):
    monkeypatch.setattr("mlflow_tracking.promotion.answers.time.sleep", lambda seconds: None)
    case.server.fail = [503, 507]
    assert len(case.candidate.answers.top) == len(case.candidate.evaluation)
    case.server.fail = [503] * 6
    with pytest.raises(TorchServeError):
        case.gates["stress"].evaluate(case.candidate)
    case.server.fail = []
    case.server.digests["1"] = "sha256:" + "0" * 64
    with pytest.raises(TorchServeError, match="another model answered"):
        _ = case.candidate.champion_answers


def test_the_interval_is_that_of_a_plain_bootstrap_over_lesions(evaluation):
    """Against a loop that draws lesions and computes both balanced accuracies anew."""
    rng = np.random.default_rng(1)
    ours, theirs = (
        np.where(rng.random(len(evaluation)) < share, evaluation.labels, rng.integers(9, size=len(evaluation)))
        for share in (0.6, 0.7)
    )
    members = [np.flatnonzero(evaluation.lesions == lesion) for lesion in range(evaluation.lesions.max() + 1)]
    differences = []
    for _ in range(600):
        chosen = np.concatenate([members[k] for k in rng.integers(len(members), size=len(members))])
        both = [balanced_accuracy(evaluation.labels[chosen], np.eye(9)[answers[chosen]]) for answers in (ours, theirs)]
        differences.append(both[0] - both[1])
    assert lower_difference(evaluation, ours, theirs, 2000) == pytest.approx(np.quantile(differences, 0.05), abs=0.012)
    assert lower_difference(evaluation, ours, ours, 200) == 0.0, "a model is not inferior to itself"


def answers_of(codes: list[str]) -> Answers:
    return Answers(np.array([[answer(**{code: 0.9})[one] for one in CODES] for code in codes]), np.arange(1.0, 5.0))


def test_a_replay_tells_flips_by_name():
    table = compare(None, answers_of(["MEL", "NV", "NV", "BCC"]), answers_of(["MEL", "SCC", "BKL", "DF"]), list("abcd"))
    assert (table["images"], table["agreement"]) == (4, 0.25)
    assert (table["into_malignant"], table["out_of_malignant"]) == (1, 1)
    assert table["flips"] == [{"image": "b", "champion": "NV", "challenger": "SCC"},
                              {"image": "d", "champion": "BCC", "challenger": "DF"}]  # fmt: skip
    assert table["champion"] == {"p50_milliseconds": 2.5, "p95_milliseconds": pytest.approx(3.85)}


def test_the_report_is_for_programs_and_for_people(case, tmp_path):
    inferior(case)
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
    ("speed: {}", "names speed; the gates are digest and signature, golden parity"),
    ("- leakage", "names something else than gates"),
    ("calibration: {ceiling: 2}", "calibration: ceiling: Input should be less than or equal to 1"),
    ("calibration: {cieling: 0.1}", "calibration: cieling: Extra inputs are not permitted"),
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
