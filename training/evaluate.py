"""Judge a bundle on images it has not seen: `python training/evaluate.py --bundle DIR --data MANIFEST --out DIR`.

The images go through handlers.predictor, byte by byte what serving does, so the figures are those of the served model.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table
from sklearn.metrics import classification_report

from handlers.bundle import BundleError
from handlers.files import write_json
from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.receipt import read_receipt
from handlers.request import Request
from handlers.taxonomy import CODES, KNOWN_CODES
from mlflow_tracking.command_line import console, errors, progress_bar
from mlflow_tracking.runs import log_evaluation
from mlflow_tracking.settings import Settings, SettingsError
from training.data.manifest import ManifestError, fingerprint, read_manifest
from training.data.preparation import build_manifest
from training.evaluation.assessment import assess, conditional, headline, slices
from training.evaluation.figures import (
    class_bars_figure,
    confusion_figure,
    examples_figure,
    precision_recall_figure,
    reliability_figure,
    risk_coverage_figure,
    roc_figure,
)
from training.evaluation.isic_scoring import write_submission
from training.evaluation.leakage import check_overlap

BATCH = 32
THUMBNAIL = 256  # pixels, of the example sheet's pictures
ALL = "all"


def open_rows(data: Path, split: str | None, out: Path) -> tuple[pd.DataFrame, str]:
    """The rows to evaluate, and their split: of a manifest the given one (default test), of a folder with images all.

    A folder is recognised as scripts/prepare_data.py does, and its manifest left in `out`.

    Raises:
        ManifestError: nothing usable is there.
    """
    if data.is_dir():
        out.mkdir(parents=True, exist_ok=True)
        with progress_bar("reading images") as progress:
            build_manifest([data], out / "manifest.csv", progress=progress)
        data, split = out / "manifest.csv", split or ALL
    frame, split = read_manifest(data), split or "test"
    rows = frame if split == ALL else frame[frame["split"] == split]
    if rows.empty:
        raise ManifestError(f"{data} has no images in the split {split!r}; it has {', '.join(set(frame['split']))}.")
    return rows.reset_index(drop=True), split


def run_prefix(data: Path, own: bool, split: str, tta: bool, picture_alone: bool) -> str:
    """Under which name an evaluation stands in its MLflow run: another for each thing that makes other figures.

    `own`: the data is the manifest that the model was made from, which needs no name.
    """
    path = data.resolve()
    name = "" if own else path.name if path.is_dir() else f"{path.parent.name}_{path.stem}"
    words = [re.sub(r"[^A-Za-z0-9.-]", "_", name)] if name else []
    ways = {"picture_alone": picture_alone, "tta": tta}
    return "_".join(["evaluation", *words, split, *(way for way, asked in ways.items() if asked)])


def ask(predictor: Predictor, rows: pd.DataFrame, tta: bool = False, picture_alone: bool = False) -> list[Prediction]:
    """The model's answer to every row's image, without heatmaps, told what it takes of the row's age, sex and site
    unless asked for the `picture_alone`. Raises ManifestError if an image cannot be read."""
    answers: list[Prediction] = []
    with progress_bar("evaluating") as progress:
        for start in range(0, len(rows), BATCH):
            part = rows.iloc[start : start + BATCH]
            answers += _ask(predictor, part, picture_alone, gradcam="none", tta=tta)
            progress(len(answers), len(rows))
    return answers


def _ask(predictor: Predictor, rows: pd.DataFrame, picture_alone: bool, **options: Any) -> list[Prediction]:
    takes, paths = predictor.config.metadata, rows["path"]
    told = [{} if picture_alone else takes.understood(row) for row in rows[list(takes.fields)].to_dict("records")]
    try:
        requests = [
            Request(Path(path).read_bytes(), metadata=values, **options)
            for path, values in zip(paths, told, strict=True)
        ]
    except OSError as error:
        raise ManifestError(f"{error.filename} cannot be read ({error.strerror}).") from error
    answers = []
    for path, answer in zip(paths, predictor.predict(requests), strict=True):
        if not isinstance(answer, Prediction):
            raise ManifestError(f"{path}: {answer}")
        answers.append(answer)
    return answers


def nine_of(answers: Sequence[Prediction]) -> NDArray[np.float64]:
    """The probabilities of answers, (N, 9) in taxonomy order."""
    return np.array([[answer.probabilities[code] for code in CODES] for answer in answers])


def evaluate(rows: pd.DataFrame, answers: Sequence[Prediction], resamples: int = 1000) -> dict[str, Any]:
    """The table of training.evaluation.assessment.assess, with the slices beside it."""
    probabilities = nine_of(answers)
    has_sets = bool(answers) and answers[0].conformal_set is not None
    sets = [answer.conformal_set or [] for answer in answers] if has_sets else None
    table = assess(rows["label"].tolist(), probabilities, sets, rows["lesion_id"].tolist(), resamples)
    return table | {"slices": slices(rows, probabilities, resamples)}


def pictures(rows: pd.DataFrame, answers: Sequence[Prediction], table: dict[str, Any]) -> dict[str, Figure]:
    """Every figure but the example sheet, by file name; over the known lesions."""
    keep = rows["label"].isin(KNOWN_CODES).to_numpy()
    labels = np.array([KNOWN_CODES.index(label) for label in rows["label"][keep]])
    known = conditional(nine_of(answers)[keep])
    return {
        "confusion.png": confusion_figure(table["confusion"], KNOWN_CODES),
        "roc.png": roc_figure(labels, known, KNOWN_CODES),
        "precision_recall.png": precision_recall_figure(labels, known, KNOWN_CODES),
        "reliability.png": reliability_figure(labels, known),
        "classes.png": class_bars_figure(table["per_class"], table["per_class_intervals_95"]),
        "risk_coverage.png": risk_coverage_figure(labels, known),
    }


def examples(
    predictor: Predictor, rows: pd.DataFrame, answers: Sequence[Prediction], picture_alone: bool = False
) -> Figure:
    """For each true class the surest right answer, the surest wrong one, and the least sure, with their heatmaps."""
    nine = nine_of(answers)
    top, sure = nine.argmax(1), nine.max(1)
    truth = np.array([CODES.index(label) for label in rows["label"]])
    sheet = []
    for k in np.unique(truth):
        mine, right = truth == k, top == k
        wanted = [(mine & right, sure), (mine & ~right, sure), (mine, -sure)]
        places = [int(np.argmax(np.where(among, score, -2))) if among.any() else None for among, score in wanted]
        chosen = [place for place in places if place is not None]
        drawn = dict(zip(chosen, _ask(predictor, rows.iloc[chosen], picture_alone, gradcam="overlay"), strict=True))
        cells = [None if place is None else _cell(drawn[place]) for place in places]
        sheet.append((CODES[k], cells))
    return examples_figure(sheet)


def _cell(answer: Prediction) -> tuple[Image.Image, Image.Image, str]:
    pair = [answer.image.image.copy(), Image.open(io.BytesIO(answer.overlay_png or b""))]
    for picture in pair:
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return pair[0], pair[1], f"{answer.code} {answer.probabilities[answer.code]:.2f}"


def report_text(rows: pd.DataFrame, answers: Sequence[Prediction]) -> str:
    """scikit-learn's classification report over the codes that are in the data or in the answers."""
    predicted = [answer.code for answer in answers]
    codes = [code for code in CODES if code in set(rows["label"]) | set(predicted)]
    return str(classification_report(rows["label"], predicted, labels=codes, digits=3, zero_division=0))


