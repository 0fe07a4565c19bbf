"""From a model's answers to one table of figures: classification, rejection, conformal sets, and slices of the data.

Used at the end of training, on its own logits, and by training/evaluate.py, on the answers of a served bundle. Free of
torch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from handlers.taxonomy import BY_CODE, CODES, KNOWN_CODES, UNKNOWN
from training import metrics

# A slice with fewer images says nothing; its figures are left out.
MIN_SLICE = 30
SLICE_METRICS = ("accuracy", "balanced_accuracy", "macro_auc", "ece")
AGE_BANDS = {"under 30": (0, 30), "30 to 49": (30, 50), "50 to 69": (50, 70), "70 and over": (70, 200)}


def assess(
    labels: Sequence[str],
    probabilities: NDArray[np.float64],
    sets: Sequence[Sequence[str]] | None,
    lesions: Sequence[str],
    resamples: int = 0,
    with_unknown: bool = True,
) -> dict[str, Any]:
    """All figures of a model's answers, as one JSON-able table (metrics.report and a few more).

    Classification is judged over the eight known classes: images whose true class is one of them, with UNK's
    probability shared out again. What UNK does to them stands beside it: `rejected` is the share of known lesions
    called unknown first of all; `balanced_accuracy_9` is over all nine codes that have images, so that it counts those
    as wrong; `unknown`, where there are UNK images, how well the ninth probability tells them from known lesions.

    Args:
        labels: true class code of each image.
        probabilities: (N, 9) in taxonomy order.
        sets: the conformal set of each image; None if the model has none.
        lesions: the lesion of each image, the unit of the bootstrap.
        resamples: of the bootstrap; 0 for no intervals.
        with_unknown: also what UNK does; not for images that the rejection was made from.

    Raises:
        ValueError: no image is of a known class.
    """
    is_known = np.array([label in KNOWN_CODES for label in labels], bool)
    if not is_known.any():
        raise ValueError("None of the images has one of the known classes as its label.")
    all_nine, truth = np.asarray(probabilities, np.float64), np.array([CODES.index(label) for label in labels])
    y, nine = truth[is_known], all_nine[is_known]
    table = metrics.report(y, conditional(nine), KNOWN_CODES, np.asarray(lesions)[is_known], resamples)
    if sets is not None:
        kept = [list(chosen) for chosen, inside in zip(sets, is_known, strict=True) if inside]
        table["conformal"] = _conformal(y, kept)
    if not with_unknown:
        return table
    table["rejected"] = float((nine.argmax(1) == CODES.index(UNKNOWN)).mean())
    table["balanced_accuracy_9"] = metrics.balanced_accuracy(truth, all_nine)
    if not is_known.all():
        table["unknown"] = unknown_figures(nine, all_nine[~is_known])
    if resamples:
        draws = [
            metrics.balanced_accuracy(truth[chosen], all_nine[chosen])
            for chosen in metrics.resampled(lesions, resamples)
        ]
        table["intervals_95"]["balanced_accuracy_9"] = metrics.interval(draws)
    return table


def unknown_figures(known: NDArray[np.float64], unknown: NDArray[np.float64]) -> dict[str, Any]:
    """How well UNK's probability tells unknown from known images: nine probabilities (N, 9) of each.

    `recall` is the share of unknown images called UNK first of all, `called_malignant` that called a malignant class.
    """
    last = CODES.index(UNKNOWN)
    malignant = [CODES.index(code) for code in CODES if BY_CODE[code].malignant]
    top = unknown.argmax(1)
    return {
        "images": len(unknown),
        **metrics.detection(known[:, last], unknown[:, last]),
        "recall": float((top == last).mean()),
        "called_malignant": float(np.isin(top, malignant).mean()),
    }


def conditional(nine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities over the eight known classes given that it is one of them: (N, 9) to (N, 8), rows summing to 1."""
    known = nine[:, : len(KNOWN_CODES)]
    total = known.sum(1, keepdims=True)
    # an image that is certainly unknown says nothing of the others
    return np.divide(known, total, out=np.full_like(known, 1 / known.shape[1]), where=total > 0)


