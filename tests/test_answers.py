"""Answers of a version to the frozen set: asked once, over REST, with the metadata that the model takes; and replays.

Asking that was stopped goes on where it was, and what it is about can be seen meanwhile.
"""

import hashlib

import numpy as np
import pytest

from handlers.taxonomy import CODES
from mlflow_tracking.metrics import balanced_accuracy
from mlflow_tracking.promotion.answers import Answers
from mlflow_tracking.promotion.comparison import compare, replay_samples
from mlflow_tracking.promotion.gates.judgement_report import write_replay
from mlflow_tracking.promotion.torchserve_client import TorchServeError
from tests.gates_world import CHAMPION, answer, patch

pytest_plugins = ["tests.fixtures_gates"]


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


def test_a_version_is_timed_by_its_answers_not_by_our_waits(case):
    case.server.fail = [503]  # half a second is waited after it
    assert case.gates["latency"].evaluate(case.candidate).figures["p95"] < 250
    assert case.server.asked == 1 + 5


def test_samples_that_are_no_pictures_are_named_and_left_out(case, tmp_path):
    for number, code in enumerate(("MEL", "NV")):
        (tmp_path / f"{code}.png").write_bytes(patch(code, number))
    (tmp_path / "notes.png").write_text("no picture")
    real = case.server.predict

    def predict(image, version, metadata=None):
        if image == b"no picture":
            raise TorchServeError(415, "TorchServe answered 415: This is not a JPEG.")
        return real(image, version, metadata)

    case.server.predict = predict
    files = [tmp_path / name for name in ("MEL.png", "notes.png", "NV.png")]
    table = replay_samples(case.server, files, CHAMPION, case.candidate.release)
    assert (table["images"], table["agreement"]) == (2, 1.0)
    assert table["refused"] == {"notes.png": "TorchServe answered 415: This is not a JPEG."}
    write_replay(tmp_path, "1", "2", {"clinic": table})
    assert "notes.png</code> was left out: TorchServe answered 415" in (tmp_path / "report.html").read_text()
    with pytest.raises(TorchServeError, match="None of the 1 pictures can be read; notes.png"):
        replay_samples(case.server, files[1:2], CHAMPION, case.candidate.release)
    case.server.fail = [500] * 3
    with pytest.raises(TorchServeError, match="busy"):
        replay_samples(case.server, files[:1], CHAMPION, case.candidate.release)


def answers_of(codes: list[str]) -> Answers:
    return Answers(np.array([[answer(**{code: 0.9})[one] for one in CODES] for code in codes]), np.arange(1.0, 5.0))


def test_a_replay_tells_flips_by_name():
    table = compare(None, answers_of(["MEL", "NV", "NV", "BCC"]), answers_of(["MEL", "SCC", "BKL", "DF"]), list("abcd"))
    assert (table["images"], table["agreement"]) == (4, 0.25)
    assert (table["into_malignant"], table["out_of_malignant"]) == (1, 1)
    assert table["flips"] == [{"image": "b", "champion": "NV", "challenger": "SCC"},
                              {"image": "d", "champion": "BCC", "challenger": "DF"}]  # fmt: skip
    assert table["champion"] == {"p50_milliseconds": 2.5, "p95_milliseconds": pytest.approx(3.85)}
