"""The study of unknown classes.

No image or lesion of a held-out class is used in training. Every detector follows its formula. Far pictures are
repeatable. The study runs from the manifest to its tables.
"""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from scipy.special import logsumexp, softmax

from handlers.predictor import Predictor
from mlflow_tracking import classification_metrics as metrics
from mlflow_tracking.command_line import run
from scripts.studies import unknowns, unknowns_report
from scripts.studies.detectors import DETECTORS, DetectorInputs
from scripts.studies.far_images import SIDE, far_images
from scripts.studies.small_trainings import trained_bundle
from scripts.studies.study_error import StudyError
from tests.models import tiny_bundle
from tests.tiny_lesions import tiny_manifest
from training import checkpoints
from training.config import ROOT, load_config
from training.data.manifest import fingerprint, read_manifest
from training.evaluation.unknown_class_fit import KnownLesions

DIMENSIONS, CLASSES = 12, 4


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr(unknowns, "RESAMPLES", 60)


@pytest.fixture(scope="module")
def space():
    """Four classes around corners in the first four of twelve dimensions, and a head that separates them."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES), 150)
    weight = np.eye(CLASSES, DIMENSIONS) * 2
    features = 3 * np.eye(CLASSES, DIMENSIONS)[labels] + spread(rng, len(labels))
    return KnownLesions(features, features @ weight.T, labels, weight, np.zeros(CLASSES))


def spread(rng, n):
    """Noise, smaller in the last dimensions."""
    return rng.normal(size=(n, DIMENSIONS)) * np.r_[np.full(6, 0.5), np.full(6, 0.05)]


def outputs(features, space):
    return DetectorInputs(features, features @ space.weight.T + space.bias)


# react removes exactly the features that are large here
@pytest.mark.parametrize("name", [name for name in DETECTORS if name != "react"])
def test_each_detector_separates_known_pictures_from_weak_features(name, space):
    rng = np.random.default_rng(1)
    fresh = outputs(space.features + 0.1 * spread(rng, len(space.labels)), space)
    strange = outputs(spread(rng, 200), space)
    score = DETECTORS[name](space)
    assert score(fresh).shape == (len(space.labels),)
    assert metrics.detection(score(fresh), score(strange))["auroc"] > 0.9


@pytest.mark.parametrize("name", ["mahalanobis", "vim"])
def test_feature_detectors_notice_a_direction_that_the_head_ignores(name, space):
    """The logits equal those of known images; only dimensions that the head ignores differ."""
    odd = space.features.copy()
    odd[:, -1] += 1
    logits = outputs(odd, space).logits
    assert logits == pytest.approx(space.logits)
    score = DETECTORS[name](space)
    assert metrics.detection(score(space), score(outputs(odd, space)))["auroc"] > 0.95
    assert metrics.detection(-space.logits.max(1), -logits.max(1))["auroc"] == pytest.approx(0.5)


def test_formulas_by_hand(space):
    out = space
    expected = {
        "max_softmax": 1 - softmax(out.logits, axis=1).max(1),
        "max_logit": -out.logits.max(1),
        "energy": -logsumexp(out.logits, axis=1),
    }
    for name, values in expected.items():
        assert DETECTORS[name](space)(out) == pytest.approx(values), name
    clipped = np.minimum(out.features, np.percentile(out.features, 90)) @ space.weight.T
    assert DETECTORS["react"](space)(out) == pytest.approx(-logsumexp(clipped, axis=1))
    means = np.stack([out.features[space.labels == k].mean(0) for k in range(CLASSES)])
    centred = out.features - means[space.labels]
    covariance = centred.T @ centred / len(centred)
    covariance += 1e-3 * np.trace(covariance) / DIMENSIONS * np.eye(DIMENSIONS)
    difference = out.features[0] - means
    by_hand = min(d @ np.linalg.solve(covariance, d) for d in difference)
    assert DETECTORS["mahalanobis"](space)(out)[0] == pytest.approx(by_hand)


# ---- holding out


def own_lesions(folder):
    """Return the tiny manifest with one lesion for each image, because its lesions have two classes."""
    manifest = tiny_manifest(folder)
    table = pd.read_csv(manifest, dtype=str, keep_default_na=False)
    table.assign(lesion_id=table["image_id"]).to_csv(manifest, index=False)
    return manifest


def test_a_held_out_class_is_in_no_training_split(tmp_path):
    frame = read_manifest(own_lesions(tmp_path))
    # One lesion of the class also has an image of another class.
    assert frame["label"][:2].tolist() == ["MEL", "NV"]
    frame.loc[1, "lesion_id"] = frame["lesion_id"][0]
    held = unknowns.hold_out(frame, "MEL")
    assert "MEL" not in set(held["label"])
    unknown = held[held["label"] == "UNK"]
    assert set(unknown["split"]) == {"test"}
    assert len(unknown) == (frame["label"] == "MEL").sum() - 1
    assert not set(unknown["lesion_id"]) & set(held.loc[held["label"] != "UNK", "lesion_id"])
    fewer = unknowns.hold_out(frame, "MEL", most=5)
    training = fewer[fewer["split"] == "train"]
    assert training["label"].value_counts().to_dict() == {"NV": 5, "BCC": 5}
    with pytest.raises(StudyError, match="No image of DF can be held out"):
        unknowns.hold_out(frame, "DF")
    assert (fewer["split"] == "calibration").sum() == (held["split"] == "calibration").sum()


def test_far_pictures_are_repeatable_and_differ_in_kind(tmp_path):
    read_manifest(tiny_manifest(tmp_path / "data"))
    corners = sorted((tmp_path / "data").glob("*.png"))
    first, again = far_images(3, corners), far_images(3, corners)
    assert len(first) == 7
    for kind, pictures in first.items():
        assert [picture.shape for picture in pictures] == [(SIDE, SIDE, 3)] * 3, kind
        assert all(picture.dtype == np.uint8 for picture in pictures)
        assert all((a == b).all() for a, b in zip(pictures, again[kind], strict=True)), kind
    assert "skin" not in far_images(1)


def test_intervals_of_near_figures_are_over_lesions(tmp_path, monkeypatch):
    frame, drawn = read_manifest(own_lesions(tmp_path / "data")), []
    rows = unknowns.hold_out(frame, "MEL")
    rows.loc[rows["label"] == "UNK", "lesion_id"] = "lesion"
    resampled = metrics.resampled
    monkeypatch.setattr(
        metrics, "resampled", lambda groups, *rest: drawn.append(list(groups)) or resampled(groups, *rest)
    )
    bundle = tiny_bundle(tmp_path / "bundle", classes=("NV", "BCC"), graph=False)
    lesions = unknowns.draw_lesions(frame)
    table, draws = unknowns.judge(bundle, rows, {}, tmp_path / "cache", lesions)
    assert drawn == [["lesion"] * 48]
    assert any(np.ptp(values) for values in draws.values())
    once = lesions.map(lambda times: 1)
    table, draws = unknowns.judge(bundle, rows, {}, tmp_path / "cache", once)
    for name, values in draws.items():
        assert values == pytest.approx(table["detectors"][name]["near"]["auroc"]), "each lesion once is the test itself"


def test_all_held_out_classes_share_the_draws_of_known_lesions(tmp_path):
    frame = read_manifest(tiny_manifest(tmp_path))
    drawn = unknowns.draw_lesions(frame)
    assert drawn.shape == (9, unknowns.RESAMPLES)
    assert (drawn.sum() == 9).all()
    assert set(drawn.index) == set(frame.loc[frame["split"] == "test", "lesion_id"])
    assert drawn.to_numpy().var() == pytest.approx(8 / 9, rel=0.1), "with replacement"


def test_a_model_is_judged_near_and_far(tmp_path):
    frame = read_manifest(own_lesions(tmp_path / "data"))
    bundle = tiny_bundle(tmp_path / "bundle", classes=("NV", "BCC"), graph=False)
    rows = unknowns.hold_out(frame, "MEL")
    drawn = unknowns.draw_lesions(frame)
    table, draws = unknowns.judge(bundle, rows, far_images(2), tmp_path / "cache", drawn)
    assert table["images"] == 48
    near = {name: figures["near"] for name, figures in table["detectors"].items()}
    again = unknowns.judge(bundle, rows, {}, tmp_path / "cache", drawn)[0]["detectors"]
    assert {name: figures["near"] for name, figures in again.items()} == near, "the same study draws the same"
    assert set(table["detectors"]) == set(DETECTORS)
    for figures in table["detectors"].values():
        low, high = figures["near"]["auroc_interval_95"]
        assert 0 <= low <= figures["near"]["auroc"] <= high <= 1
        assert figures["near"]["called_malignant"] <= table["called_malignant_by_all"]
        assert len(figures["far"]) == 6
    means = unknowns_report.summarise({"MEL": table}, {"MEL": draws})
    twice = unknowns_report.summarise({"MEL": table, "NV": table}, {"MEL": draws, "NV": draws})
    shuffled = {name: np.random.default_rng(0).permutation(values) for name, values in draws.items()}
    apart = unknowns_report.summarise({"MEL": table, "NV": table}, {"MEL": draws, "NV": shuffled})
    for name in means:
        (low, high), same, (least, most) = (m[name]["near_auroc_interval_95"] for m in (means, twice, apart))
        assert same == (low, high), "the same lesions twice add no information"
        assert high - low >= 1.2 * (most - least), "other lesions do"
    assert any(np.ptp(row["near_auroc_interval_95"]) for row in apart.values())
    ranking = [row["near_auroc"] for row in means.values()]
    assert ranking == sorted(ranking, reverse=True)
    as_served = unknowns.served(Predictor(bundle), frame[frame["split"] == "test"], far_images(2))
    assert all(figures["images"] == 2 for figures in as_served.values())
    text = unknowns_report.markdown({"means": means, "held_out": {"MEL": table}, "served": as_served})
    assert "| noise |" in text
    # Sorted keys in the JSON file change nothing.
    again = json.loads(json.dumps({"means": means, "held_out": {"MEL": table}, "served": as_served}, sort_keys=True))
    assert unknowns_report.markdown(again) == text
    best = next(iter(means))
    assert f"| `{best}` | {means[best]['near_auroc']:.3f} | {means[best]['near_fpr_at_95']:.3f} |" in text
    assert text.count("\n| `") == len(DETECTORS)
    assert "| MEL | 48 |" in text


def test_a_model_of_other_data_or_settings_is_refused(tmp_path):
    frame, folder = read_manifest(own_lesions(tmp_path / "data")), tmp_path / "without_MEL"
    sealed = tiny_bundle(folder / "bundle", classes=("NV", "BCC"), graph=False)
    config = load_config("held_out", ["name=without_MEL", "output=elsewhere", "cache_dir=another"]).to_dict()
    state = {"config": config, "dataset_fingerprint": fingerprint(unknowns.hold_out(frame, "MEL", 9))}
    checkpoints.save(folder / "last.pt", state)

    def trained(frame, preset="held_out", most=9):
        rows = unknowns.hold_out(frame, "MEL", most)
        return trained_bundle(rows, preset, ["name=without_MEL"], folder, tmp_path / "cache")

    assert trained(frame).digest == sealed.digest
    for other in ({"most": 8}, {"preset": "demo_vit"}):
        with pytest.raises(StudyError, match="has a model of other data or settings"):
            trained(frame, **other)
    with pytest.raises(StudyError, match="has a model of other data or settings"):
        trained(frame.iloc[:-1])
    (folder / "last.pt").unlink()
    with pytest.raises(checkpoints.CheckpointError, match="There is no checkpoint"):
        trained(frame)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_study_trains_each_model_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    manifest = own_lesions(tmp_path / "data")
    preset = tmp_path / "preset.yaml"
    preset.write_text("architecture: test_vit\nimage_size: 32\nbatch_size: 16\nepochs: 1\nbootstrap: 0\n")
    command = [sys.executable, ROOT / "scripts" / "studies" / "unknowns.py", "--data", manifest]
    command += ["--out", tmp_path / "out", "--config", preset, "--classes", "MEL"]
    for trains in (True, False):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("Training without MEL" in done.stdout) is trains
    study = json.loads((tmp_path / "out" / "unknowns.json").read_text())
    assert list(study["held_out"]) == ["MEL"]
    assert study["bundle"] is None
    assert (tmp_path / "out" / "unknowns.md").is_file()


@pytest.mark.parametrize(
    ("option", "says"),
    [(("--classes", "FOO"), "--classes is FOO: choose from MEL, "), (("--config", "foo"), "no preset")],
)
def test_wrong_options_are_reported_before_the_data_is_read(capsys, monkeypatch, tmp_path, option, says):
    monkeypatch.setattr(sys, "argv", ["unknowns.py", "--data", "nowhere.csv", "--out", str(tmp_path / "out"), *option])
    with pytest.raises(SystemExit) as ended:
        run(unknowns.main)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
