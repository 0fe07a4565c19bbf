"""Figures of merit, against hand-computed values and scikit-learn.

Classes without images are left out of averages, and intervals come from resampling lesions, not images.
"""

import json
import math

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import (
    balanced_accuracy_score,
    confusion_matrix,
    f1_score,
    log_loss,
    precision_recall_fscore_support,
    roc_auc_score,
    roc_curve,
)

from handlers.taxonomy import CODES, KNOWN_CODES
from mlflow_tracking import classification_metrics as metrics
from training.evaluation.evaluation_report import MIN_SLICE, build_report, conditional, headline, slices

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
    for average, ours in (("macro", metrics.macro_f1), ("weighted", metrics.weighted_f1)):
        assert ours(y, p) == pytest.approx(f1_score(y, p.argmax(1), average=average))
    assert metrics.confusion(y, p).tolist() == confusion_matrix(y, p.argmax(1)).tolist()
    table = metrics.per_class(y, p, list("abcde"))
    theirs = precision_recall_fscore_support(y, p.argmax(1))
    for name, values in zip(("precision", "recall", "f1", "support"), theirs, strict=True):
        assert [table[code][name] for code in "abcde"] == pytest.approx(values.tolist())


def test_curves_against_scikit_learn_with_ties(drawn):
    y, p = drawn
    for scores in (p[:, 0], np.round(p[:, 0], 1), np.zeros(len(y))):
        false_positive, sensitivity, _ = roc_curve(y == 0, scores, drop_intermediate=False)
        assert np.array(metrics.roc(y == 0, scores)) == pytest.approx(np.array([false_positive, sensitivity]))
        assert metrics.area_under_roc(y == 0, scores) == pytest.approx(roc_auc_score(y == 0, scores))


def test_figures_of_a_roc_curve_by_hand():
    # four of the class among five others; sensitivity .25, .5 | 1 other | .75, 1 | 1 other, ...
    is_class = np.array([1, 1, 0, 1, 1, 0, 0, 0, 0], bool)
    scores = np.arange(9, 0, -1) / 10
    assert metrics.auc_above_sensitivity(is_class, scores) == pytest.approx(0.8)
    assert metrics.specificity_at_sensitivity(is_class, scores) == pytest.approx(0.8)
    assert metrics.specificity_at_sensitivity(is_class, scores, 0.5) == 1
    assert metrics.auc_above_sensitivity(is_class, is_class.astype(float)) == pytest.approx(1)
    # chance: the triangle over the axis from .8 to 1 has the corners (.8, .8), (1, 1); its area to the axis is .18
    assert metrics.auc_above_sensitivity(is_class, np.zeros(9)) == pytest.approx(0.18)
    assert math.isnan(metrics.auc_above_sensitivity(np.ones(3, bool), np.zeros(3)))


def test_risk_by_coverage_by_hand():
    coverage, risk = metrics.risk_coverage(LABELS, PROBABILITIES)
    assert coverage.tolist() == [0.25, 0.5, 0.75, 1]
    assert risk.tolist() == [0, 0, 0, 0.25]  # the wrong one is the least sure
    assert metrics.area_under_risk_coverage(LABELS, PROBABILITIES) == pytest.approx(0.0625)


def test_detection_by_hand():
    known, unknown = np.linspace(0, 1, 101), np.array([2.0, 0.5])
    assert metrics.detection(known, unknown)["auroc"] == pytest.approx((1 + 0.5) / 2, abs=0.01)
    assert metrics.detection(known, unknown)["fpr_at_95"] == 0.5
    assert math.isnan(metrics.detection(known, np.array([]))["auroc"])


