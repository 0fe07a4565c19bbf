"""stress.py and explanations.py.

Every fault changes a picture, keeps its size and is repeatable. A model that looks only at one corner is detected by
the stress test, by the heat on the border and by the deletion curve. Shuffled weights change the map.
"""

import io
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from handlers.receipt import DIGITS, Receipt, SeenImages
from handlers.taxonomy import CODES, KNOWN_CODES
from tests.commands import invoke
from tests.models import tiny_bundle
from tests.tiny_lesions import tiny_manifest
from training.data.manifest import ManifestError, read_manifest
from training.data.synthetic import draw_lesion
from training.evaluation import explanations, stress
from training.evaluation.lesion_masks import lesion_mask, pointing


def receipt(**seen: tuple[str, ...]) -> Receipt:
    images = {"sha256": (), "phash": (), "isic_ids": (), "lesions": ()} | seen
    return Receipt("sha256:elsewhere", {"train": SeenImages(**images)})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "bundle", receipt=receipt())


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return tiny_manifest(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("name", stress.FAULTS)
def test_a_fault_is_visible_and_repeatable(name):
    picture = np.asarray(draw_lesion(1, "MEL", (120, 90)))
    first, again = (stress.FAULTS[name](picture, np.random.default_rng(5)) for _ in range(2))
    assert first.dtype == np.uint8
    assert (first == again).all()
    assert first.shape in {picture.shape, (120, 90, 3)}
    assert first.shape != picture.shape or np.abs(first.astype(int) - picture).mean() > 0.5


def test_compression_equals_that_of_pillow():
    """A strongly coloured picture would differ if red and blue were swapped."""
    picture = np.asarray(draw_lesion(1, "MEL", (120, 90))).copy()
    picture[:, 60:] = (200, 30, 30)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=20, subsampling="4:2:0")
    with Image.open(buffer) as reference:
        difference = stress.jpeg(picture, np.random.default_rng(0)).astype(int) - np.asarray(reference)
    assert np.abs(difference).mean() < 0.1


def answering(brightness):
    """Return a predictor that looks up nine probabilities by the mean of a picture."""

    def runtime(pixels, target):
        means = pixels.mean((1, 2, 3)).round().astype(int)
        return np.array([brightness[mean] for mean in means]), None, None

    def probabilities(logits, classes, residuals):
        return logits

    config = SimpleNamespace(
        preprocessing=SimpleNamespace(resize=np.asarray), classes=KNOWN_CODES,
        calibration=SimpleNamespace(probabilities=probabilities),
    )  # fmt: skip
    return SimpleNamespace(runtime=runtime, config=config)


def answer(**probabilities):
    return [probabilities.get(code, 0.0) for code in CODES]


def test_figures_by_hand(tmp_path, monkeypatch):
    """Two melanomas and two nevi, grey; a fault that brightens by 100 makes one melanoma a nevus, one unknown."""
    rows = []
    for grey, label in ((10, "MEL"), (20, "MEL"), (30, "NV"), (40, "NV")):
        Image.new("RGB", (32, 32), (grey,) * 3).save(tmp_path / f"{grey}.png")
        rows.append({"path": str(tmp_path / f"{grey}.png"), "label": label})
    monkeypatch.setattr(stress, "FAULTS", {"bright": lambda image, rng: image + np.uint8(100)})
    monkeypatch.setattr(stress, "BATCH", 3)  # and two batches
    nine = {
        10: answer(MEL=0.8, NV=0.2), 110: answer(MEL=0.3, NV=0.7),
        20: answer(MEL=0.6, NV=0.4), 120: answer(MEL=0.4, UNK=0.6),
        30: answer(MEL=0.1, NV=0.9), 130: answer(MEL=0.2, NV=0.8),
        40: answer(MEL=0.7, NV=0.3), 140: answer(MEL=0.7, NV=0.3),
    }  # fmt: skip
    table = stress.stress(answering(nine), pd.DataFrame(rows))
    unchanged = {"melanoma_change": 0, "melanoma_drop": 0, "flips": 0}
    assert table["none"] == unchanged | {"balanced_accuracy": 0.75}
    assert table["bright"] == {
        "melanoma_change": pytest.approx((0.5 + 0.2 + 0.1 + 0) / 4),
        "melanoma_drop": pytest.approx(-(0.5 + 0.2) / 2),
        "flips": 0.5,
        "balanced_accuracy": 0.5,  # without UNK the second melanoma is right, and one of the nevi
    }


def test_pictures_are_decoded_as_in_serving(tmp_path):
    turned = Image.new("RGB", (64, 32), (200, 30, 30))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert stress._open(str(tmp_path / "turned.jpg")).shape == (64, 32, 3)
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    with pytest.raises(ManifestError, match=r"small.png cannot be read. The image has 8×8 pixels"):
        stress._open(str(tmp_path / "small.png"))


def test_the_figures_of_the_stress_test_are_written(bundle, manifest, tmp_path):
    code, output = invoke(stress.main, "--bundle", bundle.path, "--data", manifest, "--out", tmp_path)
    assert code == 0, output
    table = json.loads((tmp_path / "stress.json").read_text())
    assert table["images"] == 18
    assert table["overlap"]["overlaps"] is False
    with Image.open(tmp_path / "stress.png") as picture:
        picture.verify()
    assert "| quarter turn |" in (tmp_path / "stress.md").read_text()


