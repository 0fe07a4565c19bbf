"""Figures of merit from labels and probabilities, in numpy only, because gates and training share them.

The tests compare them with scikit-learn, which is too slow for a bootstrap because it checks its arguments every time.

`labels` are int (N,) indices into `classes`. `probabilities` are float (N, K) with rows summing to 1. The predicted
class is the most probable one. A class without images has no recall, F1 or AUC: averages over classes leave it out, and
its own entry is None.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Labels = NDArray[np.int64]
Probabilities = NDArray[np.float64]

ECE_BINS = 15  # equal widths, as in Guo et al. 2017
TINY = 1e-12  # the smallest probability in a logarithm
HIGH_SENSITIVITY = 0.8  # the ISIC challenges' "AUC, sensitivity > 80 %"
SCREENING_SENSITIVITY = 0.95  # the sensitivity at which specificity is reported


def accuracy(labels: Labels, probabilities: Probabilities) -> float:
    """Return the share of images whose most probable class is right."""
    return float(np.mean(probabilities.argmax(1) == labels))


def recalls(labels: Labels, probabilities: Probabilities) -> NDArray[np.float64]:
    """Return the recall of each class (K,); NaN for a class without images."""
    classes = probabilities.shape[1]
    total = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[probabilities.argmax(1) == labels], minlength=classes)
    return np.divide(right, total, out=np.full(classes, np.nan), where=total > 0)


def balanced_accuracy(labels: Labels, probabilities: Probabilities) -> float:
    """Return the mean recall of the classes that have images, the ranking metric of the ISIC 2019 challenge."""
    return float(np.nanmean(recalls(labels, probabilities)))


def macro_f1(labels: Labels, probabilities: Probabilities) -> float:
    """Return the unweighted mean F1 of the classes that have images."""
    return float(np.nanmean(f1_scores(confusion(labels, probabilities))))


def weighted_f1(labels: Labels, probabilities: Probabilities) -> float:
    """Return the mean F1 weighted by the number of images of each class."""
    table = confusion(labels, probabilities)
    support = table.sum(1)
    return float(f1_scores(table)[support > 0] @ support[support > 0] / support.sum())


def f1_scores(table: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return F1 of each class (K,) from a confusion matrix (K, K); NaN for a class without images."""
    support, called = table.sum(1), table.sum(0)
    return _share(2 * np.diag(table), np.where(support > 0, support + called, 0))


def roc(is_class: NDArray[np.bool_], scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return false positive rate and sensitivity (P,) by threshold, from (0, 0) to (1, 1).

    Both kinds of images must occur.
    """
    order = np.argsort(-scores, kind="stable")
    ranked, true_positives = scores[order], np.cumsum(is_class[order])
    last_of_tie = np.append(np.flatnonzero(np.diff(ranked)), len(ranked) - 1)
    sensitivity = true_positives[last_of_tie] / true_positives[-1]
    false_positive = (last_of_tie + 1 - true_positives[last_of_tie]) / (len(ranked) - true_positives[-1])
    return np.append(0.0, false_positive), np.append(0.0, sensitivity)


def area_under_roc(is_class: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """Return the area under the ROC curve; NaN without both kinds."""
    if is_class.all() or not is_class.any():
        return float("nan")
    false_positive, sensitivity = roc(is_class, scores)
    return float(np.trapezoid(sensitivity, false_positive))


def aucs(labels: Labels, probabilities: Probabilities) -> NDArray[np.float64]:
    """Return the AUC of each class against the rest (K,); NaN for a class that no image or every image has."""
    return np.array([area_under_roc(labels == k, probabilities[:, k]) for k in range(probabilities.shape[1])])


def macro_auc(labels: Labels, probabilities: Probabilities) -> float:
    """Return the unweighted mean of the one-against-rest AUCs that exist; NaN if none does."""
    values = aucs(labels, probabilities)
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def auc_above_sensitivity(is_class: NDArray[np.bool_], scores: NDArray[np.float64]) -> float:
    """Return the area under the part of the ROC curve above HIGH_SENSITIVITY, down to the axis; NaN without both kinds.

    As in the ISIC 2019 challenge's scorer (isic-challenge-scoring, `auc_above_sensitivity`).
    """
    if is_class.all() or not is_class.any():
        return float("nan")
    false_positive, sensitivity = roc(is_class, scores)
    first = int(np.searchsorted(sensitivity, HIGH_SENSITIVITY))
    straddling = np.s_[first - 1 : first + 1]
    start = np.interp(HIGH_SENSITIVITY, sensitivity[straddling], false_positive[straddling])
    return float(
        np.trapezoid(np.append(HIGH_SENSITIVITY, sensitivity[first:]), np.append(start, false_positive[first:]))
    )


def specificity_at_sensitivity(
    is_class: NDArray[np.bool_], scores: NDArray[np.float64], sensitivity: float = SCREENING_SENSITIVITY
) -> float:
    """Return the best specificity of a threshold with at least this sensitivity; NaN without both kinds."""
    if is_class.all() or not is_class.any():
        return float("nan")
    false_positive, sensitivities = roc(is_class, scores)
    return float(1 - false_positive[np.searchsorted(sensitivities, sensitivity)])


def risk_coverage(labels: Labels, probabilities: Probabilities) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return coverage (N,) and risk (N,): the error rate among the most confident 1, 2, ..., N images."""
    wrong = (probabilities.argmax(1) != labels)[np.argsort(-probabilities.max(1), kind="stable")]
    count = np.arange(1, len(wrong) + 1)
    return count / len(wrong), np.cumsum(wrong) / count


def area_under_risk_coverage(labels: Labels, probabilities: Probabilities) -> float:
    """Return the mean risk over all coverages, lower is better (AURC; Geifman, Uziel & El-Yaniv 2019)."""
    return float(risk_coverage(labels, probabilities)[1].mean())


def detection(known_scores: NDArray[np.float64], unknown_scores: NDArray[np.float64]) -> dict[str, float]:
    """Return how well out-of-distribution scores, high for unknown images, separate known (N,) from unknown (M,).

    `auroc`, and `fpr_at_95`: the share of unknown images accepted at the threshold that accepts 95 % of the known ones
    (Hendrycks & Gimpel 2017). NaN if either is empty.
    """
    if not len(known_scores) or not len(unknown_scores):
        return {"auroc": float("nan"), "fpr_at_95": float("nan")}
    is_unknown = np.repeat([False, True], [len(known_scores), len(unknown_scores)])
    return {
        "auroc": area_under_roc(is_unknown, np.concatenate([known_scores, unknown_scores])),
        "fpr_at_95": float((unknown_scores <= np.quantile(known_scores, 0.95)).mean()),
    }


def nll(labels: Labels, probabilities: Probabilities) -> float:
    """Return the mean negative log-likelihood of the true class, in nats."""
    right = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(right, TINY)).mean())


