"""Evaluate a bundle on new images, as served: `python training/evaluate.py --bundle DIR --data MANIFEST --out DIR`.

The images go through handlers.predictor from their bytes on, exactly as in serving.
"""

import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from rich.table import Table
from sklearn.metrics import classification_report

from handlers.files import write_json
from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.receipt import read_receipt
from handlers.suspicion import MALIGNANT, MELANOMA
from handlers.taxonomy import CODES, KNOWN_CODES
from mlflow_tracking.command_line import console, progress_bar, run, table
from mlflow_tracking.runs import log_evaluation
from mlflow_tracking.stack_settings import Settings
from training.data.manifest import ManifestError, fingerprint, read_manifest
from training.data.preparation import build_manifest
from training.evaluation.bundle_comparison import compare_bundles
from training.evaluation.command_options import AllowOverlapOption, BundleOption, OutOption
from training.evaluation.evaluation_report import build_report, conditional, headline, slices, weakest_slice
from training.evaluation.example_sheets import costliest_errors, examples
from training.evaluation.figures import (
    class_bars_figure,
    confusion_figure,
    operating_figure,
    precision_recall_figure,
    reliability_figure,
    risk_coverage_figure,
    roc_figure,
)
from training.evaluation.isic_scoring import write_submission
from training.evaluation.leakage import check_overlap, seen_images
from training.evaluation.served_predictions import conformal_sets, nine_probabilities, predict_rows
from training.evaluation.suspicion_report import suspicion_report

ALL = "all"
# Columns of the printed table by source, and the figures of a slice that they show.
SOURCE_FIGURES = {
    "accuracy": "accuracy",
    "balanced accuracy": "balanced_accuracy",
    "macro AUC": "macro_auc",
    "calibration error": "ece",
    "coverage by lesion": "coverage_by_lesion",
    "mean set size": "mean_set_size",
}


def open_rows(data: Path, split: str | None, folder: Path) -> tuple[pd.DataFrame, str]:
    """Return the rows to evaluate and their split: by default test of a manifest, and all of a folder of images.

    Args:
        folder: gets the manifest that is made of a folder of images.

    Raises:
        ManifestError: there are no usable images.
    """
    if data.is_dir():
        with progress_bar("reading images") as progress:
            build_manifest([data], folder / "manifest.csv", progress=progress)
        frame, split = read_manifest(folder / "manifest.csv"), split or ALL
    else:
        frame, split = read_manifest(data), split or "test"
    rows = frame if split == ALL else frame[frame["split"] == split]
    if rows.empty:
        splits = ", ".join(sorted(set(frame["split"])))
        raise ManifestError(f"{data} has no images in the split {split!r}; choose one of {splits}.")
    return rows.reset_index(drop=True), split


def run_prefix(data: Path, is_own: bool, split: str, tta: bool, picture_alone: bool) -> str:
    """Return the name of an evaluation in its MLflow run; evaluations with other figures have other names.

    Args:
        is_own: the data is the manifest that the model was made from, which the name leaves out.
    """
    path = data.resolve()
    data_name = path.name if path.is_dir() else f"{path.parent.name}_{path.stem}"
    words = [] if is_own else [re.sub(r"[^A-Za-z0-9.-]", "_", data_name)]
    options = {"picture_alone": picture_alone, "tta": tta}
    return "_".join(["evaluation", *words, split, *(name for name, is_set in options.items() if is_set)])


def evaluate(rows: pd.DataFrame, predictions: Sequence[Prediction], resamples: int = 1000) -> dict[str, Any]:
    """Return the report (training.evaluation.evaluation_report) with its slices and its alarms."""
    probabilities, sets = nine_probabilities(predictions), conformal_sets(predictions)
    report = build_report(rows["label"].tolist(), probabilities, sets, rows["lesion_id"].tolist(), resamples)
    by_slice = slices(rows, probabilities, resamples, sets)
    report |= {"slices": by_slice, "weakest_slice": weakest_slice(by_slice)}
    return report | {"suspicion": suspicions(rows, predictions, resamples)}


def unseen_by_both(rows: pd.DataFrame, bundle: Path, against: Path) -> NDArray[np.bool_]:
    """Return which rows neither bundle was made from (N,).

    Raises:
        BundleError: a bundle has no readable receipt.
        ManifestError: no image of a known class is left.
    """
    unseen = ~rows["image_id"].isin(seen_images(bundle, rows) | seen_images(against, rows)).to_numpy(bool)
    if not (unseen & rows["label"].isin(KNOWN_CODES).to_numpy()).any():
        raise ManifestError(f"{bundle} or {against} was made from all known lesions here; compare on other images.")
    return unseen


