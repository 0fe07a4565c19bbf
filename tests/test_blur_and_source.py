"""The study of sharpness and source: pictures are shrunk, never enlarged; a model that sees the source is caught."""

import json

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from scripts.studies import blur_and_source as study
from tests.commands import invoke
from tests.models import tiny_bundle
from tests.tiny_lesions import tiny_manifest
from training.data.manifest import read_manifest, write_manifest


@pytest.mark.parametrize(
    ("side", "size"), [(30, (40, 30)), (45, (60, 45)), (90, (120, 90)), (200, (120, 90)), (study.ANY_SIDE, (120, 90))]
)
def test_a_picture_is_shrunk_and_never_enlarged(tmp_path, side, size):
    Image.new("RGB", (120, 90), (200, 150, 130)).save(tmp_path / "a.png")
    assert study.opened(str(tmp_path / "a.png"), side).size == size


def test_a_source_that_colours_the_features_is_separability_and_noise_is_not():
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"source": np.repeat(["a", "b"], 60), "lesion_id": [f"l{i}" for i in range(120)]})
    noise = rng.normal(size=(120, 8))
    assert study._separability(noise, rows) == pytest.approx(0.5, abs=0.15)
    assert study._separability(noise + 3 * (rows["source"] == "b").to_numpy()[:, None], rows) > 0.95


def test_the_study_measures_both(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "MIN_SLICE", 4)
    monkeypatch.setattr(study, "SIDES", (16, 32))
    monkeypatch.setattr(study, "SHARP", 20)
    monkeypatch.setattr(study, "FOLDS", 2)
    frame = read_manifest(tiny_manifest(tmp_path))
    frame["source"] = ["msk" if number % 4 < 2 else "folder" for number in range(len(frame))]
    write_manifest(tmp_path / "two.csv", frame)
    bundle = tiny_bundle(tmp_path / "bundle").path
    args = ["--bundle", bundle, "--data", tmp_path / "two.csv", "--out", tmp_path / "out", "--allow-overlap"]
    code, output = invoke(study.main, *args)
    assert code == 0, output
    table = json.loads((tmp_path / "out" / "blur_and_source.json").read_text())
    assert table["sharpness"]["16"]["images"] == 18
    assert set(table["source"]["sources"]) == {"msk", "folder"}
    assert table["source"]["chance"] == 0.5
    assert set(table["source"]["balanced_accuracy"]) == {"true class alone", "features", "features at 16 px"}
    assert "tells the sources apart" in output

    write_manifest(tmp_path / "one.csv", frame.assign(source="msk"))
    code, output = invoke(study.main, "--data", tmp_path / "one.csv", *args[:2], *args[4:])
    assert code == 1
    assert "The split has fewer than two sources" in output