def main(
    bundle: Annotated[Path, typer.Option(help="The bundle's folder.")],
    data: Annotated[Path, typer.Option(help="A manifest.csv, as prepare_data writes it, or a folder of images.")],
    out: Annotated[Path, typer.Option(help="Folder for metrics.json and the figures.")],
    split: Annotated[
        str | None,
        typer.Option(
            help="Which split of the manifest: train, val, calibration, test or all.",
            show_default="test; of a folder all",
        ),
    ] = None,
    tta: Annotated[bool, typer.Option(help="Average over each picture and its mirror images.")] = False,
    picture_alone: Annotated[
        bool, typer.Option("--picture-alone", help="Do not tell a model that takes them age, sex and site.")
    ] = False,
    bootstrap: Annotated[int, typer.Option(min=0, help="Resamplings of the lesions for the intervals; 0: none.")] = (
        1000
    ),
    submission: Annotated[
        Path | None, typer.Option(help="Also write the probabilities in the ISIC 2019 challenge's form.")
    ] = None,
    allow_overlap: Annotated[
        bool, typer.Option("--allow-overlap", help="Evaluate even on images that the model was made from.")
    ] = False,
) -> None:
    """Evaluate a bundle on images it has not seen, as it would be served.

    Writes metrics.json (figures with 95 % intervals by bootstrap over lesions, by class, source, site, sex and age),
    report.txt, and pictures: confusion matrix, ROC and precision-recall curves, reliability diagram, bars by class,
    risk against coverage, and a sheet of right and wrong examples with their heatmaps. If the bundle names the MLflow
    run that made it, and the store (MLFLOW_TRACKING_URI, or the stack's server) knows it, they are logged there too.

    Images, lesions and near duplicates that the model was made from are refused by the receipt in the bundle.

    Examples:

    python training/evaluate.py --bundle model_store/skin_vit --data data/manifest.csv --out runs/evaluation

    python training/evaluate.py --bundle model_store/skin_vit --data my_clinic --tta --out runs/clinic
    """
    try:
        Settings.load()  # a wrong one is told before the work, not after it
        rows, split = open_rows(data, split, out)
        seen = check_overlap(bundle, rows, allow_overlap)
        predictor = Predictor.load(bundle)
        answers = ask(predictor, rows, tta, picture_alone)
        table = evaluate(rows, answers, bootstrap)
        sheet = examples(predictor, rows, answers, picture_alone)
        figures = pictures(rows, answers, table) | {"examples.png": sheet}
    except (ManifestError, BundleError, SettingsError, ValueError) as error:
        errors.print(str(error))
        raise SystemExit(1) from None

    out.mkdir(parents=True, exist_ok=True)
    described = {"bundle": predictor.bundle.digest, "tta": tta}
    described |= {name: answers[0].model[name] for name in ("runtime", "precision")}
    described["metadata"] = [] if picture_alone else list(predictor.config.metadata.fields)
    described |= {"data": fingerprint(rows), "split": split, "overlap": seen, "resamples": bootstrap}
    write_json(out / "metrics.json", described | table)
    (out / "report.txt").write_text(report_text(rows, answers), encoding="utf-8")
    for name, figure in figures.items():
        figure.savefig(out / name, dpi=110)
    if submission:
        write_submission(submission, rows["image_id"], nine_of(answers))
    show(table)
    console.print(f"Written to {out}.")
    if run_id := predictor.config.evidence.get("run_id"):
        made_from = read_receipt(bundle).dataset_fingerprint
        own = data.is_file() and fingerprint(read_manifest(data)) == made_from
        console.print(log_evaluation(run_id, out, run_prefix(data, own, split, tta, picture_alone), headline(table)))


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
