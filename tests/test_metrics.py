"""Figures of merit, against hand-computed values and scikit-learn.

Classes without images are left out of averages, and intervals come from resampling lesions, not images.
"""

import json
import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score

from handlers.taxonomy import CODES, KNOWN_CODES
from training import metrics
from training.evaluate import assess, conditional, headline

# Four images, three classes: right, right, wrong (0 for 1), right.
LABELS = np.array([0, 0, 1, 2])
PROBABILITIES = np.array([[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6]])


@pytest.fixture(scope="module")
def drawn():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 400)
    logits = rng.normal(size=(400, 5)) + 1.5 * np.eye(5)[labels]
    return labels, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def test_by_hand():
    assert metrics.accuracy(LABELS, PROBABILITIES) == 0.75
    assert metrics.recalls(LABELS, PROBABILITIES).tolist() == [1, 0, 1]
    assert metrics.balanced_accuracy(LABELS, PROBABILITIES) == pytest.approx(2 / 3)
    # F1: class 0 has precision 2/3 and recall 1, class 1 nothing, class 2 all
    assert metrics.macro_f1(LABELS, PROBABILITIES) == pytest.approx((0.8 + 0 + 1) / 3)
    assert metrics.weighted_f1(LABELS, PROBABILITIES) == pytest.approx((2 * 0.8 + 0 + 1) / 4)
    assert metrics.nll(LABELS, PROBABILITIES) == pytest.approx(-np.log([0.8, 0.6, 0.4, 0.6]).mean())
    squares = [0.2**2 + 2 * 0.1**2, 0.4**2 + 0.3**2 + 0.1**2, 0.5**2 + 0.6**2 + 0.1**2, 2 * 0.2**2 + 0.4**2]
    assert metrics.brier(LABELS, PROBABILITIES) == pytest.approx(np.mean(squares))
    assert metrics.confusion(LABELS, PROBABILITIES).tolist() == [[2, 0, 0], [1, 0, 0], [0, 0, 1]]


def test_calibration_error_by_hand():
    # Two bins of [0, 0.5) and [0.5, 1]: all four images are in the upper one: confidence 0.625, accuracy 0.75.
    assert metrics.expected_calibration_error(LABELS, PROBABILITIES, bins=2) == pytest.approx(0.125)
    # With five, [0.4, 0.6) holds one wrong image at 0.5; [0.6, 0.8) two right ones at 0.6; [0.8, 1] a right one at 0.8.
    expected = (1 * 0.5 + 2 * 0.4 + 1 * 0.2) / 4
    assert metrics.expected_calibration_error(LABELS, PROBABILITIES, bins=5) == pytest.approx(expected)
    count, confidence, right = metrics.reliability(LABELS, PROBABILITIES, bins=5).T
    assert count.tolist() == [0, 0, 1, 2, 1]
    assert confidence[2:].tolist() == pytest.approx([0.5, 0.6, 0.8])
    assert right[2:].tolist() == [0, 1, 1]
    assert np.isnan(confidence[:2]).all()


def test_certainty_falls_into_the_last_bin():
    assert metrics.expected_calibration_error(np.array([0, 1]), np.eye(2)) == 0


def test_against_scikit_learn(drawn):
    y, p = drawn
    assert metrics.balanced_accuracy(y, p) == pytest.approx(balanced_accuracy_score(y, p.argmax(1)))
    assert metrics.nll(y, p) == pytest.approx(log_loss(y, p))
    assert metrics.macro_auc(y, p) == pytest.approx(roc_auc_score(y, p, multi_class="ovr", average="macro"))


def test_per_class_by_hand():
    table = metrics.per_class(LABELS, PROBABILITIES, ["a", "b", "c"])
    assert table["a"]["precision"] == pytest.approx(2 / 3)
    assert table["a"]["specificity"] == pytest.approx(1 / 2)  # one of the two images of other classes was called a
    assert table["a"]["auc"] == pytest.approx(1.0)
    assert table["b"] == {"support": 1, "precision": None, "recall": 0, "f1": 0, "specificity": 1, "auc": 1.0}
    assert table["c"]["f1"] == 1