def headline(table: dict[str, Any]) -> dict[str, float | None]:
    """The single figures of `assess`, flat, for MLflow and the bundle's evidence."""
    figures: dict[str, float | None] = dict(table["summary"])
    figures |= {name: table[name] for name in ("rejected", "balanced_accuracy_9") if name in table}
    if "conformal" in table:
        figures |= {f"conformal_{key}": table["conformal"][key] for key in ("coverage", "mean_size")}
    if "unknown" in table:
        figures |= {f"unknown_{key}": table["unknown"][key] for key in ("auroc", "fpr_at_95", "called_malignant")}
    melanoma = table["per_class"]["MEL"]
    figures |= {"melanoma_recall": melanoma["recall"], "melanoma_specificity_at_95": melanoma["specificity_at_95"]}
    return figures


def slices(rows: pd.DataFrame, probabilities: NDArray[np.float64], resamples: int = 0) -> dict[str, Any]:
    """SLICE_METRICS by source, site, sex and age, over the known lesions: {column: {value: figures}}.

    Args:
        rows: of a manifest, as training.manifest.read_manifest gives them.
        probabilities: (N, 9) in taxonomy order, in the rows' order.
        resamples: of the bootstrap over the lesions of each slice.

    Slices of fewer than MIN_SLICE images hold their counts alone. Classes differ from slice to slice in how common and
    how hard they are, so a gap between two slices is a question, not an answer.
    """
    is_known = rows["label"].isin(KNOWN_CODES).to_numpy()
    rows, eight = rows[is_known].reset_index(drop=True), conditional(np.asarray(probabilities)[is_known])
    y = np.array([KNOWN_CODES.index(label) for label in rows["label"]])
    values = {name: rows[name].where(rows[name] != "", "not recorded") for name in ("source", "site", "sex")}
    values["age"] = rows["age"].map(_age_band)
    table: dict[str, Any] = {}
    for column, cells in values.items():
        table[column] = {}
        for value in sorted(set(cells), key=lambda text: slice_order(column, text)):
            chosen = np.flatnonzero(cells == value)
            lesions = rows["lesion_id"].to_numpy()[chosen]
            entry: dict[str, Any] = {"images": len(chosen), "lesions": len(set(lesions))}
            entry["classes"] = len(np.unique(y[chosen]))
            if len(chosen) >= MIN_SLICE:
                figures = {name: metrics.SUMMARY[name](y[chosen], eight[chosen]) for name in SLICE_METRICS}
                entry |= {name: figure if np.isfinite(figure) else None for name, figure in figures.items()}
                if resamples:
                    defined = [name for name in SLICE_METRICS if entry[name] is not None]
                    entry["intervals_95"] = metrics.bootstrap(
                        y[chosen], eight[chosen], lesions, resamples, metrics=defined
                    )
            table[column][value] = entry
    return table


def _conformal(y: NDArray[np.int64], sets: list[list[str]]) -> dict[str, Any]:
    inside = np.array([KNOWN_CODES[k] in chosen for k, chosen in zip(y, sets, strict=True)])
    return {
        "coverage": float(inside.mean()),
        "mean_size": float(np.mean([len(chosen) for chosen in sets])),
        "coverage_per_class": {KNOWN_CODES[k]: float(inside[y == k].mean()) for k in np.unique(y)},
    }


def _age_band(age: float) -> str:
    return next((band for band, (low, high) in AGE_BANDS.items() if low <= age < high), "not recorded")


def slice_order(column: str, value: str) -> tuple[int, str]:
    """The place of a slice among those of its column, as a key to sort by."""
    if value == "not recorded":
        return 99, value
    return (list(AGE_BANDS).index(value), value) if column == "age" else (0, value)
