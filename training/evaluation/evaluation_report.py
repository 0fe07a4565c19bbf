"""From predictions to one report of figures: known classes, as served, unknown diseases, conformal sets, slices.

Training reports its own logits at the end; training/evaluate.py reports a bundle's answers, as served. Formulas are in
mlflow_tracking/classification_metrics.py. Free of torch.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from handlers.errors import UserError
from handlers.taxonomy import CODES, KNOWN_CODES, MALIGNANT, UNKNOWN
from mlflow_tracking import classification_metrics as metrics

MIN_SLICE = 30  # smaller slices get no figures
SLICE_METRICS = ("accuracy", "balanced_accuracy", "macro_auc", "ece")
MELANOMA_FIGURES = ("recall", "specificity_at_95")
# Figures of these sections that stand in `headline`, as SECTION_FIGURE.
SECTION_FIGURES = {
    "as_served": ("accuracy", "malignant_missed"),
    "conformal": ("coverage", "mean_size"),
    "unknown": ("auroc", "fpr_at_95", "called_malignant"),
}
AGE_BANDS = {"under 30": (0, 30), "30 to 49": (30, 50), "50 to 69": (50, 70), "70 and over": (70, 200)}

Indices = NDArray[np.int64]
Probabilities = NDArray[np.float64]


class ReportError(UserError):
    """Images that no report can be made of."""


def build_report(
    labels: Sequence[str],
    probabilities: Probabilities,
    sets: Sequence[Sequence[str]] | None,
    lesions: Sequence[str],
    resamples: int = 0,
    with_unknown: bool = True,
) -> dict[str, Any]:
    """Compute all figures of a model's predictions, as a table for JSON.

    The top level holds the figures over the eight known classes (metrics.report): images of known lesions, with the
    probability of UNK shared out. Further sections are `conformal` (conformal_figures), the figures of the nine
    classes as served (served_figures), and `unknown` (unknown_figures).

    Args:
        labels: true class code of each image.
        probabilities: (N, 9) in taxonomy order.
        sets: the conformal set of each image; None if the model has none.
        lesions: the lesion of each image, the unit of the bootstrap.
        resamples: of the bootstrap; 0 for no intervals.
        with_unknown: include the figures that depend on UNK; False for images that the rejection was fitted to.

    Raises:
        ReportError: no image is of a known class.
    """
    is_known = np.array([label in KNOWN_CODES for label in labels], bool)
    if not is_known.any():
        raise ReportError("No image has a known class as its label; add images of known lesions.")
    nine, truth = np.asarray(probabilities, np.float64), np.array([CODES.index(label) for label in labels])
    report = metrics.report(
        truth[is_known], conditional(nine[is_known]), KNOWN_CODES, np.asarray(lesions)[is_known], resamples
    )
    members = None if sets is None else np.array([[code in chosen for code in CODES] for chosen in sets], bool)

    def sections(rows: Indices) -> dict[str, Any]:
        return _sections(truth[rows], nine[rows], None if members is None else members[rows], with_unknown)

    report |= sections(np.arange(len(truth)))
    if resamples:
        draws = [_flat(sections(rows)) for rows in metrics.resampled(lesions, resamples)]
        for name in _flat(report):
            values = [draw[name] for draw in draws if np.isfinite(draw.get(name, np.nan))]
            report["intervals_95"] |= {name: metrics.interval(values)} if values else {}
        melanoma = report["per_class_intervals_95"]["MEL"]
        report["intervals_95"] |= {f"melanoma_{name}": melanoma[name] for name in MELANOMA_FIGURES}
    return report


def _sections(
    truth: Indices, nine: Probabilities, members: NDArray[np.bool_] | None, with_unknown: bool
) -> dict[str, Any]:
    is_known = truth != CODES.index(UNKNOWN)
    sections: dict[str, Any] = {}
    if not is_known.any():  # a bootstrap sample may have no known lesion
        return sections
    if members is not None:
        sections["conformal"] = conformal_figures(truth[is_known], members[is_known])
    if with_unknown:
        sections |= served_figures(truth, nine)
        if not is_known.all():
            sections["unknown"] = unknown_figures(nine[is_known], nine[~is_known])
    return sections


def served_figures(truth: Indices, nine: Probabilities) -> dict[str, Any]:
    """Compute figures of the most probable of the nine classes, which is what a user reads.

    `rejected` is the share of known lesions called UNK; `balanced_accuracy_9` the balanced accuracy as served, over all
    nine codes that have images; `as_served` holds accuracy and recall of known lesions with UNK counted as wrong, and
    the share of malignant lesions that are not called malignant.
    """
    is_known = truth != CODES.index(UNKNOWN)
    lesion_truth, top = truth[is_known], nine[is_known].argmax(1)
    as_served: dict[str, Any] = {"accuracy": float((lesion_truth == top).mean())}
    as_served["recall"] = {CODES[k]: float((top[lesion_truth == k] == k).mean()) for k in np.unique(lesion_truth)}
    is_malignant = MALIGNANT[lesion_truth]
    if is_malignant.any():
        as_served["malignant_missed"] = float((~MALIGNANT[top[is_malignant]]).mean())
    return {
        "rejected": float((top == CODES.index(UNKNOWN)).mean()),
        "balanced_accuracy_9": metrics.balanced_accuracy(truth, nine),
        "as_served": as_served,
    }


def unknown_figures(lesions: Probabilities, others: Probabilities) -> dict[str, Any]:
    """Compute how well UNK's probability separates known lesions from others: nine probabilities (N, 9) of each.

    `recall` is the share of the others called UNK, `called_malignant` the share called a malignant class.
    """
    last = CODES.index(UNKNOWN)
    top = others.argmax(1)
    return {
        "images": len(others),
        **metrics.detection(lesions[:, last], others[:, last]),
        "recall": float((top == last).mean()),
        "called_malignant": float(MALIGNANT[top].mean()),
    }


def conformal_figures(truth: Indices, members: NDArray[np.bool_]) -> dict[str, Any]:
    """Compute coverage and size of conformal sets, given as members (N, 9), for known lesions."""
    covered = members[np.arange(len(truth)), truth]
    return {
        "coverage": float(covered.mean()),
        "mean_size": float(members.sum(1).mean()),
        "coverage_per_class": {KNOWN_CODES[k]: float(covered[truth == k].mean()) for k in np.unique(truth)},
    }


def conditional(nine: Probabilities) -> Probabilities:
    """Return the probabilities of the eight known classes given that it is one of them: (N, 9) to (N, 8)."""
    eight = nine[:, : len(KNOWN_CODES)]
    total = eight.sum(1, keepdims=True)
    # Equal probabilities for an image that is certainly unknown.
    return np.divide(eight, total, out=np.full_like(eight, 1 / eight.shape[1]), where=total > 0)


def headline(report: dict[str, Any]) -> dict[str, float | None]:
    """Return the single figures of a report, flat, for MLflow and the bundle's evidence."""
    melanoma = report["per_class"]["MEL"]
    return report["summary"] | _flat(report) | {f"melanoma_{name}": melanoma[name] for name in MELANOMA_FIGURES}


