"""Outcomes: true diagnoses from a CSV file, appended once, kept longer than predictions, and turned into figures."""

import threading

import numpy as np
import pytest
import sqlalchemy as sa

from handlers.taxonomy import CODES
from monitoring.monitor import DAY, Monitor
from monitoring.outcomes import PictureOutcome, judged, record
from monitoring.performance import RealisedPerformance, realised
from monitoring.summary import summary
from monitoring.tables import outcomes
from scripts import load_outcomes
from tests.commands import invoke
from tests.monitored_log import NOW, RotatedLog, drain, prediction, settings_of


@pytest.fixture
def store(tmp_path):
    """A monitor's database with four predictions: a, b and c of version 1, and again picture a as request d by 2."""
    log = RotatedLog(tmp_path)
    for name, code, version in (("a", "NV", "1"), ("b", "MEL", "1"), ("c", "NV", "1"), ("d", "MEL", "2")):
        picture = "a" if name == "d" else name
        log.write(prediction(name, NOW - 60, code, version, image_sha256=picture * 64, flagged=code == "MEL"))
    monitor = Monitor(settings_of(tmp_path))
    drain(monitor)
    return monitor.store


def rows(store) -> int:
    with store.connect() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(outcomes)).scalar()


def test_an_outcome_is_appended_once_and_the_newest_counts(store):
    assert record(store, [PictureOutcome("a", "MEL"), PictureOutcome("x", "NV")], "lab").unmatched == ["x"]
    again = record(store, [PictureOutcome("a", "MEL")], "lab")
    assert (again.new, again.unchanged, rows(store)) == (0, 1, 1)
    record(store, [PictureOutcome("a", "NV")], "second reader")
    assert rows(store) == 2, "the first one is kept"
    [row] = judged(store)
    assert (row["diagnosis"], row["reader"], row["version"], row["digest"]) == ("NV", "second reader", "1", "sha256:1")


def test_a_sha256_names_all_predictions_of_the_picture(store):
    assert record(store, [PictureOutcome("a" * 64, "MEL")], "lab").new == 2
    assert {row["request_id"]: row["version"] for row in judged(store)} == {"a": "1", "d": "2"}
    assert [row["request_id"] for row in judged(store, "2")] == ["d"]


def test_an_outcome_is_kept_and_corrected_after_its_prediction_was_deleted(store):
    record(store, [PictureOutcome("b", "NV")], "lab")
    store.prune(NOW + DAY)
    assert record(store, [PictureOutcome("b", "BCC"), PictureOutcome("c", "NV")], "lab").unmatched == ["c"]
    [row] = judged(store)
    assert row["diagnosis"] == "BCC"
    assert row["probabilities"][CODES.index("MEL")] == 0.6


def test_outcomes_are_appended_while_the_monitor_writes(store, tmp_path):
    """SQLite refuses a write at once if the transaction has read before another one's write."""
    with store.connect(writes=True) as first:
        first.execute(sa.select(outcomes)).all()
        other = threading.Thread(target=record, args=[store, [PictureOutcome("b", "NV")], "lab"])
        other.start()
        first.execute(sa.insert(outcomes), [judgement("a", "MEL")])
    other.join()
    assert {row["request_id"] for row in judged(store)} == {"a", "b"}


def judgement(request_id: str, diagnosis: str) -> dict:
    return {
        "request_id": request_id, "recorded": NOW, "reader": "lab", "diagnosis": diagnosis, "image_sha256": "a",
        "version": "1", "digest": "sha256:1", "time": NOW, "flagged": None, "probabilities": [1 / 9] * 9,
    }  # fmt: skip


