"""Figures of merit from labels and probabilities; numpy and scikit-learn only, so that promotion can use them.

Throughout, `labels` are int (N,) indices into `classes`, `probabilities` float (N, K) with rows summing to 1, and the
predicted class is the most probable one. A class without images in `labels` has no recall, F1 or AUC: it is left out
of the averages over classes, and its own entry is None.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support, roc_auc_score

Labels = NDArray[np.int64]
Probabilities = NDArray[np.float64]

ECE_BINS = 15  # equal widths, as in Guo et al. 2017
TINY = 1e-12  # the floor under a probability before its logarithm


def accuracy(labels: Labels, probabilities: Probabilities) -> float:
    """Share of images whose most probable class is the right one."""
    return float(np.mean(probabilities.argmax(1) == labels))


def recalls(labels: Labels, probabilities: Probabilities) -> NDArray[np.float64]:
    """Recall of each class (K,); nan for a class without images."""
    classes = probabilities.shape[1]
    total = np.bincount(labels, minlength=classes)
    right = np.bincount(labels[probabilities.argmax(1) == labels], minlength=classes)
    return np.divide(right, total, out=np.full(classes, np.nan), where=total > 0)


def balanced_accuracy(labels: Labels, probabilities: Probabilities) -> float:
    """Mean recall of the classes that have images: the ISIC 2019 challenge's ranking metric."""
    return float(np.nanmean(recalls(labels, probabilities)))


def macro_f1(labels: Labels, probabilities: Probabilities) -> float:
    """Unweighted mean F1 of the classes that have images."""
    return float(f1_score(labels, probabilities.argmax(1), labels=np.unique(labels), average="macro", zero_division=0))


def weighted_f1(labels: Labels, probabilities: Probabilities) -> float:
    """Mean F1 weighted by the number of images of each class."""
    return float(
        f1_score(labels, probabilities.argmax(1), labels=np.unique(labels), average="weighted", zero_division=0)
    )


def aucs(labels: Labels, probabilities: Probabilities) -> NDArray[np.float64]:
    """Area under the ROC curve of each class against the rest (K,); nan for a class with no images or nothing else."""
    values = np.full(probabilities.shape[1], np.nan)
    for k in range(len(values)):
        is_k = labels == k
        if is_k.any() and not is_k.all():
            values[k] = roc_auc_score(is_k, probabilities[:, k])
    return values


def macro_auc(labels: Labels, probabilities: Probabilities) -> float:
    """Unweighted mean of the one-against-rest AUCs that exist; nan if none does."""
    values = aucs(labels, probabilities)
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def nll(labels: Labels, probabilities: Probabilities) -> float:
    """Mean negative log-likelihood of the right class, in nats."""
    right = probabilities[np.arange(len(labels)), labels]
    return float(-np.log(np.maximum(right, TINY)).mean())


def brier(labels: Labels, probabilities: Probabilities) -> float:
    """Brier score in its multi-class form, from 0 (perfect) to 2: mean squared distance to the one-hot truth."""
    truth = np.eye(probabilities.shape[1])[labels]
    return float(((probabilities - truth) ** 2).sum(1).mean())


def reliability(labels: Labels, probabilities: Probabilities, bins: int = ECE_BINS) -> NDArray[np.float64]:
    """Per confidence bin of equal width: (images, mean confidence, accuracy), (bins, 3); nan where a bin is empty."""
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == labels
    place = np.clip((confidence * bins).astype(int), 0, bins - 1)
    count = np.bincount(place, minlength=bins).astype(float)
    with np.errstate(invalid="ignore"):
        means = (np.bincount(place, weights, bins) / count for weights in (confidence, right.astype(float)))
        return np.column_stack([count, *means])


def expected_calibration_error(labels: Labels, probabilities: Probabilities, bins: int = ECE_BINS) -> float:
    """Mean gap between confidence and accuracy, bins weighted by their images (Naeini et al. 2015; Guo et al. 2017)."""
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
}


def summary(labels: ArrayLike, probabilities: ArrayLike) -> dict[str, float]:
    """All the single figures, by name."""
    y, p = np.asarray(labels, np.int64), np.asarray(probabilities, np.float64)
    return {name: metric(y, p) for name, metric in SUMMARY.items()}


def per_class(labels: ArrayLike, probabilities: ArrayLike, classes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Support, precision, recall, F1, specificity and AUC of each class, by code; None where undefined."""
    y, p = np.asarray(labels, np.int64), np.asarray(probabilities, np.float64)
    table = confusion(y, p)
    precision, recall, f1, support = precision_recall_fscore_support(
        y, p.argmax(1), labels=range(len(classes)), zero_division=np.nan
    )
    false_positive, negative = table.sum(0) - np.diag(table), table.sum() - table.sum(1)
    specificity = 1 - np.divide(false_positive, negative, out=np.full(len(classes), np.nan), where=negative > 0)
    recall = np.where(support > 0, recall, np.nan)
    f1 = np.where(support > 0, np.nan_to_num(f1), np.nan)
    columns = {"precision": precision, "recall": recall, "f1": f1, "specificity": specificity, "auc": aucs(y, p)}
    return {
        code: {"support": int(support[k])} | {name: _or_none(values[k]) for name, values in columns.items()}
        for k, code in enumerate(classes)
    }


def confusion(labels: ArrayLike, probabilities: ArrayLike) -> NDArray[np.int64]:
    """Confusion matrix (K, K): rows are the truth, columns the predicted class."""
    p = np.asarray(probabilities)
    table: NDArray[np.int64] = confusion_matrix(labels, p.argmax(1), labels=range(p.shape[1]))
    return table


def bootstrap(
    labels: ArrayLike,
    probabilities: ArrayLike,
    groups: ArrayLike,
    resamples: int = 1000,
    seed: int = 0,
    metrics: Sequence[str] = tuple(SUMMARY),
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of the summary figures, resampling lesions (all their images together), not images.

    Images of one lesion are not independent; resampling images would make the intervals too narrow (cluster bootstrap,
    Davison & Hinkley 1997, section 3.8).
    """
    y, p = np.asarray(labels, np.int64), np.asarray(probabilities, np.float64)
    _, member = np.unique(np.asarray(groups), return_inverse=True)
    by_group = np.split(np.argsort(member, kind="stable"), np.cumsum(np.bincount(member))[:-1])
    rng = np.random.default_rng(seed)
    draws: dict[str, list[float]] = {name: [] for name in metrics}
    for _ in range(resamples):
        chosen = np.concatenate([by_group[i] for i in rng.integers(len(by_group), size=len(by_group))])
        for name in metrics:
            draws[name].append(SUMMARY[name](y[chosen], p[chosen]))
    return {
        name: (float(np.nanquantile(values, 0.025)), float(np.nanquantile(values, 0.975)))
        for name, values in draws.items()
    }


def report(
    labels: ArrayLike, probabilities: ArrayLike, classes: Sequence[str], groups: ArrayLike, resamples: int = 0
) -> dict[str, Any]:
    """Everything above as one JSON-able table: counts, summary, intervals, per class, confusion matrix."""
    return {
        "images": len(np.asarray(labels)),
        "lesions": len(np.unique(np.asarray(groups))),
        "classes": list(classes),
        "summary": {name: _or_none(value) for name, value in summary(labels, probabilities).items()},
        "intervals_95": bootstrap(labels, probabilities, groups, resamples) if resamples else {},
        "per_class": per_class(labels, probabilities, classes),
        "confusion": confusion(labels, probabilities).tolist(),
    }


def _or_none(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