def _flat(report: dict[str, Any]) -> dict[str, float]:
    figures: dict[str, float] = {name: report[name] for name in ("rejected", "balanced_accuracy_9") if name in report}
    for section, names in SECTION_FIGURES.items():
        values = report.get(section, {})
        figures |= {f"{section}_{name}": values[name] for name in names if name in values}
    return figures


def slices(
    rows: pd.DataFrame,
    probabilities: Probabilities,
    resamples: int = 0,
    sets: Sequence[Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Compute figures by source, site, sex and age, over the known lesions: {column: {value: figures}}.

    The figures are SLICE_METRICS, and for conformal sets their coverage by lesion and their mean size.

    Slices differ in how common and how difficult their classes are, so a gap between two is not yet a bias.

    Args:
        rows: of a manifest, from training.data.manifest.read_manifest.
        probabilities: (N, 9) in taxonomy order, in the rows' order.
        resamples: of the bootstrap over the lesions of each slice.
        sets: the conformal set of each image; None if the model has none.
    """
    is_known = rows["label"].isin(KNOWN_CODES).to_numpy()
    rows, eight = rows[is_known].reset_index(drop=True), conditional(np.asarray(probabilities)[is_known])
    truth = np.array([KNOWN_CODES.index(label) for label in rows["label"]])
    chosen_sets = [] if sets is None else [chosen for chosen, lesion in zip(sets, is_known, strict=True) if lesion]
    columns = {name: rows[name].where(rows[name] != "", "not recorded") for name in ("source", "site", "sex")}
    columns["age"] = rows["age"].map(_age_band)
    table: dict[str, Any] = {}
    for column, cells in columns.items():
        table[column] = {}
        for value in sorted(set(cells), key=lambda text: slice_order(column, text)):
            chosen = np.flatnonzero(cells == value)
            lesions = rows["lesion_id"].to_numpy()[chosen]
            figures = _slice_figures(truth[chosen], eight[chosen], lesions, resamples)
            if sets is not None and len(chosen) >= MIN_SLICE:
                figures |= _slice_sets(rows.iloc[chosen], [chosen_sets[row] for row in chosen])
            table[column][value] = figures
    return table


def _slice_figures(truth: Indices, eight: Probabilities, lesions: NDArray[Any], resamples: int) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "images": len(truth),
        "lesions": len(set(lesions)),
        "classes": len(np.unique(truth)),
    }
    if len(truth) < MIN_SLICE:
        return figures
    for name in SLICE_METRICS:
        value = metrics.SUMMARY[name](truth, eight)
        figures[name] = value if np.isfinite(value) else None
    if resamples:
        defined = [name for name in SLICE_METRICS if figures[name] is not None]
        figures["intervals_95"] = metrics.bootstrap(truth, eight, lesions, resamples, metrics=defined)
    return figures


def _slice_sets(rows: pd.DataFrame, sets: Sequence[Sequence[str]]) -> dict[str, float]:
    """Return the share of lesions whose sets all contain the true class, and the mean size of the sets."""
    covered = pd.Series([label in chosen for label, chosen in zip(rows["label"], sets, strict=True)])
    by_lesion = covered.groupby(rows["lesion_id"].to_numpy()).all()
    return {"coverage_by_lesion": float(by_lesion.mean()), "mean_set_size": float(np.mean([len(s) for s in sets]))}


def weakest_slice(table: dict[str, Any]) -> dict[str, Any] | None:
    """Return column, value and figures of the slice with the lowest macro AUC; None if no slice has one.

    The macro AUC does not depend on how common the classes are, so it can be compared between slices.

    Args:
        table: from `slices`.
    """
    rated = [
        {"column": column, "value": value, **figures}
        for column, values in table.items()
        for value, figures in values.items()
        if figures.get("macro_auc") is not None
    ]
    return min(rated, key=lambda entry: entry["macro_auc"], default=None)


def slice_order(column: str, value: str) -> tuple[int, str]:
    """Return the sort key of a slice within its column: age bands by age, "not recorded" last."""
    if value == "not recorded":
        return 99, value
    return (list(AGE_BANDS).index(value), value) if column == "age" else (0, value)


def _age_band(age: float) -> str:
    return next((band for band, (low, high) in AGE_BANDS.items() if low <= age < high), "not recorded")
