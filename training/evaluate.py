"""Judge a bundle on images it has not seen: `python training/evaluate.py --bundle DIR --data MANIFEST --out DIR`.

The images go through handlers.predictor, byte by byte what serving does, so the figures are those of the served model.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from numpy.typing import NDArray
from rich.table import Table

from handlers.bundle import BundleError
from handlers.predictor import Prediction, Predictor, Request
from handlers.taxonomy import CODES, KNOWN_CODES, UNKNOWN
from training import metrics
from training.figures import confusion_figure, reliability_figure, roc_figure
from training.manifest import ManifestError, read_manifest
from training.terminal import console, errors, progress_bar

BATCH = 32


def assess(
    labels: Sequence[str],
    probabilities: NDArray[np.float64],
    sets: Sequence[Sequence[str]] | None,
    lesions: Sequence[str],
    resamples: int = 0,
) -> dict[str, Any]:
    """All figures of a model's answers, as one JSON-able table (metrics.report and a few more).

    Classification is judged over the eight known classes: images whose true class is one of them, with UNK's
    probability shared out again. What UNK does to them stands beside it: `rejected` is the share of known lesions
    called unknown first of all, `balanced_accuracy_9` counts those as wrong.

    Args:
        labels: true class code of each image.
        probabilities: (N, 9) in taxonomy order.
        sets: the conformal set of each image; None if the model has none.
        lesions: the lesion of each image, the unit of the bootstrap.
        resamples: of the bootstrap; 0 for no intervals.

    Raises:
        ValueError: no image is of a known class.
    """
    keep = np.array([label in KNOWN_CODES for label in labels], bool)
    if not keep.any():
        raise ValueError("None of the images has one of the known classes as its label.")
    y = np.array([KNOWN_CODES.index(label) for label in np.asarray(labels)[keep]])
    nine = np.asarray(probabilities, np.float64)[keep]
    eight = conditional(nine)
    table = metrics.report(y, eight, KNOWN_CODES, np.asarray(lesions)[keep], resamples)
    table["rejected"] = float((nine.argmax(1) == CODES.index(UNKNOWN)).mean())
    table["balanced_accuracy_9"] = metrics.balanced_accuracy(y, nine)
    if sets is not None:
        kept = [list(chosen) for chosen, inside in zip(sets, keep, strict=True) if inside]
        inside = np.array([KNOWN_CODES[k] in chosen for k, chosen in zip(y, kept, strict=True)])
        table["conformal"] = {
            "coverage": float(inside.mean()),
            "mean_size": float(np.mean([len(chosen) for chosen in kept])),
            "coverage_per_class": {KNOWN_CODES[k]: float(inside[y == k].mean()) for k in np.unique(y)},
        }
    return table


def conditional(nine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities over the eight known classes given that it is one of them: (N, 9) to (N, 8), rows summing to 1."""
    known = nine[:, : len(KNOWN_CODES)]
    total = known.sum(1, keepdims=True)
    # an image that is certainly unknown says nothing of the others
    return np.divide(known, total, out=np.full_like(known, 1 / known.shape[1]), where=total > 0)


def headline(table: dict[str, Any]) -> dict[str, float | None]:
    """The single figures of `assess`, flat, for MLflow and the bundle's evidence."""
    figures: dict[str, float | None] = dict(table["summary"])
    figures |= {"rejected": table["rejected"], "balanced_accuracy_9": table["balanced_accuracy_9"]}
    if "conformal" in table:
        figures |= {f"conformal_{key}": table["conformal"][key] for key in ("coverage", "mean_size")}
    return figures


def evaluate(
    predictor: Predictor, rows: pd.DataFrame, resamples: int = 1000
) -> tuple[dict[str, Any], NDArray[np.float64]]:
    """Ask `predictor` about every row's image: the table of `assess`, and the probabilities (N, 9).

    Args:
        rows: of a manifest, as training.manifest.read_manifest gives them.

    Raises:
        ManifestError: an image cannot be read.
    """
    answers: list[Prediction] = []
    with progress_bar("evaluating") as advance:
        for start in range(0, len(rows), BATCH):
            files = [Path(path) for path in rows["path"].iloc[start : start + BATCH]]
            try:
                requests = [Request(file.read_bytes(), gradcam="none") for file in files]
            except OSError as error:
                raise ManifestError(f"{error.filename} cannot be read ({error.strerror}).") from error
            for file, answer in zip(files, predictor.predict(requests), strict=True):
                if not isinstance(answer, Prediction):
                    raise ManifestError(f"{file}: {answer}")
                answers.append(answer)
            advance(len(answers), len(rows))
    probabilities = np.array([[answer.probabilities[code] for code in CODES] for answer in answers])
    sets = [answer.conformal_set or [] for answer in answers]
    has_sets = bool(answers) and answers[0].conformal_set is not None
    table = assess(
        rows["label"].tolist(), probabilities, sets if has_sets else None, rows["lesion_id"].tolist(), resamples
    )
    return table, probabilities


def main(
    bundle: Annotated[Path, typer.Option(help="The bundle's folder.")],
    data: Annotated[Path, typer.Option(help="A manifest.csv, as prepare_data writes it.")],
    out: Annotated[Path, typer.Option(help="Folder for metrics.json and the figures.")],
    split: Annotated[str, typer.Option(help="Which split of the manifest: train, val, calibration or test.")] = "test",
    bootstrap: Annotated[int, typer.Option(help="Resamplings of the lesions for the intervals; 0: none.")] = 1000,
) -> None:
    """Evaluate a bundle on a manifest's images, as it would be served.

    Example:

    python training/evaluate.py --bundle model_store/skin_vit --data data/manifest.csv --out reports/test
    """
    try:
        frame = read_manifest(data)
        rows = frame[frame["split"] == split].reset_index(drop=True)
        if rows.empty:
            raise ManifestError(f"{data} has no images in the split {split!r}.")
        predictor = Predictor.load(bundle)
        table, probabilities = evaluate(predictor, rows, bootstrap)
    except (ManifestError, BundleError, ValueError) as error:
        errors.print(str(error))
        raise SystemExit(1) from None

    out.mkdir(parents=True, exist_ok=True)
    written = {"bundle": predictor.bundle.digest, "split": split, **table}
    (out / "metrics.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    keep = rows["label"].isin(KNOWN_CODES).to_numpy()
    labels = np.array([KNOWN_CODES.index(label) for label in rows["label"][keep]])
    known = conditional(probabilities[keep])
    confusion_figure(table["confusion"], KNOWN_CODES).savefig(out / "confusion.png", dpi=150)
    roc_figure(labels, known, KNOWN_CODES).savefig(out / "roc.png", dpi=150)
    reliability_figure(labels, known).savefig(out / "reliability.png", dpi=150)
    show(table)
    console.print(f"Written to {out}.")


def show(table: dict[str, Any]) -> None:
    """Print the single figures with their intervals."""
    shown = Table("figure", "value", "95 % interval (bootstrap over lesions)")
    for name, value in headline(table).items():
        low_high = table["intervals_95"].get(name)
        interval = f"{low_high[0]:.3f} to {low_high[1]:.3f}" if low_high else ""
        shown.add_row(name, "undefined" if value is None else f"{value:.3f}", interval)
    console.print(f"{table['images']:,} images of {table['lesions']:,} lesions")
    console.print(shown)


if __name__ == "__main__":
    typer.run(main)