def test_a_class_without_images_is_left_out(drawn):
    y, p = drawn
    wider = np.column_stack([p, np.zeros(len(p))])  # a sixth class that is neither there nor ever predicted
    ours, theirs = metrics.summary(y, wider), metrics.summary(y, p)
    assert ours == pytest.approx(theirs)
    entry = metrics.per_class(y, wider, list("abcdef"))["f"]
    assert entry["support"] == 0
    assert entry["recall"] is entry["f1"] is entry["auc"] is None
    only_one = np.zeros(10, int)
    assert math.isnan(metrics.macro_auc(only_one, np.tile([0.7, 0.3], (10, 1))))


def test_intervals_are_wider_for_lesions_with_many_images(drawn):
    """Nine copies of every image add no knowledge: by lesion the interval stays, by image it would shrink threefold."""
    y, p = drawn
    nine_y, nine_p = np.repeat(y, 9), np.repeat(p, 9, axis=0)
    width = {}
    for name, groups in {"lesions": np.repeat(np.arange(len(y)), 9), "images": np.arange(len(nine_y))}.items():
        low, high = metrics.bootstrap(nine_y, nine_p, groups, 200, metrics=["accuracy"])["accuracy"]
        assert low < metrics.accuracy(y, p) < high
        width[name] = high - low
    assert 2.3 < width["lesions"] / width["images"] < 3.9
    # and by lesion it is that of the binomial: 2 * 1.96 * sqrt(a (1 - a) / n)
    a = metrics.accuracy(y, p)
    assert width["lesions"] == pytest.approx(3.92 * math.sqrt(a * (1 - a) / len(y)), rel=0.25)


def test_bootstrap_is_repeatable(drawn):
    y, p = drawn
    first, second = (metrics.bootstrap(y, p, np.arange(len(y)), 20, seed=3) for _ in range(2))
    assert first == second
    assert set(first) == set(metrics.SUMMARY)


# ---- what evaluation adds: nine probabilities, rejection, conformal sets


def nine(*rows: dict[str, float]) -> np.ndarray:
    return np.array([[row.get(code, 0.0) for code in CODES] for row in rows])


def test_known_lesions_are_judged_among_known_classes_and_their_rejection_apart():
    probabilities = nine({"MEL": 0.3, "NV": 0.1, "UNK": 0.6}, {"NV": 0.9, "UNK": 0.1}, {"BCC": 1.0}, {"UNK": 1.0})
    sets = [["UNK", "MEL"], ["NV"], ["NV"], ["UNK"]]
    table = assess(["MEL", "NV", "BCC", "UNK"], probabilities, sets, ["a", "b", "c", "d"])
    assert table["images"] == 3  # the UNK image is no lesion to be classified
    assert table["summary"]["accuracy"] == 1
    assert table["rejected"] == pytest.approx(1 / 3)
    assert table["balanced_accuracy_9"] == pytest.approx(2 / 3)
    assert table["conformal"]["coverage"] == pytest.approx(2 / 3)
    assert table["conformal"]["mean_size"] == pytest.approx(4 / 3)
    assert table["conformal"]["coverage_per_class"] == {"MEL": 1, "NV": 1, "BCC": 0}
    json.dumps(table, allow_nan=False)
    assert headline(table)["conformal_coverage"] == pytest.approx(2 / 3)


def test_the_probability_of_unk_is_shared_out_again():
    assert conditional(nine({"MEL": 0.3, "NV": 0.1, "UNK": 0.6}))[0, :2] == pytest.approx([0.75, 0.25])
    assert conditional(nine({"UNK": 1.0})).sum() == pytest.approx(1.0)
    assert conditional(nine({"UNK": 1.0})).shape == (1, len(KNOWN_CODES))
