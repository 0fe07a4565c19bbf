"""The study of left-out sources: no picture, lesion or patient of the source is in training; recipes are compared."""

import json

import numpy as np
import pytest

from scripts.studies import left_out_sources as study
from scripts.studies.study_error import StudyError
from tests.commands import invoke
from tests.tiny_lesions import tiny_manifest
from training.data.manifest import read_manifest, write_manifest

SOURCES = ("folder", "msk", "derm7pt")


@pytest.fixture
def manifest(tmp_path):
    frame = read_manifest(tiny_manifest(tmp_path / "data"))
    frame["source"] = [SOURCES[int(lesion.rpartition("_")[2]) // 3 % 3] for lesion in frame["lesion_id"]]
    write_manifest(tmp_path / "manifest.csv", frame)
    return tmp_path / "manifest.csv"


def test_nothing_of_the_source_is_in_training(manifest):
    frame = read_manifest(manifest)
    frame.loc[frame["source"] == "msk", "patient_id"] = "p"
    shared = frame.index[(frame["source"] == "folder") & (frame["split"] == "train")][:2]
    frame.loc[shared, "patient_id"] = "p"
    rows = study.leave_out(frame, "msk")
    tested, trained = rows[rows["split"] == "test"], rows[rows["split"] != "test"]
    assert set(tested["source"]) == {"msk"}
    assert len(tested) == (frame["source"] == "msk").sum()
    assert not set(trained["source"]) & {"msk"}
    assert not set(trained["patient_id"]) & {"p"}
    assert len(trained) == ((frame["source"] != "msk") & (frame["split"] != "test")).sum() - 2
    with pytest.raises(StudyError, match="choose one of derm7pt, folder, msk"):
        study.leave_out(frame, "bcn20000")


@pytest.mark.slow  # two trainings
def test_recipes_are_judged_on_the_source(manifest, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESAMPLES", 20)
    preset = tmp_path / "tiny.yaml"
    preset.write_text(
        "architecture: resnet10t\nimage_size: 32\nepochs: 1\nbatch_size: 16\nprecision: fp32\nbootstrap: 0\n"
        "warmup_epochs: 0.1\nthreads: 1\n"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    args = ["--data", manifest, "--out", tmp_path / "out", "--source", "msk", "--config", preset]
    code, output = invoke(study.main, *args, "--recipe", "resample=0.9 epochs=2")
    assert code == 0, output
    table = json.loads((tmp_path / "out" / "left_out_sources.json").read_text())
    recipes = table["sources"]["msk"]
    assert list(recipes) == ["preset", "resample=0.9 epochs=2"]
    for figures in recipes.values():
        assert figures["images"] == (read_manifest(manifest)["source"] == "msk").sum()
        low, high = figures["macro_auc"]["interval_95"]
        assert low <= high
        assert np.isfinite(figures["malignant_auc"]["value"])
    assert "Written: " in output


def test_a_wrong_recipe_is_reported_before_the_work(manifest, tmp_path):
    code, output = invoke(
        study.main, "--data", manifest, "--out", tmp_path / "out", "--source", "msk", "--recipe", "resampel=1"
    )
    assert code == 2
    assert "There is no setting 'resampel'; the nearest is 'resample'." in output
    assert not (tmp_path / "out").exists()
