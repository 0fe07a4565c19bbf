"""The summary of a scored archive: counts over all pieces, and two figures."""

from collections import Counter

import numpy as np
from matplotlib.figure import Figure
from pyarrow import parquet

from handlers.files import atomic_file
from handlers.taxonomy import CODES, TAXONOMY
from scripts.archive_scoring import ScoringRun

BINS = 20  # of the confidence's histogram
BLUE, ORANGE = "#2a6f97", "#e07a1f"


class ScoreCounts:
    """What is counted over the pieces of a run; its size does not depend on the number of pictures."""

    def __init__(self) -> None:
        self.predictions: Counter[str] = Counter()
        self.errors: Counter[str] = Counter()
        self.set_sizes: Counter[int] = Counter()
        self.flagged: Counter[bool] = Counter()
        self.confidence = np.zeros(BINS, np.int64)

    @classmethod
    def of(cls, run: ScoringRun) -> "ScoreCounts":
        """Count the rows of all pieces, one piece at a time."""
        counts = cls()
        columns = [*CODES, "prediction", "malignant_flagged", "likely_set", "error_code"]
        for piece in range(run.pieces):
            table = parquet.read_table(run.file(piece), columns=columns, partitioning=None)
            column = {name: table[name].to_pylist() for name in columns[len(CODES) :]}
            counts.predictions.update(code for code in column["prediction"] if code)
            counts.errors.update(code for code in column["error_code"] if code)
            counts.flagged.update(flag for flag in column["malignant_flagged"] if flag is not None)
            counts.set_sizes.update(len(codes) for codes in column["likely_set"] if codes is not None)
            highest = np.stack([table[code].to_numpy() for code in CODES], 1).max(1)
            counts.confidence += np.histogram(highest[~np.isnan(highest)], BINS, (0, 1))[0]
        return counts

    @property
    def scored(self) -> int:
        """The number of pictures with scores."""
        return self.predictions.total()


def summarise(run: ScoringRun) -> str:
    """Write summary.md and its figures, and return the text in short."""
    counts = ScoreCounts.of(run)
    for name, figure in (("classes.png", class_figure(counts)), ("confidence.png", confidence_figure(counts))):
        with atomic_file(run.folder / name) as file:
            figure.savefig(file, format="png", dpi=120)
    with atomic_file(run.folder / "summary.md") as file:
        file.write(report(run, counts).encode())
    return (
        f"{counts.scored:,} pictures scored, {counts.errors.total():,} refused, {counts.flagged[True]:,} flagged as "
        f"suspicious. Scores: {run.folder / 'scores'}; summary: {run.folder / 'summary.md'}. Research use only. Not a "
        "medical device."
    )


def report(run: ScoringRun, counts: ScoreCounts) -> str:
    """Return the summary as Markdown."""
    lines = [
        "# Summary of scores",
        "",
        "Research use only. Not a medical device.",
        "",
        f"- source: `{run.source}`",
        f"- model: `{run.model}`, {run.precision}",
        f"- pictures: {run.rows:,}; scored {counts.scored:,}; refused {counts.errors.total():,}",
    ]
    if decided := counts.flagged.total():
        lines.append(f"- flagged as suspicious: {counts.flagged[True]:,} ({counts.flagged[True] / decided:.1%})")
    if sized := counts.set_sizes.total():
        mean = sum(size * number for size, number in counts.set_sizes.items()) / sized
        lines.append(f"- likely set: {mean:.2f} classes on average")
    lines += ["", "![most probable classes](classes.png)", "", "| class | pictures | share |", "| --- | --- | --- |"]
    for entry in TAXONOMY:
        number = counts.predictions[entry.code]
        lines.append(f"| {entry.code} {entry.name} | {number:,} | {number / max(counts.scored, 1):.1%} |")
    lines += ["", "![confidence](confidence.png)"]
    if counts.errors:
        lines += ["", "| reason of refusal | pictures |", "| --- | --- |"]
        lines += [f"| {code} | {number:,} |" for code, number in counts.errors.most_common()]
    return "\n".join(lines) + "\n"


def class_figure(counts: ScoreCounts) -> Figure:
    """Draw the share of each class as the most probable one."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    shares = [counts.predictions[code] / max(counts.scored, 1) for code in CODES]
    bars = axes.bar(CODES, shares, color=[ORANGE if entry.malignant else BLUE for entry in TAXONOMY])
    axes.bar_label(bars, [f"{share:.1%}" for share in shares], fontsize=8)
    axes.set(ylabel="share of the scored pictures", title="Most probable class; malignant ones in orange")
    return figure


def confidence_figure(counts: ScoreCounts) -> Figure:
    """Draw how many pictures have which probability of the most probable class."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.bar(np.arange(BINS) / BINS, counts.confidence, width=0.9 / BINS, align="edge", color=BLUE)
    axes.set(xlabel="probability of the most probable class", ylabel="pictures", xlim=(0, 1))
    return figure