def test_the_figures_by_hand(store):
    record(
        store,
        [PictureOutcome("a", "MEL"), PictureOutcome("b", "MEL"), PictureOutcome("c", "NV"), PictureOutcome("d", "MEL")],
        "lab",
    )
    figures = realised(judged(store))
    assert figures["outcomes"] == 4
    assert figures["accuracy"] == 0.75
    assert figures["balanced_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    assert figures["malignant_missed"] == pytest.approx(1 / 3)
    assert (figures["flagged_malignant"], figures["flagged_others"]) == (pytest.approx(2 / 3), 0)
    assert figures["recall"] == {"MEL": pytest.approx(2 / 3), "NV": 1.0}
    low, high = figures["intervals_95"]["accuracy"]
    assert low <= 0.75 <= high
    assert realised([]) == {"outcomes": 0}
    body = summary(store, RealisedPerformance(store), 1, "2", 90 * DAY)["performance"]
    assert (body["estimated_accuracy"], body["realised"]["outcomes"], body["realised"]["accuracy"]) == (0.6, 1, 1.0)


def test_the_figures_by_sex_age_and_site(tmp_path):
    log = RotatedLog(tmp_path)
    for number in range(24):  # every third one is wrong; of twelve men one has an age, of the others the age is wrong
        sent = {"sex": "female", "age": 69.5} if number % 2 else {"sex": "male"} | ({"age": 70} if number == 4 else {})
        code = "NV" if number % 3 else "MEL"
        log.write(prediction(f"{number}", NOW - 60 + number, code, image_sha256=f"{number:064x}", metadata_sent=sent))
    log.write(prediction("24", NOW, "MEL", "2", image_sha256=f"{3:064x}", metadata_sent={}))
    monitor = Monitor(settings_of(tmp_path))
    drain(monitor)
    truth = [PictureOutcome(f"{number}", "MEL" if number == 5 else "NV") for number in range(24)]
    record(monitor.store, truth, "lab")
    monitor.store.prune(NOW + DAY)
    table = RealisedPerformance(monitor.store).of(None)["slices"]
    assert [(row["field"], row["group"], row["outcomes"]) for row in table] == [
        ("age", "50–69", 12), ("age", "70 and older", 1), ("age", None, 11), ("sex", "female", 12), ("sex", "male", 12),
    ]  # fmt: skip
    middle, old, *_ = table
    assert (middle["accuracy"], middle["malignant"], middle["malignant_missed"]) == (pytest.approx(7 / 12), 1, 1)
    assert middle["accuracy_95"] == pytest.approx((0.320, 0.807), abs=1e-3)  # R's prop.test(7, 12, correct=FALSE)
    assert (old["accuracy"], old["accuracy_95"], old["malignant_missed_95"]) == (None, None, None)
    record(monitor.store, [PictureOutcome("3", "NV", {"site": "head/neck"})], "lab")
    rows = RealisedPerformance(monitor.store).of("1")["slices"]
    assert [row["outcomes"] for row in rows if row["field"] == "site"] == [1, 23]
    assert RealisedPerformance(monitor.store).of("2")["slices"] == []


def test_the_estimate_is_the_accuracy_of_calibrated_answers(tmp_path):
    """The true class is drawn by the probabilities of the answers, so the model is calibrated."""
    rng, log, truth = np.random.default_rng(0), RotatedLog(tmp_path), []
    for number in range(2000):
        shares = rng.dirichlet(np.full(len(CODES), 0.3))
        truth.append(PictureOutcome(str(number), CODES[rng.choice(len(CODES), p=shares)]))
        answer = dict(zip(CODES, shares.tolist(), strict=True))
        log.write(prediction(str(number), NOW - 60, probabilities=answer, image_sha256=f"{number:064x}"))
    monitor = Monitor(settings_of(tmp_path))
    drain(monitor)
    record(monitor.store, truth, "lab")
    body = summary(monitor.store, RealisedPerformance(monitor.store), 1, None, 90 * DAY)["performance"]
    low, high = body["realised"]["intervals_95"]["accuracy"]
    assert low <= body["estimated_accuracy"] <= high
    assert body["realised"]["ece"] < 0.04


@pytest.fixture
def csv(tmp_path, store, monkeypatch):
    """Return a function: load a CSV file of this text."""
    monkeypatch.setenv("MONITOR_DATABASE", str(store.engine.url))

    def load(text: str):
        (tmp_path / "pathology.csv").write_text(text)
        return invoke(load_outcomes.main, tmp_path / "pathology.csv", "--by", "lab")

    return load


def test_a_csv_file_is_loaded(csv, store):
    code, output = csv("request_id, diagnosis\na, melanoma\nb, MEL\nzzz, nv\n")
    assert code == 0, output
    assert "2 outcomes are new, 0 were known." in output
    assert "1 rows name no prediction that the monitor has, such as zzz." in output
    assert [row["diagnosis"] for row in judged(store)] == ["MEL", "MEL"]
    assert csv("request_id,diagnosis,sex,age\na,MEL,Female,\n")[1].startswith("1 outcomes are new")
    assert csv("request_id,diagnosis\na,MEL\n")[1].startswith("0 outcomes are new, 1 were known.")
    assert judged(store)[0]["metadata_sent"] == {"sex": "female"}
    assert csv(f"sha256,diagnosis\n{'A' * 64},MEL\n")[1].startswith("1 outcomes are new, 1 were known.")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("request_id\na\n", "needs a column diagnosis and one of the columns request_id and sha256"),
        ("request_id,sha256,diagnosis\na,b,MEL\n", "one of the columns"),
        ("request_id,diagnosis\na,MEL\nb,mole\n", "Line 3 of "),
        ("request_id,diagnosis\n,MEL\n", "Line 2 of "),
        ("", "needs a column diagnosis"),
        ("request_id,diagnosis\n", "has a header and no rows"),
        ('request_id,diagnosis,note\na,MEL,"two\nlines"\n\nb,mole,\n', "Line 5 of "),
        ("request_id,diagnosis\na\n", "Line 2 of "),
        ("request_id,diagnosis,age\na,MEL,old\n", "Line 2 of "),
    ],
)
def test_a_wrong_file_is_one_sentence_and_changes_nothing(csv, store, text, words):
    code, output = csv(text)
    assert code == 1
    assert words in output
    assert rows(store) == 0