def brier(labels: Labels, probabilities: Probabilities) -> float:
    """Return the multi-class Brier score, from 0 (perfect) to 2: mean squared distance to the one-hot truth."""
    truth = np.eye(probabilities.shape[1])[labels]
    return float(((probabilities - truth) ** 2).sum(1).mean())


def reliability(labels: Labels, probabilities: Probabilities, bins: int = ECE_BINS) -> NDArray[np.float64]:
    """Return (images, mean confidence, accuracy) of bins of equal width (bins, 3); NaN where a bin is empty."""
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    place = np.clip((confidence * bins).astype(int), 0, bins - 1)
    count = np.bincount(place, minlength=bins).astype(float)
    with np.errstate(invalid="ignore"):
        means = (np.bincount(place, weights, bins) / count for weights in (confidence, right.astype(float)))
        return np.column_stack([count, *means])


def expected_calibration_error(labels: Labels, probabilities: Probabilities, bins: int = ECE_BINS) -> float:
    """Return the mean gap of confidence and accuracy, weighted by images (Naeini et al. 2015; Guo et al. 2017)."""
    count, confidence, right = reliability(labels, probabilities, bins).T
    return float(np.nansum(count * np.abs(confidence - right)) / len(labels))


SUMMARY: dict[str, Callable[[Labels, Probabilities], float]] = {
    "accuracy": accuracy,
    "balanced_accuracy": balanced_accuracy,
    "macro_f1": macro_f1,
    "weighted_f1": weighted_f1,
    "macro_auc": macro_auc,
    "ece": expected_calibration_error,
    "brier": brier,
    "nll": nll,
    "aurc": area_under_risk_coverage,
}


def summary(labels: ArrayLike, probabilities: ArrayLike) -> dict[str, float]:
    """Return the figures of SUMMARY by name."""
    y, p = np.asarray(labels, np.int64), np.asarray(probabilities, np.float64)
    return {name: metric(y, p) for name, metric in SUMMARY.items()}


