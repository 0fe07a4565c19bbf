"""Fitting calibration.

The temperature recovers one that was put in; the rejector calls one known lesion in twenty unknown; conformal sets
hold the true class as often as promised, in each class by itself; and where there is too little to fit on, nothing is
pretended.
"""

import math

import numpy as np
import pytest
from scipy.special import softmax
from torch import nn

from handlers.calibration import Calibration
from training.evaluation.calibration_fit import MIN_IMAGES, fit_calibration, fit_conformal, fit_temperature
from training.evaluation.unknown_class_fit import KnownSpaceError, fit_rejection, known_space_of

CLASSES = ("MEL", "NV", "BCC")


def sample(n: int, seed: int, spread: float = 2.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a perfectly calibrated model (N, 3) and labels drawn from its probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (n, 3))
    labels = np.array([rng.choice(3, p=row) for row in softmax(logits, axis=1)])
    return logits, labels


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_temperature_is_recovered(temperature):
    logits, labels = sample(4000, seed=1)
    assert fit_temperature(temperature * logits, labels) == pytest.approx(temperature, rel=0.08)


def test_temperature_is_the_best_one():
    logits, labels = sample(500, seed=2)
    found = fit_temperature(3 * logits, labels)

    def nll(t: float) -> float:
        return -np.log(softmax(3 * logits / t, axis=1)[np.arange(500), labels]).mean()

    assert nll(found) <= min(nll(found * 1.05), nll(found / 1.05), nll(1.0))


def test_one_known_lesion_in_twenty_is_called_unknown():
    logits, _ = sample(2000, seed=3)
    rejection = fit_rejection(logits, temperature=1.5)
    p_unknown = rejection.probability(logits)
    nine = Calibration(1.5, rejection).probabilities(logits, CLASSES)
    assert (nine.argmax(1) == len(nine[0]) - 1).mean() == pytest.approx(0.05, abs=0.002)
    assert np.median(p_unknown) < 0.05  # the typical lesion is left alone
    assert rejection.probability(np.zeros((1, 3)) - 10)[0] > 0.99  # far below every known energy


def test_a_residual_lowers_familiarity_at_the_same_share_of_false_rejections():
    logits, _ = sample(2000, seed=3)
    residuals = np.random.default_rng(0).gamma(4.0, size=2000)
    rejection = fit_rejection(logits, 1.5, residuals, 0.7)
    nine = Calibration(1.5, rejection).probabilities(logits, CLASSES, residuals)
    assert (nine.argmax(1) == len(nine[0]) - 1).mean() == pytest.approx(0.05, abs=0.002)
    near, far = (rejection.probability(logits[:1], np.array([residual]))[0] for residual in (4.0, 40.0))
    assert near < 0.5 < 0.99 < far


def test_rejection_survives_logits_that_are_all_the_same():
    rejection = fit_rejection(np.ones((100, 3)))
    assert np.isfinite(rejection.probability(np.array([[1.0, 1, 1], [9, 9, 9], [-9, -9, -9]]))).all()


def test_conformal_sets_cover_the_truth_in_each_class():
    logits, labels = sample(1500, seed=4)
    conformal = fit_conformal(softmax(logits, axis=1), labels, CLASSES, 0.9)
    calibration = Calibration(conformal=conformal)
    fresh, truth = sample(6000, seed=5)
    sets = calibration.conformal_sets(fresh, CLASSES)
    inside = np.array([CLASSES[y] in chosen for y, chosen in zip(truth, sets, strict=True)])
    for k in range(3):
        # sd of the coverage: about sqrt(.09 / 500) from fitting and sqrt(.09 / 2000) from counting, 0.015 together
        assert inside[truth == k].mean() == pytest.approx(0.9, abs=0.045)
    assert 1 < np.mean([len(chosen) for chosen in sets]) < 2.9  # informative: neither always one nor always all


def test_threshold_is_the_finite_sample_quantile():
    probabilities = np.column_stack([np.linspace(0.99, 0.81, 19), np.zeros(19), np.zeros(19)])
    conformal = fit_conformal(probabilities, np.zeros(19, int), CLASSES, 0.9)
    # n = 19: k = ceil(20 * 0.9) = 18, the 18th smallest of 0.01, 0.02 ... 0.19
    assert conformal.thresholds["MEL"] == pytest.approx(0.18)


