"""Pictures of a training run and of an evaluation, as matplotlib figures that need no display."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import roc_curve

from training.metrics import aucs, expected_calibration_error, reliability

BLUE, ORANGE, GREY = "#2a6f97", "#e07a1f", "#8a8f98"
LABEL_AT = 0.5  # share of the row above which a cell's text turns white


def confusion_figure(table: ArrayLike, classes: Sequence[str]) -> Figure:
    """Confusion matrix (K, K): counts, shaded by the share of their row (the truth)."""
    counts = np.asarray(table)
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    for row, column in np.ndindex(counts.shape):
        colour = "white" if share[row, column] > LABEL_AT else "black"
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=colour, fontsize=9)
    axes.set(xlabel="predicted", ylabel="truth", xticks=range(len(classes)), yticks=range(len(classes)))
    axes.set_xticklabels(classes)
    axes.set_yticklabels(classes)
    figure.colorbar(image, label="share of the true class")
    return figure


def curves_figure(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and validation scores by epoch, from the per-epoch metrics of a run."""
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, scores = figure.subplots(1, 2)
    losses.plot(epochs, [row["train_loss"] for row in history], label="train", color=GREY)
    losses.plot(epochs, [row["val_loss"] for row in history], label="val", color=BLUE)
    losses.set(xlabel="epoch", ylabel="loss")
    for name, colour in (("val_accuracy", GREY), ("val_balanced_accuracy", BLUE), ("val_macro_auc", ORANGE)):
        scores.plot(epochs, [row[name] for row in history], label=name.removeprefix("val_"), color=colour)
    scores.set(xlabel="epoch", ylim=(0, 1))
    for axes in (losses, scores):
        axes.legend(frameon=False)
        axes.grid(alpha=0.3)
    return figure


def roc_figure(labels: NDArray[np.int64], probabilities: NDArray[np.float64], classes: Sequence[str]) -> Figure:
    """ROC curve of each class against the rest."""
    figure = Figure(figsize=(6, 5.5), layout="constrained")
    axes = figure.subplots()
    for index, area in enumerate(aucs(labels, probabilities)):
        if np.isfinite(area):
            false_positive, true_positive, _ = roc_curve(labels == index, probabilities[:, index])
            axes.plot(false_positive, true_positive, label=f"{classes[index]}  {area:.3f}")
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    axes.legend(frameon=False, title="AUC", loc="lower right")
    return figure


def reliability_figure(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> Figure:
    """Reliability diagram: accuracy against confidence, with the images in each bin below."""
    count, confidence, right = reliability(labels, probabilities).T
    edges = np.linspace(0, 1, len(count) + 1)
    figure = Figure(figsize=(5.5, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    upper.bar(edges[:-1], np.nan_to_num(right), width=1 / len(count), align="edge", color=BLUE, edgecolor="white")
    upper.plot(confidence, right, "o", color=ORANGE, label="bin mean")
    upper.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="perfect")
    error = expected_calibration_error(labels, probabilities)
    upper.set(ylabel="accuracy", ylim=(0, 1), title=f"expected calibration error {error:.3f} ({len(count)} bins)")
    upper.legend(frameon=False, loc="upper left")
    lower.bar(edges[:-1], count, width=1 / len(count), align="edge", color=GREY, edgecolor="white")
    lower.set(xlabel="confidence", ylabel="images", xlim=(0, 1))
    return figure