def per_class(labels: ArrayLike, probabilities: ArrayLike, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return figures of each class by code; None where undefined.

    Support, precision, recall, F1, specificity, AUC, AUC above 80 % sensitivity, specificity at 95 % sensitivity.
    """
    y, p = np.asarray(labels, np.int64), np.asarray(probabilities, np.float64)
    table = confusion(y, p)
    right, support, called = np.diag(table), table.sum(1), table.sum(0)

    columns: dict[str, ArrayLike] = {
        "precision": _share(right, called),
        "recall": _share(right, support),
        "f1": f1_scores(table),
        "specificity": 1 - _share(called - right, len(y) - support),
        "auc": aucs(y, p),
        "auc_above_80": [auc_above_sensitivity(y == k, p[:, k]) for k in range(len(classes))],
        "specificity_at_95": [specificity_at_sensitivity(y == k, p[:, k]) for k in range(len(classes))],
    }
    return {
        code: {"support": int(support[k])} | {name: _or_none(np.asarray(values)[k]) for name, values in columns.items()}
        for k, code in enumerate(classes)
    }


def confusion(labels: ArrayLike, probabilities: ArrayLike) -> NDArray[np.int64]:
    """Return the confusion matrix (K, K): rows are true classes, columns predicted classes."""
    y, p = np.asarray(labels, np.int64), np.asarray(probabilities)
    classes = p.shape[1]
    return np.bincount(y * classes + p.argmax(1), minlength=classes * classes).reshape(classes, classes)


def bootstrap(
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: ArrayLike,
    resamples: int = 1000,
    seed: int = 0,
    metrics: Sequence[str] = tuple(SUMMARY),
) -> dict[str, tuple[float, float]]:
    """Return 95 % percentile intervals of summary figures from a cluster bootstrap over lesions.

    Images of one lesion are not independent, so resampling images would give too narrow intervals (Davison & Hinkley
    1997, section 3.8). A resampling has noisier bins and thus a larger calibration error. Its draws are shifted down by
    that bias, their mean minus the estimate (section 2.1), but not below 0. A figure that no draw has is left out.

    Args:
        groups: the lesion of each image (N,).
        metrics: names out of SUMMARY.
    """
    y, p = np.asarray(labels, np.int64), np.asarray(probabilities, np.float64)
    draws: dict[str, list[float]] = {name: [] for name in metrics}
    for chosen in resampled(groups, resamples, seed):
        for name in metrics:
            draws[name].append(SUMMARY[name](y[chosen], p[chosen]))
    if "ece" in draws:
        bias = float(np.mean(draws["ece"])) - expected_calibration_error(y, p)
        draws["ece"] = [max(draw - bias, 0.0) for draw in draws["ece"]]
    return {name: interval(values) for name, values in draws.items() if np.isfinite(values).any()}


def bootstrap_per_class(
    labels: ArrayLike,
    probabilities: ArrayLike,
    classes: Sequence[str],
    groups: ArrayLike,
    resamples: int = 1000,
) -> dict[str, dict[str, tuple[float, float] | None]]:
    """Return 95 % intervals of the figures of `per_class` from the same bootstrap; None where undefined."""
    y, p = np.asarray(labels, np.int64), np.asarray(probabilities, np.float64)
    draws = [per_class(y[chosen], p[chosen], classes) for chosen in resampled(groups, resamples)]
    figures = [name for name in draws[0][classes[0]] if name != "support"]
    intervals: dict[str, dict[str, tuple[float, float] | None]] = {}
    for code in classes:
        values = {name: [draw[code][name] for draw in draws if draw[code][name] is not None] for name in figures}
        intervals[code] = {name: interval(drawn) if drawn else None for name, drawn in values.items()}
    return intervals


def resampled(groups: ArrayLike, resamples: int, seed: int = 0) -> Iterator[NDArray[np.int64]]:
    """Yield indices of each resampling: whole groups, drawn with replacement, as many as there are."""
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    order, sizes = np.argsort(member, kind="stable"), np.bincount(member)
    by_group = np.split(order, np.cumsum(sizes)[:-1])
    rng = np.random.default_rng(seed)
    for _ in range(resamples):
        drawn = rng.integers(len(by_group), size=len(by_group))
        # Groups of one picture, the usual case, need no list.
        yield order[drawn] if len(order) == len(sizes) else np.concatenate([by_group[i] for i in drawn])


def interval(draws: Sequence[float] | NDArray[np.float64]) -> tuple[float, float]:
    """Return the middle 95 % of bootstrap draws."""
    return float(np.nanquantile(draws, 0.025)), float(np.nanquantile(draws, 0.975))


def group_means(values: ArrayLike, groups: ArrayLike) -> NDArray[np.float64]:
    """Return the mean of the values (N,) of each group, in the order of the sorted groups; empty without values."""
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    return np.asarray(np.bincount(member, np.asarray(values, np.float64)) / np.maximum(np.bincount(member), 1))


def bootstrap_means(values: NDArray[np.float64], resamples: int, seed: int = 0) -> NDArray[np.float64]:
    """Return the means (resamples,) of bootstrap samples of independent values (N,)."""
    rng = np.random.default_rng(seed)
    return np.array([rng.choice(values, len(values)).mean() for _ in range(resamples)])


def report(
    labels: ArrayLike, probabilities: ArrayLike, classes: Sequence[str], groups: ArrayLike, resamples: int = 0
) -> dict[str, Any]:
    """Return counts, summary, figures of each class, confusion matrix and intervals as a JSON-able table."""
    return {
        "images": len(np.asarray(labels)),
        "lesions": len(np.unique(np.asarray(groups))),
        "classes": list(classes),
        "summary": {name: _or_none(value) for name, value in summary(labels, probabilities).items()},
        "intervals_95": bootstrap(labels, probabilities, groups, resamples) if resamples else {},
        "per_class": per_class(labels, probabilities, classes),
        "per_class_intervals_95": (
            bootstrap_per_class(labels, probabilities, classes, groups, resamples) if resamples else {}
        ),
        "confusion": confusion(labels, probabilities).tolist(),
    }


def _share(part: NDArray[np.int64], whole: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.full(len(whole), np.nan), where=whole > 0)


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
