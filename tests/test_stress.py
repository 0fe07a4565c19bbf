"""What stress.py and explanations.py say of a model.

Every fault changes a picture, keeps its size and is the same each time; a model that looks at one corner alone is
found out: by what changes its answer, by the heat on the border, and by the deletion curve; shuffled weights change the
map.
"""

import json

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from tests.models import tiny_bundle
from tests.tiny_lesions import tiny_manifest
from training import explanations, stress
from training.manifest import read_manifest
from training.synthetic import draw_lesion


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return tiny_manifest(tmp_path_factory.mktemp("data"))


def run(main, *args):
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.output + result.stderr


@pytest.mark.parametrize("name", stress.FAULTS)
def test_a_fault_is_visible_and_repeatable(name):
    picture = np.asarray(draw_lesion(1, "MEL", (120, 90)))
    first, again = (stress.FAULTS[name](picture, np.random.default_rng(5)) for _ in range(2))
    assert first.dtype == np.uint8
    assert (first == again).all()
    assert first.shape in {picture.shape, (120, 90, 3)}
    assert first.shape != picture.shape or np.abs(first.astype(int) - picture).mean() > 0.5


def test_faults_are_put_on_the_pictures_and_nothing_else_changes(bundle, manifest):
    from handlers.predictor import Predictor

    frame = read_manifest(manifest)
    rows = frame[frame["split"] == "test"].reset_index(drop=True)
    table = stress.stress(Predictor(bundle), rows)
    assert list(table) == ["none", *stress.FAULTS]
    assert table["none"] | {"balanced_accuracy": 0} == {
        "melanoma_change": 0, "melanoma_drop": 0, "flips": 0, "balanced_accuracy": 0,
    }  # fmt: skip
    assert all(row["melanoma_change"] > 0 for name, row in table.items() if name != "none")
    # the images are coloured noise: a warm lamp changes more than a mild compression
    assert table["warm white"]["melanoma_change"] > table["jpeg"]["melanoma_change"] / 10


def test_the_sheet_is_written(bundle, manifest, tmp_path):
    code, output = run(stress.main, "--bundle", bundle.path, "--data", manifest, "--out", tmp_path)
    assert code == 0, output
    assert json.loads((tmp_path / "stress.json").read_text())["images"] == 18
    with Image.open(tmp_path / "stress.png") as picture:
        picture.verify()
    assert "| quarter turn |" in (tmp_path / "stress.md").read_text()


@pytest.mark.parametrize("main", [stress.main, explanations.main])
def test_a_split_without_images_is_one_sentence(main, bundle, manifest, tmp_path):
    args = ["--bundle", bundle.path, "--data", manifest, "--out", tmp_path, "--split", "tset"]
    code, output = run(main, *args)
    assert code == 1
    assert "no image of a known class in the split 'tset'" in output.replace("\n", " ")


class CornerModel:
    """Stands in for a network: the brighter the upper left cell of 4 × 4, the surer it is; its heat lies there."""

    def __init__(self, bundle):
        pass

    def __call__(self, pixels, target):
        corner = pixels[:, :8, :8].mean((1, 2, 3)) / 255
        maps = np.zeros((len(pixels), 4, 4), np.float32)
        maps[:, 0, 0] = 1
        return np.stack([20 * (corner - 0.5), np.zeros(len(pixels))], 1).astype(np.float32), maps, np.zeros(len(pixels))


def test_a_model_that_looks_at_a_corner_is_found_out(bundle, monkeypatch):
    monkeypatch.setattr(explanations, "TorchRuntime", CornerModel)
    monkeypatch.setattr(explanations, "_shuffled", lambda bundle, what, seed: CornerModel(bundle))
    pixels = np.full((6, 32, 32, 3), 10, np.uint8)
    pixels[:, :8, :8] = 250
    table = explanations.judge(bundle, pixels)
    assert table["border"] == 1
    assert table["border_cells"] == 12 / 16
    assert table["empty"] == 0
    assert table["deletion"]["hottest first"][0] > 0.99
    area = table["deletion_area"]
    assert area["hottest first"] < area["random"] < area["coldest first"]
    assert table["randomised"]["all"] == pytest.approx(1)  # the same map whatever was learnt: the check says so


def test_shuffled_weights_give_another_map_and_leave_the_bundle_alone(bundle):
    pixels = np.stack([np.asarray(draw_lesion(seed, "NV", (64, 64))) for seed in range(4)])
    table = explanations.judge(bundle, pixels)
    assert abs(table["randomised"]["all"]) < 0.9
    assert table == explanations.judge(bundle, pixels)
    weights = explanations._shuffled(bundle, "head", 0).module.cam.backbone
    original = explanations.TorchRuntime(bundle).module.cam.backbone
    for (name, one), other in zip(weights.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(one, other) is not name.startswith("head"), name


def test_checks_are_written(manifest, tmp_path):
    bundle = tiny_bundle(tmp_path / "bundle", seed=1)  # the other one shows no heat on coloured noise
    code, output = run(explanations.main, "--bundle", bundle.path, "--data", manifest, "--out", tmp_path, "--most", 6)
    assert code == 0, output
    table = json.loads((tmp_path / "explanations.json").read_text())
    assert table["images"] == 6
    assert len(table["deletion"]["random"]) == explanations.STEPS + 1
    assert (tmp_path / "deletion.png").is_file()