@pytest.mark.parametrize("main", [stress.main, explanations.main])
def test_a_split_without_images_is_one_sentence(main, bundle, manifest, tmp_path):
    args = ["--bundle", bundle.path, "--data", manifest, "--out", tmp_path, "--split", "tset"]
    code, output = invoke(main, *args)
    assert code == 1
    assert "no image of a known class in the split 'tset'" in output


@pytest.mark.parametrize("main", [stress.main, explanations.main])
def test_images_that_the_model_was_made_from_are_refused(main, manifest, tmp_path):
    # the image that explanations.py takes first
    digest = read_manifest(manifest).query("split == 'test'")["sha256"].min()
    bundle = tiny_bundle(tmp_path / "bundle", receipt=receipt(sha256=(digest[:DIGITS],)))
    args = ["--bundle", bundle.path, "--data", manifest, "--out", tmp_path / "out"]
    code, output = invoke(main, *args)
    assert code == 1
    assert "1 were seen in training" in output
    assert not list(tmp_path.glob("out/*"))


class CornerModel:
    """Stands in for a network that only looks at the upper left cell of 4 × 4, and marks it in its heatmap."""

    def __init__(self, bundle):
        pass

    def __call__(self, pixels, target):
        corner = pixels[:, :8, :8].mean((1, 2, 3)) / 255
        maps = np.zeros((len(pixels), 4, 4), np.float32)
        maps[:, 0, 0] = 1
        return np.stack([20 * (corner - 0.5), np.zeros(len(pixels))], 1).astype(np.float32), maps, np.zeros(len(pixels))


def test_a_model_that_looks_at_a_corner_is_detected(bundle, monkeypatch):
    monkeypatch.setattr(explanations, "TorchRuntime", CornerModel)
    monkeypatch.setattr(explanations, "_shuffled", lambda bundle, what, seed: CornerModel(bundle))
    pixels = np.full((6, 32, 32, 3), 10, np.uint8)
    pixels[:, :8, :8] = 250
    table = explanations.check_heatmaps(bundle, pixels)
    assert table["border"] == 1
    assert table["border_cells"] == 12 / 16
    assert table["empty"] == 0
    assert table["deletion"]["hottest first"][0] > 0.99
    area = table["deletion_area"]
    assert area["hottest first"] < area["random"] < area["coldest first"]
    assert table["randomised"]["all"] == pytest.approx(1)  # the same map for any weights


def test_the_mask_is_the_lesion_of_a_plain_picture():
    skin = np.full((96, 96, 3), (225, 180, 160), np.uint8)
    y, x = np.mgrid[:96, :96]
    lesion = (y - 44) ** 2 + (x - 52) ** 2 < 20**2
    picture = skin.copy()
    picture[lesion] = (110, 70, 60)
    mask = lesion_mask(picture)
    assert (mask == lesion).mean() > 0.98
    for unclear in (skin, np.roll(picture, 40, axis=1)):
        assert lesion_mask(unclear) is None

    heat = np.zeros((3, 4, 4), np.float32)
    heat[0, 1, 2] = 1  # on the lesion
    heat[1, 0, 0] = 1  # in the corner
    heat[2] = 1  # nowhere in particular, but the picture is left out
    figures = pointing(heat, np.stack([picture, picture, skin]))
    assert (figures["images"], figures["hit"], figures["heat_inside"]) == (2, 0.5, 0.5)
    assert 0 < figures["chance"] < 0.5
    assert figures["centre"] == 1
    assert pointing(heat[2:], skin[None]) == {"images": 0}


def test_shuffled_weights_give_another_map_and_leave_the_bundle_alone(bundle):
    pixels = np.stack([np.asarray(draw_lesion(seed, "NV", (64, 64))) for seed in range(4)])
    table = explanations.check_heatmaps(bundle, pixels)
    assert abs(table["randomised"]["all"]) < 0.9
    assert table == explanations.check_heatmaps(bundle, pixels)
    weights = explanations._shuffled(bundle, "head", 0).module.cam.backbone
    original = explanations.TorchRuntime(bundle).module.cam.backbone
    for (name, one), other in zip(weights.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(one, other) is not name.startswith("head"), name


def test_the_figures_of_the_heatmap_checks_are_written(manifest, tmp_path):
    # with the other seed the network shows no heat on coloured noise
    bundle = tiny_bundle(tmp_path / "bundle", seed=1, receipt=receipt(), graph=False)
    out = tmp_path / "out"
    code, output = invoke(explanations.main, "--bundle", bundle.path, "--data", manifest, "--out", out, "--most", 6)
    assert code == 0, output
    table = json.loads((out / "explanations.json").read_text())
    assert table["images"] == 6
    assert len(table["deletion"]["random"]) == explanations.STEPS + 1
    assert {path.name for path in out.iterdir()} == {"explanations.json", "deletion.png"}  # no decoded pictures
