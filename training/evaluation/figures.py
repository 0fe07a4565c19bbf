"""Diagrams of a training run and of an evaluation, as matplotlib figures that need no display."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from sklearn.metrics import average_precision_score, precision_recall_curve

from mlflow_tracking.classification_metrics import (
    area_under_risk_coverage,
    area_under_roc,
    expected_calibration_error,
    reliability,
    risk_coverage,
    roc,
)

BLUE, ORANGE, GREY = "#2a6f97", "#e07a1f", "#8a8f98"
LABEL_AT = 0.5  # share of the row above which a cell's text turns white


def confusion_figure(table: ArrayLike, classes: Sequence[str]) -> Figure:
    """Draw a confusion matrix (K, K): counts, shaded by the share of their row (the truth)."""
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
    """Draw loss and validation scores by epoch."""
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
    """Draw the ROC curve of each class against the rest."""
    figure = Figure(figsize=(6, 5.5), layout="constrained")
    axes = figure.subplots()
    for index, code in enumerate(classes):
        mine, scores = labels == index, probabilities[:, index]
        if mine.any() and not mine.all():
            axes.plot(*roc(mine, scores), label=f"{code}  {area_under_roc(mine, scores):.3f}")
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    axes.legend(frameon=False, title="AUC", loc="lower right")
    return figure


def precision_recall_figure(
    labels: NDArray[np.int64], probabilities: NDArray[np.float64], classes: Sequence[str]
) -> Figure:
    """Draw precision against recall of each class against the rest, with its average precision."""
    figure = Figure(figsize=(6, 5.5), layout="constrained")
    axes = figure.subplots()
    for index, code in enumerate(classes):
        if (labels == index).any():
            precision, recall, _ = precision_recall_curve(labels == index, probabilities[:, index])
            area = average_precision_score(labels == index, probabilities[:, index])
            axes.plot(recall, precision, label=f"{code}  {area:.3f}")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02))
    axes.legend(frameon=False, title="average precision", loc="lower left")
    return figure


def class_bars_figure(table: Mapping[str, Any], intervals: Mapping[str, Any]) -> Figure:
    """Draw recall, precision and specificity of each class as bars, with their 95 % intervals.

    Args:
        table: `per_class` of mlflow_tracking.classification_metrics.report.
        intervals: its `per_class_intervals_95`, or empty.
    """
    codes = [code for code, figures in table.items() if figures["support"]]
    shown = (("recall", BLUE), ("precision", ORANGE), ("specificity", GREY))
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for place, (name, colour) in enumerate(shown):
        heights = np.array([table[code][name] or 0.0 for code in codes])
        x = np.arange(len(codes)) + (place - 1) * 0.27
        axes.bar(x, heights, width=0.25, color=colour, label=name)
        ranges = [intervals.get(code, {}).get(name) for code in codes]
        for at, bounds in zip(x, ranges, strict=True):
            if bounds:
                axes.plot([at, at], bounds, color="black", linewidth=1, marker="_", markersize=4)
    axes.set(ylim=(0, 1.02), xticks=range(len(codes)))
    axes.set_xticklabels([f"{code}\n{table[code]['support']}" for code in codes])
    axes.legend(frameon=False, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.1))
    return figure


def operating_figure(report: Mapping[str, Any]) -> Figure:
    """Draw the sensitivity of an alarm against its price, by source, with the promises as points.

    Args:
        report: from training.evaluation.suspicion_report.
    """
    figure = Figure(figsize=(7, 5.5), layout="constrained")
    axes = figure.subplots()
    for index, (source, figures) in enumerate(report["sources"].items()):
        curve, promises = figures["curve"], figures["promises"]
        style = {"color": "black", "linewidth": 2} if index == 0 else {"linewidth": 1}
        label = f"{source} ({figures['lesions']} of {figures['lesions'] + figures['other_lesions']} lesions)"
        [line] = axes.plot(curve["benign_flagged"], curve["sensitivity"], label=label, **style)
        points = [(p["benign_flagged"], p["sensitivity"]) for p in promises]
        axes.plot(*zip(*points, strict=True), linestyle="", marker="o", markersize=4, color=line.get_color())
    for promise in next(iter(report["sources"].values()))["promises"]:
        axes.axhline(promise["promised"], color=GREY, linewidth=0.5, linestyle=":")
    axes.set(xlabel="share of other lesions flagged", ylabel="sensitivity", xlim=(0, 1), ylim=(0.5, 1.01))
    axes.set_title(f"Alarm for {', '.join(report['codes'])}: points are the promises", fontsize=10)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def risk_coverage_figure(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> Figure:
    """Draw the error rate among the most confident share of the images against this share."""
    coverage, risk = risk_coverage(labels, probabilities)
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(coverage, risk, color=BLUE)
    axes.axhline(risk[-1], color=GREY, linestyle=":", label=f"all images: {risk[-1]:.3f}")
    area = area_under_risk_coverage(labels, probabilities)
    axes.set(xlabel="coverage", ylabel="risk", xlim=(0, 1), title=f"area under the curve {area:.3f}")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def examples_figure(rows: Sequence[tuple[str, Sequence[tuple[Image.Image, Image.Image, str] | None]]]) -> Figure:
    """Draw a sheet of examples: rows of a title and cells; a cell is picture, heatmap and caption, or None."""
    columns = max(len(cells) for _, cells in rows)
    figure = Figure(figsize=(4.2 * columns, 1.75 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), 2 * columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for line, (title, cells) in zip(grid, rows, strict=True):
        for place, cell in enumerate(cells):
            if cell is None:
                continue
            picture, heatmap, caption = cell
            line[2 * place].imshow(picture)
            line[2 * place].set_title(f"{title}, called {caption}", fontsize=8, loc="left")
            line[2 * place + 1].imshow(heatmap)
    return figure


def sheet_figure(pictures: Mapping[str, NDArray[np.uint8]]) -> Figure:
    """Draw pictures (H, W, 3) with their names."""
    columns = 4
    lines = -(-len(pictures) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.2 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, (name, picture) in zip(grid.flat, pictures.items(), strict=False):
        axes.imshow(picture)
        axes.set_title(name, fontsize=9)
    return figure


def deletion_figure(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the probability of the top class against the share of hidden cells, for each order of hiding."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    for (name, curve), colour in zip(curves.items(), (ORANGE, GREY, BLUE), strict=False):
        axes.plot(np.linspace(0, 1, len(curve)), curve, label=name, color=colour)
    axes.set(xlabel="share of the cells hidden", ylabel="probability of the top class", xlim=(0, 1))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return figure


def reliability_figure(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> Figure:
    """Draw a reliability diagram: accuracy against confidence, with the number of images in each bin below."""
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