def test_per_class_by_hand():
    table = metrics.per_class(LABELS, PROBABILITIES, ["a", "b", "c"])
    assert table["a"]["precision"] == pytest.approx(2 / 3)
    assert table["a"]["specificity"] == pytest.approx(1 / 2)  # one of the two images of other classes was called a
    assert table["a"]["auc"] == pytest.approx(1.0)
    assert table["b"] == {
        "support": 1, "precision": None, "recall": 0, "f1": 0, "specificity": 1,
        "auc": 1, "auc_above_80": pytest.approx(1), "specificity_at_95": 1,
    }  # fmt: skip
    assert table["c"]["f1"] == 1


def test_a_class_without_images_is_left_out(drawn):
    y, p = drawn
    wider = np.column_stack([p, np.zeros(len(p))])  # a sixth class that is neither there nor ever predicted
    ours, theirs = metrics.summary(y, wider), metrics.summary(y, p)
    assert ours == pytest.approx(theirs)
    entry = metrics.per_class(y, wider, list("abcdef"))["f"]
    assert entry["support"] == 0
    assert entry["recall"] is entry["f1"] is entry["auc"] is None
    only_one, sure = np.zeros(10, int), np.tile([0.7, 0.3], (10, 1))
    assert math.isnan(metrics.macro_auc(only_one, sure))
    table = metrics.report(only_one, sure, ["a", "b"], np.arange(10), resamples=5)
    json.dumps(table, allow_nan=False)
    assert "macro_auc" not in table["intervals_95"]
    assert table["intervals_95"]["accuracy"] == (1.0, 1.0)


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


def test_the_interval_of_the_calibration_error_holds_it():
    """Of a perfectly calibrated model, whose resamplings are nearly all further from calibration than its answers."""
    rng = np.random.default_rng(4)
    p = rng.dirichlet([0.5] * 4, 300)
    y = (p.cumsum(1) > rng.random((300, 1))).argmax(1)
    error = metrics.expected_calibration_error(y, p)
    draws = [metrics.expected_calibration_error(y[i], p[i]) for i in metrics.resampled(np.arange(300), 300)]
    assert metrics.interval(draws)[0] > error
    low, high = metrics.bootstrap(y, p, np.arange(300), 300)["ece"]
    assert 0 <= low < error < high
    assert high - low == pytest.approx(np.diff(metrics.interval(draws))[0], rel=0.01)


def by_lesion_and_image(figure):
    """Widths of the interval that `figure(copies, lesions)` gives where a lesion has nine copies of its image."""
    low_high = figure(9, np.repeat(np.arange(400), 9)), figure(9, np.arange(9 * 400)), figure(1, np.arange(400))
    return [high - low for low, high in low_high]


@pytest.mark.parametrize("name", ["recall", "balanced_accuracy_9", "rejected", "conformal_coverage", "slice"])
def test_every_interval_is_of_lesions(drawn, name):
    y = drawn[0]
    p = np.zeros((len(y), len(CODES)))
    p[:, [0, 1, 2, 3, len(CODES) - 1]] = drawn[1]

    def figure(copies, lesions):
        nine, codes = np.repeat(p, copies, axis=0), [KNOWN_CODES[k % 4] for k in np.repeat(y, copies)]
        if name == "slice":
            rows = pd.DataFrame({"label": codes, "lesion_id": lesions, "source": "x", "site": "", "sex": "", "age": 50})
            return slices(rows, nine, 60)["source"]["x"]["intervals_95"]["accuracy"]
        sets = [[CODES[row.argmax()]] for row in nine]
        table = build_report(codes, nine, sets, lesions, 60)
        return table["per_class_intervals_95"]["MEL"]["recall"] if name == "recall" else table["intervals_95"][name]

    lesions, images, single = by_lesion_and_image(figure)
    assert lesions == pytest.approx(single, rel=0.01)
    assert 2 < lesions / images < 4.5


