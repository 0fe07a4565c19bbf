"""Answers of a version to the frozen set, and comparisons of two versions.

- pictures are sent over REST with the metadata that the model takes; each is sent once, and an interrupted run resumes;
- passing errors are retried, and the waits do not count as latency;
- a replay of a folder lists the files that are no pictures.
"""

import hashlib

import numpy as np
import pytest

from handlers.errors import UserError
from handlers.taxonomy import CODES
from mlflow_tracking.classification_metrics import balanced_accuracy
from mlflow_tracking.promotion.answers import Answers
from mlflow_tracking.promotion.champion_comparison import compare, replay_folder
from mlflow_tracking.promotion.gates.judgement_report import write_replay
from mlflow_tracking.torchserve_client import TorchServeError
from tests.gates_world import CHAMPION, answer, patch

pytest_plugins = ["tests.fixtures_gates"]


def test_a_model_that_takes_metadata_gets_the_metadata_of_the_set(case):
    case.server.takes = {"age": [0, 120], "site": ["palms/soles", "head/neck"]}
    _ = case.candidate.answers
    rows = {row.sha256: row for row in case.candidate.evaluation.frame.itertuples()}
    assert len(case.server.patches) == 1 + len(rows)
    for image, metadata in case.server.patches[1:]:
        row = rows[hashlib.sha256(image).hexdigest()]
        number = int(row.image_id.removeprefix(row.label))
        # The model takes no sex and does not know the site "knee".
        expected = {"age": number + 20.0} if number % 2 else {}
        assert metadata == expected | ({"site": "palms/soles"} if number % 3 else {})


def test_a_changed_picture_comes_with_the_metadata_of_the_original(case):
    case.server.takes = {"age": [0, 120]}
    _ = case.candidate.answers
    case.server.patches.clear()
    assert case.limit("stress", images=4).evaluate(case.candidate).passed
    ages = [{"age": float(age)} if age else {} for age in case.candidate.evaluation.frame["age"][:4]]
    assert {} in ages and any(ages)
    sent = [metadata for _, metadata in case.server.patches[1:]]
    for start in range(0, 16, 4):  # the four pictures of one change, in any order
        assert sorted(sent[start : start + 4], key=str) == sorted(ages, key=str)


def test_each_picture_is_asked_once_and_an_interrupted_run_resumes(case):
    class Stop(Exception):
        pass

    def progress(remark):
        remarks.append(remark)
        if "has answered 96" in remark:
            raise Stop

    remarks, size = [], len(case.candidate.evaluation)
    case.candidate.progress = progress
    with pytest.raises(Stop):
        _ = case.candidate.answers
    assert case.server.requests == 1 + 96, "the first request asks what the model takes"
    assert remarks[0] == f"version 2 has answered 16 of {size} pictures"
    [path] = (case.folder / "judgements").glob("answers-*")
    path.write_bytes(path.read_bytes()[:-20])  # a crash in the middle of a line
    case.candidate.progress = remarks.append
    answers = case.candidate.answers
    assert case.server.requests == 2 + size + 1, "one answer was lost"
    assert balanced_accuracy(case.candidate.evaluation.labels, answers.probabilities) == 1.0
    case.candidate.book.complete(case.server, case.candidate.release, case.candidate.evaluation)
    assert case.server.requests == 2 + size + 1


def test_passing_errors_are_retried_and_others_are_raised(case, monkeypatch):
    monkeypatch.setattr("mlflow_tracking.torchserve_client.RETRY_WAITS", (0.0, 0.0))
    case.server.fail = [503, 507]
    assert len(case.candidate.answers.top) == len(case.candidate.evaluation)
    case.server.fail = [503] * 6
    with pytest.raises(TorchServeError):
        case.gates["stress"].evaluate(case.candidate)
    case.server.fail = []
    case.server.digests["1"] = "sha256:" + "0" * 64
    with pytest.raises(TorchServeError, match="was answered by another model"):
        _ = case.candidate.champion_answers


def test_the_wait_before_a_retry_is_no_latency(case):
    case.server.fail = [503]  # half a second of waiting
    assert case.gates["latency"].evaluate(case.candidate).figures["p95"] < 450
    assert case.server.requests == 1 + 5


def test_a_replay_lists_files_that_are_no_pictures(case, tmp_path, monkeypatch):
    folder = tmp_path / "clinic"
    (folder / "2026").mkdir(parents=True)
    (folder / "2026" / "MEL").write_bytes(patch("MEL", 0))  # bytes decide, not the ending
    (folder / "NV.png").write_bytes(patch("NV", 1))
    (folder / "notes.png").write_text("no picture")
    (folder / "._NV.png").write_text("hidden")
    table = replay_folder(case.server, folder, CHAMPION, case.candidate.release)
    assert (table["images"], table["agreement"], list(table["refused"])) == (2, 1.0, ["notes.png"])
    assert "not a picture" in table["refused"]["notes.png"]
    write_replay(tmp_path, "1", "2", {"clinic": table})
    assert "notes.png</code> was left out: This is not a picture" in (tmp_path / "report.html").read_text()
    monkeypatch.setattr("mlflow_tracking.torchserve_client.RETRY_WAITS", (0.0, 0.0))
    case.server.fail = [500] * 9
    with pytest.raises(TorchServeError, match="busy"):
        replay_folder(case.server, folder, CHAMPION, case.candidate.release)
    case.server.fail = []
    for name in ("2026/MEL", "NV.png"):
        (folder / name).unlink()
    with pytest.raises(
        UserError, match=r"None of the 1 files in .* is a picture. The first is notes.png. This is not a picture"
    ):
        replay_folder(case.server, folder, CHAMPION, case.candidate.release)


def test_a_comparison_lists_flips_by_name():
    before, after = (
        Answers(np.array([[answer(**{code: 0.9})[column] for column in CODES] for code in codes]), np.arange(1.0, 5.0))
        for codes in (["MEL", "NV", "NV", "BCC"], ["MEL", "SCC", "BKL", "DF"])
    )
    table = compare(None, before, after, list("abcd"))
    assert (table["images"], table["agreement"]) == (4, 0.25)
    assert (table["into_malignant"], table["out_of_malignant"]) == (1, 1)
    assert table["flips"] == [
        {"image": "b", "champion": "NV", "challenger": "SCC"},
        {"image": "d", "champion": "BCC", "challenger": "DF"},
    ]
    assert table["champion"] == {"p50_milliseconds": 2.5, "p95_milliseconds": pytest.approx(3.85)}