def test_a_class_with_too_few_images_is_in_every_set():
    """8 images cannot promise 90 %: k = ceil(9 * 0.9) = 9 > 8. Nine can: the largest score."""
    for n, expected in ((0, 1.0), (8, 1.0), (9, 0.7)):
        probabilities = np.full((n, 3), 0.3)
        conformal = fit_conformal(probabilities, np.zeros(n, int), CLASSES, 0.9)
        assert conformal.thresholds["MEL"] == pytest.approx(expected)
        assert conformal.thresholds["NV"] == 1.0


def test_classes_with_too_few_lesions_share_a_threshold():
    """Five and four are nine together: k = ceil(10 * 0.9) = 9, the largest score of both. The third has its own."""
    labels = np.repeat([0, 1, 2], [5, 4, 20])
    probabilities = np.full((29, 3), 0.5)
    probabilities[:5, 0], probabilities[5:9, 1] = np.linspace(0.9, 0.6, 5), np.linspace(0.8, 0.3, 4)
    thresholds = fit_conformal(probabilities, labels, CLASSES, 0.9).thresholds
    assert thresholds == pytest.approx({"MEL": 0.7, "NV": 0.7, "BCC": 0.5})
    fewer = fit_conformal(probabilities[1:], labels[1:], CLASSES, 0.9).thresholds
    assert fewer == pytest.approx({"MEL": 1.0, "NV": 1.0, "BCC": 0.5}), "eight are too few together"


def test_many_images_of_one_lesion_count_once():
    """Nine lesions with twenty images each: k = ceil(10 * 0.9) = 9, the largest of the lesions' largest scores."""
    scores = np.linspace(0.01, 0.9, 180)
    probabilities = np.column_stack([1 - scores, scores, np.zeros(180)])
    labels, lesions = np.zeros(180, int), np.array([f"l{number % 9}" for number in range(180)])
    assert fit_conformal(probabilities, labels, CLASSES, 0.9, lesions).thresholds["MEL"] == pytest.approx(0.9)
    few = lesions != "l0"
    conformal = fit_conformal(probabilities[few], labels[few], CLASSES, 0.9, lesions[few])
    assert conformal.thresholds["MEL"] == 1.0  # eight lesions, 160 images
    halves = fit_conformal(probabilities, labels, CLASSES, 0.5, lesions).thresholds["MEL"]
    assert halves == pytest.approx(np.sort([scores[lesions == lesion].max() for lesion in set(lesions)])[4])


def test_the_whole_fit():
    logits, labels = sample(1000, seed=6)
    each = np.arange(1000)
    assert fit_calibration(logits, labels, CLASSES, lesions=each) == fit_calibration(logits, labels, CLASSES)
    joined = fit_calibration(logits, labels, CLASSES, lesions=each // 2).conformal.thresholds
    assert all(joined[code] > fit_calibration(logits, labels, CLASSES).conformal.thresholds[code] for code in CLASSES)
    calibration = fit_calibration(2 * logits, labels, CLASSES, 0.9)
    assert calibration.temperature == pytest.approx(2, rel=0.15)
    assert calibration.rejection is not None
    assert set(calibration.conformal.thresholds) == set(CLASSES)
    # images of a class without a logit are left out, whatever their logits say
    odd = np.vstack([2 * logits, np.full((200, 3), 50.0)]), np.concatenate([labels, np.full(200, -1)])
    assert fit_calibration(*odd, CLASSES, 0.9) == calibration
    assert all(math.isfinite(value) for value in calibration.conformal.thresholds.values())


@pytest.mark.parametrize("n", [0, MIN_IMAGES - 1])
def test_too_few_images_give_the_identity(n):
    assert fit_calibration(np.zeros((n, 3)), np.zeros(n, int), CLASSES) == Calibration()


@pytest.mark.parametrize(
    ("head", "images", "reason"),
    [(nn.Linear(8, 3), 7, r"fewer validation images \(7\) than features \(8\)"),
     (nn.Sequential(nn.Linear(8, 3)), 99, "the head has hidden layers")],
)  # fmt: skip
def test_a_known_space_needs_a_linear_head_and_enough_images(head, images, reason):
    features = np.random.default_rng(0).normal(size=(99, 8))
    labels = np.where(np.arange(99) < images, 0, -1)
    with pytest.raises(KnownSpaceError, match=reason):
        known_space_of(head, features, np.zeros((99, 3)), labels)