def compare(
    rows: pd.DataFrame,
    predictions: Sequence[Prediction],
    against: Path,
    unseen: NDArray[np.bool_],
    resamples: int,
    **options: Any,
) -> dict[str, Any]:
    """Compare the predictions with those of the bundle `against`, on the rows that are `unseen` by both.

    Args:
        options: of predict_rows.

    Raises:
        BundleError: the bundle is damaged.
        ManifestError: an image cannot be read.
    """
    other, shared = Predictor.load(against), rows[unseen].reset_index(drop=True)
    ours = [prediction for prediction, is_shared in zip(predictions, unseen, strict=True) if is_shared]
    others = predict_rows(other, shared, **options)
    with console.status("Comparing the bundles"):
        comparison = compare_bundles(shared, ours, others, resamples)
    return {"bundle": other.bundle.digest, "seen": int((~unseen).sum()), **comparison}


def suspicions(rows: pd.DataFrame, predictions: Sequence[Prediction], resamples: int) -> dict[str, Any]:
    """Return the report of each alarm of the bundle that promises something."""
    answers = {
        MALIGNANT: [prediction.malignant for prediction in predictions],
        MELANOMA: [prediction.melanoma for prediction in predictions],
    }
    reports = {}
    for name, suspicions in answers.items():
        present = [suspicion for suspicion in suspicions if suspicion is not None]
        if present and present[0].alarm.promises:
            shares = np.array([suspicion.share for suspicion in present])
            reports[name] = suspicion_report(rows, present[0].alarm, shares, resamples)
    return {name: report for name, report in reports.items() if report["sources"]}  # else there are too few lesions


def diagrams(rows: pd.DataFrame, predictions: Sequence[Prediction], report: dict[str, Any]) -> dict[str, Figure]:
    """Return the figures over the known lesions, by file name."""
    is_known = rows["label"].isin(KNOWN_CODES).to_numpy()
    labels = np.array([KNOWN_CODES.index(label) for label in rows["label"][is_known]])
    eight = conditional(nine_probabilities(predictions)[is_known])
    return {
        "confusion.png": confusion_figure(report["confusion"], KNOWN_CODES),
        "roc.png": roc_figure(labels, eight, KNOWN_CODES),
        "precision_recall.png": precision_recall_figure(labels, eight, KNOWN_CODES),
        "reliability.png": reliability_figure(labels, eight),
        "classes.png": class_bars_figure(report["per_class"], report["per_class_intervals_95"]),
        "risk_coverage.png": risk_coverage_figure(labels, eight),
        **{f"alarm_{name}.png": operating_figure(suspicion) for name, suspicion in report["suspicion"].items()},
    }


def report_text(rows: pd.DataFrame, predictions: Sequence[Prediction]) -> str:
    """Return scikit-learn's classification report over the codes that are true or predicted."""
    predicted = [prediction.code for prediction in predictions]
    codes = [code for code in CODES if code in set(rows["label"]) | set(predicted)]
    return str(classification_report(rows["label"], predicted, labels=codes, digits=3, zero_division=0))


