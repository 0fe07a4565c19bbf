"""A study of training recipes on pictures from elsewhere: each data set is left out in turn.

A model is trained without one source and judged on the pictures of that source. A second recipe is trained on the same
pictures, and so on. Splits, lesions and patients stay as the manifest has them.
"""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import typer
from rich.table import Table

from handlers.bundle import Bundle
from handlers.files import write_json
from handlers.predictor import Predictor
from handlers.taxonomy import CODES, KNOWN_CODES, MALIGNANT
from mlflow_tracking import classification_metrics as metrics
from mlflow_tracking.command_line import console, run
from scripts.studies.small_trainings import trained_bundle
from scripts.studies.study_error import StudyError
from training.config import load_config
from training.data.manifest import fingerprint, read_manifest
from training.evaluation.command_options import ManifestOption
from training.evaluation.evaluation_report import MIN_SLICE, conditional
from training.evaluation.served_predictions import nine_probabilities, predict_rows

RESAMPLES = 500
AS_IS = "preset"
FIGURES = ("macro_auc", "malignant_auc", "balanced_accuracy", "ece")
EXAMPLES = [
    "python scripts/studies/left_out_sources.py --data data/manifest.csv --out runs/left_out --source ham10000 "
    "--setting image_size=96 --setting epochs=3 --recipe resample=0",
]


def leave_out(frame: pd.DataFrame, source: str) -> pd.DataFrame:
    """Return the manifest without the source's training, validation and calibration pictures.

    All pictures of the source are in the split test; pictures of other sources that share one of its lesions or
    patients are dropped. Raises StudyError if the source has fewer than MIN_SLICE pictures of known lesions.
    """
    rows = frame[frame["source"] == source]
    if int(rows["label"].isin(KNOWN_CODES).sum()) < MIN_SLICE:
        names = ", ".join(sorted(set(frame["source"])))
        raise StudyError(f"The source {source!r} has fewer than {MIN_SLICE} lesions' pictures; choose one of {names}.")
    others = frame[(frame["source"] != source) & (frame["split"] != "test")]
    shared = others["lesion_id"].isin(rows["lesion_id"]) | others["patient_id"].isin(set(rows["patient_id"]) - {""})
    return pd.concat([others[~shared], rows.assign(split="test")], ignore_index=True)


def judge(bundle: Bundle, rows: pd.DataFrame) -> dict[str, Any]:
    """Return a model's figures on known lesions, with 95 % intervals by bootstrap over lesions.

    `malignant_auc` is that of the malignant classes' sum against the benign lesions.
    """
    rows = rows[rows["label"].isin(KNOWN_CODES)].reset_index(drop=True)
    eight = conditional(nine_probabilities(predict_rows(Predictor(bundle), rows, picture_alone=True)))
    truth = np.array([CODES.index(label) for label in rows["label"]])
    is_malignant = MALIGNANT[: len(KNOWN_CODES)]

    def figures(chosen: metrics.Labels) -> list[float]:
        y, p = truth[chosen], eight[chosen]
        malignant_auc = metrics.area_under_roc(is_malignant[y], p[:, is_malignant].sum(1))
        return [metrics.macro_auc(y, p), malignant_auc, metrics.balanced_accuracy(y, p),
                metrics.expected_calibration_error(y, p)]  # fmt: skip

    draws = np.array([figures(chosen) for chosen in metrics.resampled(rows["lesion_id"], RESAMPLES)])
    values = zip(FIGURES, figures(np.arange(len(rows))), strict=True)
    return {
        "images": len(rows),
        **{name: {"value": value, "interval_95": metrics.interval(draws[:, place])}
           for place, (name, value) in enumerate(values)},
    }  # fmt: skip


def show(study: dict[str, Any]) -> None:
    """Print a row for each source and recipe."""
    table = Table("source left out", "images", "recipe", *(name.replace("_", " ") for name in FIGURES))
    for source, recipes in study["sources"].items():
        for recipe, row in recipes.items():
            cells = [
                "{value:.3f} ({0:.3f} to {1:.3f})".format(*row[name]["interval_95"], **row[name]) for name in FIGURES
            ]
            table.add_row(source, f"{row['images']:,}", recipe, *cells)
    console.print(table)


def main(
    data: ManifestOption,
    out: Annotated[Path, typer.Option(help="Folder for the models and left_out_sources.json.")],
    source: Annotated[list[str], typer.Option(help="A source to leave out; repeat for more.")],
    config: Annotated[str, typer.Option(help="Preset of the models.")] = "dermoscopy",
    setting: Annotated[
        list[str] | None, typer.Option(help="A setting for all models, such as epochs=3; repeat for more.")
    ] = None,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help="Settings of one more recipe, separated by spaces; repeat for more. The preset is the first."
        ),
    ] = None,
) -> None:
    """Train without each source in turn, by each recipe, and judge the models on the source that was left out.

    The folder keeps the trained models, so an interrupted study continues where it stopped.
    """
    recipes = {AS_IS: [*(setting or ())]} | {text: [*(setting or ()), *text.split()] for text in recipe or ()}
    for settings in recipes.values():
        load_config(config, settings)  # a wrong setting is reported before the work
    frame = read_manifest(data)
    rows = {name: leave_out(frame, name) for name in source}
    results: dict[str, dict[str, Any]] = {name: {} for name in source}
    for number, (text, settings) in enumerate(recipes.items()):
        for name in source:
            folder = (out / f"without_{name}_{number}").resolve()
            bundle = trained_bundle(
                rows[name], config, [f"name=without_{name}", *settings], folder, (out / "cache").resolve()
            )
            results[name][text] = judge(bundle, rows[name][rows[name]["split"] == "test"])
    study = {"data": fingerprint(frame), "config": config, "settings": setting or [], "sources": results}
    write_json(out / "left_out_sources.json", study)
    show(study)
    console.print(f"Written: {out / 'left_out_sources.json'}.")


if __name__ == "__main__":
    run(main, examples=EXAMPLES)
