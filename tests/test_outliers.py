"""Outlier exposure: pictures without a lesion among the training images, and the class UNK that learns from them."""

import numpy as np
import pytest
import torch
from scipy.special import softmax

from handlers.calibration import Calibration
from handlers.predictor import Predictor
from handlers.request import Request
from handlers.taxonomy import CODES
from tests.models import tiny_bundle
from training.data.draws import Draws
from training.data.outliers import Outliers, bare_skin, blank, page
from training.data.synthetic import draw_lesion
from training.evaluation.calibration_fit import fit_calibration
from training.validation import validation_figures

CLASSES = ("MEL", "NV", "UNK")


def lesions(count=8, side=64):
    return torch.from_numpy(np.stack([np.asarray(draw_lesion(k, "NV", size=(side, side))) for k in range(count)]))


def test_a_share_of_each_batch_becomes_outliers_of_class_unk():
    pixels, labels = lesions().repeat(50, 1, 1, 1), torch.zeros(400, dtype=torch.int64)
    (changed, targets), (again, _) = (Outliers(0.25, 2)(pixels, labels, Draws((5,), 400)) for _ in range(2))
    assert torch.equal(changed, again)
    assert float((targets == 2).float().mean()) == pytest.approx(0.25, abs=0.06)
    kept = targets == 0
    assert torch.equal(changed[kept], pixels[kept])
    assert all((changed[~kept] != pixels[~kept]).flatten(1).any(1))
    assert not labels.any()  # the caller's are left alone


@pytest.mark.parametrize("draw", [bare_skin, blank, page])
def test_outliers_are_varied_pictures_of_the_same_size(draw):
    image = lesions(1)[0].numpy()
    pictures = [draw(image, np.random.default_rng(seed)) for seed in range(20)]
    assert {(picture.shape, picture.dtype.str) for picture in pictures} == {(image.shape, "|u1")}
    assert len({picture.tobytes() for picture in pictures}) > 5


def test_bare_skin_shows_no_lesion():
    image = lesions(1)[0].numpy()
    centre = image[24:40, 24:40].mean()
    assert all(bare_skin(image, np.random.default_rng(seed)).mean() > centre + 20 for seed in range(10))


def sample(n, seed):
    """Return logits of three classes and labels; UNK's logit is high for the last tenth, which is UNK."""
    rng = np.random.default_rng(seed)
    labels = np.where(np.arange(n) < 0.9 * n, rng.integers(0, 2, n), 2)
    return rng.normal(size=(n, 3)) + 4 * np.eye(3)[labels], labels


def test_without_calibration_unk_has_its_softmax_probability():
    logits, _ = sample(20, 0)
    nine = Calibration().probabilities(logits, CLASSES)
    assert nine[:, [0, 1, 8]] == pytest.approx(softmax(logits, axis=1))


def test_the_outlier_logit_makes_unk_and_one_known_lesion_in_twenty_is_called_unknown():
    logits, labels = sample(4000, 1)
    calibration = fit_calibration(logits, labels, CLASSES)
    fresh, truth = sample(4000, 2)
    first = calibration.probabilities(fresh, CLASSES).argmax(1)
    assert (first[truth < 2] == 8).mean() == pytest.approx(0.05, abs=0.015)
    assert (first[truth == 2] == 8).mean() > 0.97
    assert set(calibration.conformal.thresholds) == {"MEL", "NV"}
    sets = calibration.conformal_sets(fresh, CLASSES)
    assert np.mean(["UNK" in sets[row] for row in np.flatnonzero(truth == 2)]) > 0.97
    assert np.mean([CLASSES[truth[row]] in sets[row] for row in np.flatnonzero(truth < 2)]) > 0.87


def test_validation_leaves_unk_out():
    logits, labels = sample(500, 3)
    figures = validation_figures(labels, logits, CLASSES)
    known = labels < 2
    assert figures == validation_figures(labels[known], logits[known][:, :2], CLASSES[:2])


def test_the_heatmap_shows_a_diagnosis_even_if_unk_is_first(tmp_path, drawn_image):
    """The head's bias makes UNK first for every picture; its own map is drawn on request."""
    bundle = tiny_bundle(tmp_path / "bundle", classes=CODES, graph=False)
    predictor = Predictor(bundle, runtime="torch")
    backbone = predictor.runtime.module.cam.backbone
    with torch.no_grad():
        backbone.get_classifier().bias[-1] += 8
    image = drawn_image("MEL", 1)
    plain, unknown = predictor.predict([Request(image), Request(image, target="UNK")])
    best = max(CODES[:-1], key=plain.probabilities.__getitem__)
    [chosen] = predictor.predict([Request(image, target=best)])
    assert plain.code == "UNK"
    assert (plain.target, unknown.target) == (best, "UNK")
    assert plain.grid == chosen.grid != unknown.grid
