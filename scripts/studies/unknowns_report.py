"""Tables of the study of unknown classes (scripts/studies/unknowns.py)."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers.taxonomy import KNOWN_CODES
from mlflow_tracking import classification_metrics as metrics
from mlflow_tracking.command_line import markdown_table
from scripts.studies.detectors import DETECTORS

SERVED = "vim"  # the detector that training/finish.py puts into a bundle
# Column: its key in the means.
FIGURES = {
    "near AUROC": "near_auroc",
    "near FPR at 95 %": "near_fpr_at_95",
    "called malignant": "near_called_malignant",
    "far AUROC": "far_auroc",
    "far FPR at 95 %": "far_fpr_at_95",
}


def summarise(
    held_out: dict[str, dict[str, Any]], draws: dict[str, dict[str, NDArray[np.float64]]]
) -> dict[str, dict[str, Any]]:
    """Return means over the held-out classes (for far figures also over the kinds), best near AUROC first.

    The interval of the mean near AUROC covers other pictures, not other trainings.
    """
    means = {}
    for name in DETECTORS:
        tables = [table["detectors"][name] for table in held_out.values()]
        far = [figures for table in tables for figures in table["far"].values()]
        means[name] = {
            "near_auroc": float(np.mean([table["near"]["auroc"] for table in tables])),
            "near_auroc_interval_95": metrics.interval(np.mean([draws[code][name] for code in held_out], axis=0)),
            "near_fpr_at_95": float(np.mean([table["near"]["fpr_at_95"] for table in tables])),
            "near_called_malignant": float(np.mean([table["near"]["called_malignant"] for table in tables])),
            "far_auroc": float(np.mean([figures["auroc"] for figures in far])),
            "far_fpr_at_95": float(np.mean([figures["fpr_at_95"] for figures in far])),
        }
    return dict(_ranked(means))


def _ranked(means: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    return sorted(means.items(), key=lambda item: (-item[1]["near_auroc"], -item[1]["far_auroc"], item[0]))


def markdown(study: dict[str, Any]) -> str:
    """Return the study as Markdown tables. The order does not depend on that of the JSON file."""
    ranked = _ranked(study["means"])
    means = [
        [f"`{name}`", *(row[key] for key in FIGURES.values()), interval_text(row["near_auroc_interval_95"])]
        for name, row in ranked
    ]
    tables = [markdown_table(["detector", *FIGURES, "95 % interval of near AUROC"], means)]
    detectors = ("max_softmax", "energy", SERVED)
    rows = []
    for code in filter(study["held_out"].__contains__, KNOWN_CODES):
        table = study["held_out"][code]
        near = (table["detectors"][name]["near"]["auroc"] for name in detectors)
        span = interval_text(table["detectors"][SERVED]["near"]["auroc_interval_95"])
        rows.append((code, f"{table['images']:,}", table["balanced_accuracy"], *near, span))
    head = ["held out", "images", "balanced accuracy of the rest", *(f"near AUROC, `{name}`" for name in detectors)]
    head.append(f"95 % interval, `{SERVED}`")
    tables.append(markdown_table(head, rows))
    if study["served"]:
        shown = [
            (kind, row["auroc"], row["fpr_at_95"], row["recall"], row["called_malignant"])
            for kind, row in sorted(study["served"].items())
        ]
        head = ["far pictures, this model as served", "AUROC", "FPR at 95 %", "called UNK", "called malignant"]
        tables.append(markdown_table(head, shown))
    return "\n\n".join(tables) + "\n"


def interval_text(interval: Sequence[float]) -> str:
    """Return an interval in words."""
    return f"{interval[0]:.3f} to {interval[1]:.3f}"