def test_every_headline_has_an_interval_that_holds_it(drawn):
    y, p = drawn
    nine = np.zeros((len(y), len(CODES)))
    nine[:, [0, 1, 2, 3, len(CODES) - 1]] = p
    codes = [[*KNOWN_CODES[:4], "UNK"][k] for k in y]
    sets = [[CODES[k] for k in np.argsort(-row)[:2]] for row in nine]
    table = build_report(codes, nine, sets, np.arange(len(y)), 100)
    assert set(headline(table)) == set(table["intervals_95"])
    for name, value in headline(table).items():
        low, high = table["intervals_95"][name]
        assert low <= value <= high, name
    apart = build_report(codes, nine, sets, np.arange(len(y)), 20, with_unknown=False)
    assert set(headline(table)) - set(headline(apart)) == {
        "rejected", "balanced_accuracy_9", "unknown_auroc", "unknown_fpr_at_95", "unknown_called_malignant",
        "as_served_accuracy", "as_served_malignant_missed",
    }  # fmt: skip
    json.dumps(table, allow_nan=False)


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
    table = build_report(["MEL", "NV", "BCC", "UNK"], probabilities, sets, ["a", "b", "c", "d"], 50)
    assert table["images"] == 3  # the UNK image is no lesion to be classified
    assert table["summary"]["accuracy"] == 1
    assert table["rejected"] == pytest.approx(1 / 3)
    assert table["balanced_accuracy_9"] == pytest.approx(3 / 4)  # MEL was called UNK; NV, BCC and UNK are right
    # of MEL and BCC, both malignant, the first was called UNK
    assert table["as_served"] == {
        "accuracy": pytest.approx(2 / 3), "recall": {"MEL": 0, "NV": 1, "BCC": 1}, "malignant_missed": 0.5,
    }  # fmt: skip
    assert "malignant_missed" not in build_report(["NV"], probabilities[1:2], None, ["b"])["as_served"]
    assert table["unknown"] == {
        "images": 1, "auroc": 1, "fpr_at_95": 0, "recall": 1, "called_malignant": 0,
    }  # fmt: skip
    assert table["conformal"]["coverage"] == pytest.approx(2 / 3)
    assert table["conformal"]["mean_size"] == pytest.approx(4 / 3)
    assert table["conformal"]["coverage_per_class"] == {"MEL": 1, "NV": 1, "BCC": 0}
    json.dumps(table, allow_nan=False)
    assert headline(table)["conformal_coverage"] == pytest.approx(2 / 3)


def test_slices_are_of_known_lesions_and_small_ones_have_no_figures():
    n = 2 * MIN_SLICE
    rows = pd.DataFrame(
        {
            "label": ["MEL", "NV"] * MIN_SLICE + ["UNK"],
            "lesion_id": [f"l{i}" for i in range(n + 1)],
            "source": "ham10000",
            "site": "",
            "sex": ["male"] * (n - 3) + ["female"] * 4,
            "age": [25.0, 85.0] * MIN_SLICE + [float("nan")],
        }
    )
    probabilities = np.array([nine({"MEL": 0.6, "NV": 0.4})[0]] * (n + 1))
    table = slices(rows, probabilities, 20)
    assert table["source"]["ham10000"]["images"] == n
    assert table["source"]["ham10000"]["accuracy"] == 0.5
    low, high = table["source"]["ham10000"]["intervals_95"]["accuracy"]
    assert low < 0.5 < high
    assert list(table["site"]) == ["not recorded"]
    assert table["sex"]["female"] == {"images": 3, "lesions": 3, "classes": 2}
    assert list(table["age"]) == ["under 30", "70 and over"]
    assert table["age"]["under 30"]["accuracy"] == 1
    assert table["age"]["under 30"]["macro_auc"] is None  # one class only
    json.dumps(table, allow_nan=False)


def test_the_probability_of_unk_is_shared_out_again():
    assert conditional(nine({"MEL": 0.3, "NV": 0.1, "UNK": 0.6}))[0, :2] == pytest.approx([0.75, 0.25])
    assert conditional(nine({"UNK": 1.0})).sum() == pytest.approx(1.0)
    assert conditional(nine({"UNK": 1.0})).shape == (1, len(KNOWN_CODES))