def main(
    bundle: BundleOption,
    data: Annotated[Path, typer.Option(help="A manifest.csv, written by prepare_data.py, or a folder of images.")],
    out: OutOption,
    split: Annotated[
        str | None,
        typer.Option(
            help="Split of the manifest: train, val, calibration, test or all.",
            show_default="test; all for a folder",
        ),
    ] = None,
    tta: Annotated[bool, typer.Option(help="Average over each picture and its mirror images.")] = False,
    picture_alone: Annotated[
        bool, typer.Option("--picture-alone", help="Do not use the manifest's age, sex and site.")
    ] = False,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamples of the lesions for the intervals; 0: none.")] = 1000,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Another bundle, to be compared on the same images. Images that it was made from are left out."
        ),
    ] = None,
    submission: Annotated[
        Path | None, typer.Option(help="File for the probabilities in the format of the ISIC 2019 challenge.")
    ] = None,
    allow_overlap: AllowOverlapOption = False,
) -> None:
    """Evaluate a bundle on images that it has not seen, as it would be served.

    Writes metrics.json (figures with 95 % intervals by bootstrap over lesions, by class, source, site, sex and age;
    with --against also the other bundle's and the differences), report.txt, and pictures: confusion matrix, ROC and
    precision-recall curves, reliability diagram, bars by class, risk against coverage, the alarm's operating curve by
    source, and sheets of right and wrong examples and of the costliest errors, with heatmaps. They are also logged to
    the MLflow run that made the bundle, if the store (MLFLOW_TRACKING_URI, or the stack's server) has it.

    The bundle's receipt is used to refuse images, lesions and near-duplicates that the model was made from.
    """
    Settings.load()  # a wrong setting is an error before the work, not after it
    with tempfile.TemporaryDirectory() as temporary:
        rows, split = open_rows(data, split, Path(temporary))
        overlap = check_overlap(bundle, rows, allow_overlap)
        predictor = Predictor.load(bundle)
        unseen = unseen_by_both(rows, bundle, against) if against else None
        predictions = predict_rows(predictor, rows, tta, picture_alone)
        with console.status("Computing the figures and their intervals"):
            report = evaluate(rows, predictions, bootstrap)
        if against and unseen is not None:
            options = {"tta": tta, "picture_alone": picture_alone}
            report["against"] = compare(rows, predictions, against, unseen, bootstrap, **options)
        figures = diagrams(rows, predictions, report)
        figures["examples.png"] = examples(predictor, rows, predictions, picture_alone)
        if errors := costliest_errors(predictor, rows, predictions, picture_alone):
            figures["errors.png"] = errors
        shutil.copytree(temporary, out, dirs_exist_ok=True)  # the manifest made of a folder, after all refusals

    header = {
        "bundle": predictor.bundle.digest,
        "tta": tta,
        **{name: predictions[0].model[name] for name in ("runtime", "precision")},
        "metadata": [] if picture_alone else list(predictor.config.metadata.fields),
        "data": fingerprint(rows),
        "split": split,
        "overlap": overlap,
        "resamples": bootstrap,
    }
    write_json(out / "metrics.json", header | report)
    (out / "report.txt").write_text(report_text(rows, predictions), encoding="utf-8")
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=110)
    if submission:
        write_submission(submission, rows["image_id"], nine_probabilities(predictions))
    show(report)
    console.print(f"Written to {out}.")
    if run_id := predictor.config.evidence.get("run_id"):
        is_own = data.is_file() and fingerprint(read_manifest(data)) == read_receipt(bundle).dataset_fingerprint
        prefix = run_prefix(data, is_own, split, tta, picture_alone)
        console.print(log_evaluation(run_id, out, prefix, headline(report)))


def show(report: dict[str, Any]) -> None:
    """Print the figures by source and the weakest slice, the single figures, and the comparison with another bundle."""
    console.print(_source_table(report["slices"]["source"]))
    if weakest := report["weakest_slice"]:
        console.print(
            f"The weakest slice is {weakest['column']} {weakest['value']}: macro AUC {weakest['macro_auc']:.3f}."
        )
    shown = table("", ["figure", "value", "95 % interval (bootstrap over lesions)"])
    for name, value in headline(report).items():
        shown.add_row(name, _number(value), _interval(report["intervals_95"].get(name)))
    console.print(f"{report['images']:,} images of {report['lesions']:,} lesions")
    console.print(shown)
    if comparison := report.get("against"):
        console.print(
            f"Compared on {comparison['all']['images']:,} images; a bundle has seen {comparison['seen']:,} others."
        )
        console.print(_comparison_table(comparison["all"]))


def _source_table(sources: dict[str, Any]) -> Table:
    shown = table("", ["source", "images", "lesions", *SOURCE_FIGURES])
    for source, figures in sources.items():
        cells = [_number(figures[key]) if key in figures else "" for key in SOURCE_FIGURES.values()]
        shown.add_row(source, f"{figures['images']:,}", f"{figures['lesions']:,}", *cells)
    return shown


def _comparison_table(figures: dict[str, Any]) -> Table:
    shown = table("", ["figure", "this bundle", "the other", "difference", "95 % interval (paired)"])
    for name, row in figures.items():
        if name != "images":
            values = (_number(row[key]) for key in ("value", "against", "difference"))
            shown.add_row(name, *values, _interval(row.get("interval_95")))
    return shown


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _interval(bounds: Sequence[float] | None) -> str:
    return f"{bounds[0]:.3f} to {bounds[1]:.3f}" if bounds else ""


if __name__ == "__main__":
    run(
        main,
        examples=[
            "python training/evaluate.py --bundle model_store/skin_vit --data data/manifest.csv --out runs/evaluation",
            "python training/evaluate.py --bundle model_store/skin_vit --data my_clinic --tta --out runs/clinic",
            "python training/evaluate.py --bundle RUN/bundle --against model_store/skin_vit --data my_clinic --out OUT",
        ],
    )
