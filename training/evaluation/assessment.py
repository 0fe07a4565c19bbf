"""From a model's answers to one table of figures: classification, rejection, conformal sets, and slices of the data.

Used at the end of training, on its own logits, and by training/evaluate.py, on the answers of a served bundle. Free of
torch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from handlers.taxonomy import CODES, KNOWN_CODES, MALIGNANT, UNKNOWN
from mlflow_tracking import metrics

# A slice with fewer images says nothing; its figures are left out.
MIN_SLICE = 30
SLICE_METRICS = ("accuracy", "balanced_accuracy", "macro_auc", "ece")
MELANOMA_FIGURES = ("recall", "specificity_at_95")
BESIDE_FIGURES = {
    "as_served": ("accuracy", "malignant_missed"),
    "conformal": ("coverage", "mean_size"),
    "unknown": ("auroc", "fpr_at_95", "called_malignant"),
}
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
    as wrong; `as_served` has accuracy and recall counted that way, and the share of malignant lesions whose most
    probable class is not malignant; `unknown`, where there are UNK images, tells how well the ninth probability tells
    them from known lesions.

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
    y, eight = truth[is_known], conditional(all_nine[is_known])
    table = metrics.report(y, eight, KNOWN_CODES, np.asarray(lesions)[is_known], resamples)
    members = None if sets is None else np.array([[code in chosen for code in CODES] for chosen in sets], bool)

    def beside(rows: NDArray[np.int64]) -> dict[str, Any]:
        return _beside(truth[rows], all_nine[rows], None if members is None else members[rows], with_unknown)

    table |= beside(np.arange(len(truth)))
    if resamples:
        draws = [_flat(beside(chosen)) for chosen in metrics.resampled(lesions, resamples)]
        for name in _flat(table):
            drawn = [draw[name] for draw in draws if np.isfinite(draw.get(name, np.nan))]
            table["intervals_95"] |= {name: metrics.interval(drawn)} if drawn else {}
        of_melanoma = table["per_class_intervals_95"]["MEL"]
        table["intervals_95"] |= {f"melanoma_{name}": of_melanoma[name] for name in MELANOMA_FIGURES}
    return table


def _beside(
    truth: NDArray[np.int64], nine: NDArray[np.float64], members: NDArray[np.bool_] | None, with_unknown: bool
) -> dict[str, Any]:
    """What stands beside the classification: conformal sets (N, 9), as members, over the known lesions; rejection."""
    is_known = truth != CODES.index(UNKNOWN)
    table: dict[str, Any] = {}
    if members is not None and is_known.any():
        table["conformal"] = _conformal(truth[is_known], members[is_known])
    if with_unknown and is_known.any():
        table["rejected"] = float((nine[is_known].argmax(1) == CODES.index(UNKNOWN)).mean())
        table["balanced_accuracy_9"] = metrics.balanced_accuracy(truth, nine)
        table["as_served"] = _as_served(truth[is_known], nine[is_known].argmax(1))
        if not is_known.all():
            table["unknown"] = unknown_figures(nine[is_known], nine[~is_known])
    return table


def _as_served(truth: NDArray[np.int64], top: NDArray[np.int64]) -> dict[str, Any]:
    """Figures of the most probable of the nine, for known lesions: true and named classes as indices (N,)."""
    is_malignant = MALIGNANT[truth]
    table: dict[str, Any] = {"accuracy": float((truth == top).mean())}
    table["recall"] = {CODES[k]: float((top[truth == k] == k).mean()) for k in np.unique(truth)}
    if is_malignant.any():
        table["malignant_missed"] = float((~MALIGNANT[top[is_malignant]]).mean())
    return table


def _flat(table: dict[str, Any]) -> dict[str, float]:
    """The single figures of `_beside`, by their names in `headline`."""
    figures: dict[str, float] = {name: table[name] for name in ("rejected", "balanced_accuracy_9") if name in table}
    for part, names in BESIDE_FIGURES.items():
        figures |= {f"{part}_{name}": table[part][name] for name in names if name in table.get(part, {})}
    return figures


def unknown_figures(known: NDArray[np.float64], unknown: NDArray[np.float64]) -> dict[str, Any]:
    """How well UNK's probability tells unknown from known images: nine probabilities (N, 9) of each.

    `recall` is the share of unknown images called UNK first of all, `called_malignant` that called a malignant class.
    """
    last = CODES.index(UNKNOWN)
    top = unknown.argmax(1)
    return {
        "images": len(unknown),
        **metrics.detection(known[:, last], unknown[:, last]),
        "recall": float((top == last).mean()),
        "called_malignant": float(MALIGNANT[top].mean()),
    }


def conditional(nine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities over the eight known classes given that it is one of them: (N, 9) to (N, 8), rows summing to 1."""
    known = nine[:, : len(KNOWN_CODES)]
    total = known.sum(1, keepdims=True)
    # an image that is certainly unknown says nothing of the others
    return np.divide(known, total, out=np.full_like(known, 1 / known.shape[1]), where=total > 0)


def headline(table: dict[str, Any]) -> dict[str, float | None]:
    """The single figures of `assess`, flat, for MLflow and the bundle's evidence."""
    melanoma = table["per_class"]["MEL"]
    return table["summary"] | _flat(table) | {f"melanoma_{name}": melanoma[name] for name in MELANOMA_FIGURES}


def slices(rows: pd.DataFrame, probabilities: NDArray[np.float64], resamples: int = 0) -> dict[str, Any]:
    """SLICE_METRICS by source, site, sex and age, over the known lesions: {column: {value: figures}}.

    Args:
        rows: of a manifest, as training.data.manifest.read_manifest gives them.
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


def _conformal(y: NDArray[np.int64], members: NDArray[np.bool_]) -> dict[str, Any]:
    inside = members[np.arange(len(y)), y]
    return {
        "coverage": float(inside.mean()),
        "mean_size": float(members.sum(1).mean()),
        "coverage_per_class": {KNOWN_CODES[k]: float(inside[y == k].mean()) for k in np.unique(y)},
    }


def _age_band(age: float) -> str:
    return next((band for band, (low, high) in AGE_BANDS.items() if low <= age < high), "not recorded")


def slice_order(column: str, value: str) -> tuple[int, str]:
    """The place of a slice among those of its column, as a key to sort by."""
    if value == "not recorded":
        return 99, value
    return (list(AGE_BANDS).index(value), value) if column == "age" else (0, value)
