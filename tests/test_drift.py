"""Drift: no alarm without a change, an alarm soon after one, and its figures in the monitor's answers and metrics."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from prometheus_client.parser import text_string_to_metric_families

from handlers.picture_statistics import picture_statistics
from handlers.predictor import Predictor
from handlers.reference import DRIFT_STATISTICS, INPUT_STATISTICS, LEVELS, REFERENCE, Reference, drift_values
from handlers.taxonomy import CODES
from monitoring.drift import ALARM, DriftState
from monitoring.monitor import Monitor
from monitoring.monitor_service import create_app
from tests.models import tiny_bundle
from tests.monitored_log import NOW, RotatedLog, archive_with, measured, normal_reference, normal_values, settings_of
from training import export
from training.data.synthetic import draw_lesion
from training.export import write_reference


def joint(state: DriftState, values: np.ndarray, reference: Reference) -> np.ndarray:
    return np.array([figures["joint"] for figures in state.update(values, range(len(values)), reference)])


def changed(count: int, rng: np.random.Generator, shift: float = 1.0, statistic: str = "sharpness") -> np.ndarray:
    values = normal_values(count, rng)
    values[:, DRIFT_STATISTICS.index(statistic)] += shift
    return values


@given(
    sample=st.lists(st.integers(-3, 3), min_size=1, max_size=300),
    others=st.lists(st.integers(-4, 4) | st.just(float("nan")), max_size=20),
)
def test_ranks_are_shares_whose_mean_is_one_half(sample, others):
    quantiles = np.quantile(np.array(sample, float), LEVELS, method="inverted_cdf").tolist()
    reference = Reference(len(sample), len(sample), {}, dict.fromkeys(DRIFT_STATISTICS, quantiles))

    def ranks(values: list[float]) -> np.ndarray:
        return reference.ranks(np.repeat(np.array(values, float)[:, None], len(DRIFT_STATISTICS), axis=1))[:, 0]

    assert ranks(sample).mean() == pytest.approx(0.5, abs=0.02)
    numbers = sorted(number for number in others if number == number)
    assert (np.diff(ranks(numbers)) >= 0).all()
    assert np.isnan(ranks(others)).tolist() == np.isnan(others).tolist()


def test_no_bet_wins_on_the_reference_itself():
    reference, values = normal_reference(), normal_values(2000, np.random.default_rng(0))
    factors = []
    for row in values[:500]:
        state = DriftState()
        state.update(row[None], [0.0], reference)
        factors.append(state.evidence)
    assert np.mean(factors, axis=0).max() <= 1
    assert np.min(factors) > 0


def test_there_is_no_alarm_without_a_change():
    rng = np.random.default_rng(1)
    assert joint(DriftState(), normal_values(10_000, rng), normal_reference()).max() < ALARM / 10


@pytest.mark.parametrize(
    ("statistic", "shift", "most"),
    [("sharpness", -1.0, 150), ("red", 1.0, 150), ("probability of MEL", 0.5, 400), ("familiarity", -0.5, 400)],
)
def test_an_alarm_follows_a_change_and_ends_after_it(statistic, shift, most):
    rng, reference, state = np.random.default_rng(2), normal_reference(), DriftState()
    joint(state, normal_values(500, rng), reference)
    assert state.alarm_since is None
    evidence = joint(state, changed(1000, rng, shift, statistic), reference)
    assert int(np.argmax(evidence >= ALARM)) < most
    assert state.alarm_since == np.argmax(evidence >= ALARM)
    assert max(state.statistics, key=lambda name: state.statistics[name]) == statistic
    kind, other = ("input", "output") if statistic in INPUT_STATISTICS else ("output", "input")
    assert state.figures[kind] > ALARM > state.figures[other]
    joint(state, normal_values(1000, rng), reference)
    assert state.alarm_since is None


def test_values_that_a_log_lacks_are_no_evidence():
    state, missing = DriftState(), np.full((2000, len(DRIFT_STATISTICS)), np.nan)
    assert joint(state, missing, normal_reference()).max() <= 1


@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 300), max_size=4))
def test_pieces_give_the_same_state_as_the_whole(cuts):
    reference, values = normal_reference(), changed(300, np.random.default_rng(3))
    whole, pieces = DriftState(), DriftState()
    whole.update(values, range(300), reference)
    edges = [0, *sorted(cuts), 300]
    for first, last in pairwise(edges):
        pieces.update(values[first:last], range(first, last), reference)
    assert np.array_equal(whole.evidence, pieces.evidence)
    assert (whole.pictures, whole.alarm_since) == (pieces.pictures, pieces.alarm_since)


def test_picture_statistics_are_those_of_their_definition():
    image = draw_lesion(1, "MEL", size=(160, 160))
    pixels = np.asarray(image)
    red, green, blue = pixels.astype(float).mean((0, 1))
    grey = pixels @ [0.299, 0.587, 0.114]
    edges = sum(np.roll(grey, shift, axis) for shift in (1, -1) for axis in (0, 1)) - 4 * grey
    statistics = picture_statistics(pixels)
    assert statistics["red"] == pytest.approx(red - green)
    assert statistics["blue"] == pytest.approx(blue - green)
    assert statistics["brightness"] == pytest.approx(grey.mean(), abs=0.5)
    assert statistics["contrast"] == pytest.approx(grey.std(), abs=0.5)
    assert statistics["sharpness"] == pytest.approx(np.log(edges[1:-1, 1:-1].std() + 1), abs=0.05)
    blurred = picture_statistics(np.asarray(image.filter(ImageFilter.GaussianBlur(2))))
    assert blurred["sharpness"] < statistics["sharpness"]
    assert picture_statistics(np.asarray(Image.new("RGB", (160, 160))))["sharpness"] == 0


def test_a_reference_of_other_pictures_says_nothing_of_the_calibration(tmp_path):
    reference = replace(normal_reference(), figures={"calibration": False})
    values = normal_values(20, np.random.default_rng(5))
    RotatedLog(tmp_path).write(measured(values, archive_with(reference, tmp_path / "store")))
    monitor = Monitor(settings_of(tmp_path))
    monitor.step()
    summary = TestClient(create_app(monitor)).get("/summary", params={"hours": 2}).json()
    assert summary["drift"]["1"]["alarm_since"] is None
    assert not summary["performance"]["calibration_holds"]


def test_a_bundle_gets_the_reference_of_its_pictures_if_they_are_enough(tmp_path, monkeypatch):
    folder = tmp_path / "bundle"
    bundle = tiny_bundle(folder)
    rows = []
    for number in range(12):
        path = tmp_path / f"{number}.png"
        draw_lesion(number, "MEL", size=(40 + 8 * (number % 2), 32)).save(path)
        rows.append({"path": str(path), "lesion_id": f"L{number // 2}", "split": "calibration"})
    pictures = pd.DataFrame(rows)
    write_reference(bundle, pictures)
    assert not (folder / REFERENCE).exists(), "six lesions are too few"
    monkeypatch.setattr(export, "MIN_LESIONS", 6)
    write_reference(bundle, pictures)
    reference = Reference.from_dict(json.loads((folder / REFERENCE).read_bytes()))
    assert (reference.pictures, reference.lesions, reference.figures["calibration"]) == (12, 6, True)
    answers = Predictor(bundle, runtime="torch", precision="f32").predict(
        [Path(row["path"]).read_bytes() for row in rows]
    )
    values = np.array([drift_values(a.image.width, a.image.height, a.statistics, list(a.probabilities.values()))
                       for a in answers])  # fmt: skip
    assert reference.ranks(values.round(6)).mean(0) == pytest.approx(0.5, abs=0.05)
    assert reference.figures["confidence"] == pytest.approx(np.mean([max(a.probabilities.values()) for a in answers]))
    assert sum(reference.figures["classes"].values()) == pytest.approx(1)
    write_reference(bundle, pictures.assign(split=""))
    assert json.loads((folder / REFERENCE).read_bytes())["figures"]["calibration"] is False


def test_values_stand_in_the_order_of_their_names():
    statistics = {name: float(number) for number, name in enumerate(INPUT_STATISTICS[1:], start=1)}
    values = drift_values(256, 512, statistics, [0.1] * 9)
    assert values == [17.0, *range(1, len(INPUT_STATISTICS)), *[0.1] * 9]
    assert len(values) == len(DRIFT_STATISTICS)
    assert np.isnan(drift_values(None, None, {}, [0.1] * 9)).sum() == len(INPUT_STATISTICS)


@pytest.mark.parametrize("damage", [{"quantiles": {}}, {"quantiles": None}, {"lesions": None}, {"figures": 3}])
def test_a_reference_of_another_form_counts_as_none(tmp_path, damage):
    reference = normal_reference()
    digest = archive_with(reference, tmp_path / "store")
    monitor = Monitor(settings_of(tmp_path))
    assert monitor.references.of(digest) == reference
    archive_with(reference, tmp_path / "other")
    with pytest.raises((KeyError, TypeError, ValueError)):
        Reference.from_dict(reference.to_dict() | damage)


def test_the_monitor_tells_drift_by_version_once_for_each_picture(tmp_path):
    rng, log = np.random.default_rng(4), RotatedLog(tmp_path)
    digest = archive_with(normal_reference(), tmp_path / "store")
    (tmp_path / "store" / "damaged.mar").write_bytes(b"PK")
    values = changed(400, rng, 1.5)
    lines = measured(values, digest).splitlines(keepends=True)
    monitor = Monitor(settings_of(tmp_path))

    def drift() -> dict:
        monitor.step()
        return TestClient(create_app(monitor)).get("/summary", params={"hours": 2}).json()["drift"]

    log.write(b"".join(lines[:10]))
    assert drift()["1"]["alarm_since"] is None
    again = [json.loads(line) | {"request_id": f"again{number}"} for number, line in enumerate(lines[:10])]
    log.write(b"".join(json.dumps(row).encode() + b"\n" for row in again))
    assert drift()["1"]["pictures"] == 10  # the same pictures again say nothing new
    monitor.store.engine.dispose()
    monitor = Monitor(settings_of(tmp_path))
    log.write(b"".join(lines[10:]) + measured(values[:5], "sha256:unknown", first=1000, version="2"))
    report = drift()
    assert report.keys() == {"1"}
    assert report["1"]["pictures"] == 400
    assert report["1"]["alarm_since"] is not None
    assert report["1"]["joint"] >= report["1"]["alarm_at"] == 4
    assert max(report["1"]["statistics"], key=report["1"]["statistics"].get) == "sharpness"
    assert report["1"]["reference"]["flagged_share"] == 0.3

    client = TestClient(create_app(monitor))
    summary = client.get("/summary", params={"hours": 2}).json()
    assert not summary["performance"]["calibration_holds"]
    low, high = summary["performance"]["estimated_interval_95"]
    assert low < summary["performance"]["estimated_accuracy"] < high
    assert max(interval["drift"]["joint"] or 0 for interval in summary["intervals"]) > 4
    whole = DriftState()
    values[:, len(INPUT_STATISTICS) :] = np.where(np.array(CODES) == "NV", 0.6, 0.05)  # as in all lines
    whole.update(values, [NOW] * 400, normal_reference())
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(client.get("/metrics").text)
        for sample in family.samples
        if sample.labels in ({"version": "1", "figure": "joint"}, {"version": "1"})
    }
    assert samples["monitor_drift_evidence"] == pytest.approx(whole.figures["joint"])
    assert samples["monitor_drift_alarm"] == 1
