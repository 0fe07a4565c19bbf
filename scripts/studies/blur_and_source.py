"""A study of whether a model uses a picture's sharpness, or the data set that it comes from, as evidence.

Sharpness: the same pictures, shrunk to several sides, get answers of the same quality. Source: a linear classifier on
the network's features should tell the data sets apart hardly better than one that sees only the true class.
"""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from handlers.decoding import decode
from handlers.files import write_json
from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.preprocessing import Preprocessing
from handlers.request import Request
from handlers.taxonomy import KNOWN_CODES
from mlflow_tracking import classification_metrics as metrics
from mlflow_tracking.command_line import console, progress_bar, run
from scripts.studies.extractor import Extractor
from scripts.studies.study_error import StudyError
from training.data.manifest import fingerprint
from training.evaluation.command_options import (
    AllowOverlapOption,
    BundleOption,
    ManifestOption,
    OutOption,
    SplitOption,
    known_lesions,
)
from training.evaluation.evaluation_report import MIN_SLICE, conditional
from training.evaluation.leakage import check_overlap
from training.evaluation.served_predictions import nine_probabilities

SIDES = (84, 128, 200, 256, 384)  # shorter side in pixels; 84, 256 and 384 are sides of public data sets
ANY_SIDE = 0  # the picture as it is
SHARP = 200  # pictures with a smaller side are already blurred
FOLDS = 5
REGULARISATION = 0.01  # C of the logistic regression
BATCH = 32
EXAMPLES = [
    "python scripts/studies/blur_and_source.py --bundle model_store/skin_vit --data data/manifest.csv --out runs/blur"
]


def opened(path: str, side: int) -> Image.Image:
    """Return a picture with this shorter side; a smaller picture, or any with ANY_SIDE, as it is."""
    image = decode(Path(path).read_bytes()).image
    shorter = min(image.size)
    if side == ANY_SIDE or shorter <= side:
        return image
    width, height = (max(1, round(length * side / shorter)) for length in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def answers_at(predictor: Predictor, rows: pd.DataFrame, side: int) -> NDArray[np.float64]:
    """Return the nine probabilities (N, 9) of the rows' pictures, shrunk to a shorter side. Raises StudyError."""
    predictions: list[Prediction] = []
    with progress_bar(f"{side} px") as progress:
        for start in range(0, len(rows), BATCH):
            paths = rows["path"].iloc[start : start + BATCH]
            requests = [Request(_png(opened(path, side)), gradcam="none") for path in paths]
            for path, answer in zip(paths, predictor.predict(requests), strict=True):
                if not isinstance(answer, Prediction):
                    raise StudyError(f"{path} at {side} px has no answer. {answer}")
                predictions.append(answer)
            progress(len(predictions), len(rows))
    return nine_probabilities(predictions)


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG", compress_level=1)
    return data.getvalue()


def by_sharpness(predictor: Predictor, rows: pd.DataFrame) -> dict[str, Any]:
    """Return macro AUC and balanced accuracy of the same pictures at each side.

    The pictures are those whose shorter side has at least this many pixels, and at least SHARP. `auc_change` compares
    with the same pictures as they are.
    """
    shorter = np.array([min(opened(path, ANY_SIDE).size) for path in rows["path"]])
    table: dict[str, Any] = {}
    whole: dict[int, NDArray[np.float64]] = {}  # by the smallest side of the pictures
    for side in SIDES:
        smallest = max(side, SHARP)
        usable = rows[shorter >= smallest].reset_index(drop=True)
        if usable["label"].nunique() < 2 or len(usable) < MIN_SLICE:
            continue
        if smallest not in whole:
            whole[smallest] = conditional(answers_at(predictor, usable, ANY_SIDE))
        eight = conditional(answers_at(predictor, usable, side))
        truth = np.array([KNOWN_CODES.index(label) for label in usable["label"]])
        auc = metrics.macro_auc(truth, eight)
        table[str(side)] = {
            "images": len(usable),
            "macro_auc": auc,
            "auc_change": auc - metrics.macro_auc(truth, whole[smallest]),
            "balanced_accuracy": metrics.balanced_accuracy(truth, eight),
        }
    return table


def several_sources(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the sources with at least MIN_SLICE rows. Raises StudyError if there are fewer than two."""
    counts = rows["source"].value_counts()
    rows = rows[rows["source"].isin(counts.index[counts >= MIN_SLICE])].reset_index(drop=True)
    if rows["source"].nunique() < 2:
        raise StudyError(
            "The split has fewer than two sources with 30 images; prepare a manifest of several data sets."
        )
    return rows


def by_source(predictor: Predictor, rows: pd.DataFrame) -> dict[str, Any]:
    """Return how well linear classifiers tell the sources apart: balanced accuracy, cross-validated over lesions.

    They see the true class alone, the features of the pictures as they are, or those of the pictures at the smallest
    side, where the sources are equally blurred.
    """
    extract, preprocessing = Extractor(predictor.bundle), predictor.config.preprocessing
    inputs = {
        "true class alone": pd.get_dummies(rows["label"]).to_numpy(float),
        "features": extract(_pixels(rows, preprocessing, ANY_SIDE)).features,
        f"features at {SIDES[0]} px": extract(_pixels(rows, preprocessing, SIDES[0])).features,
    }
    return {
        "sources": {str(name): int(count) for name, count in rows["source"].value_counts().items()},
        "chance": 1 / rows["source"].nunique(),
        "balanced_accuracy": {name: _separability(values, rows) for name, values in inputs.items()},
    }


def _pixels(rows: pd.DataFrame, preprocessing: Preprocessing, side: int) -> NDArray[np.uint8]:
    return np.stack([preprocessing.resize(opened(path, side)) for path in rows["path"]])


def _separability(inputs: NDArray[np.float64], rows: pd.DataFrame) -> float:
    model = LogisticRegression(C=REGULARISATION, class_weight="balanced", max_iter=2000)
    pipeline, folds = make_pipeline(StandardScaler(), model), StratifiedGroupKFold(FOLDS)
    predicted = cross_val_predict(pipeline, inputs, rows["source"], groups=rows["lesion_id"], cv=folds)
    return float(balanced_accuracy_score(rows["source"], predicted))


def main(
    bundle: BundleOption,
    data: ManifestOption,
    out: OutOption,
    split: SplitOption = "test",
    allow_overlap: AllowOverlapOption = False,
) -> None:
    """Measure whether a model uses sharpness or the source of a picture as evidence.

    Writes blur_and_source.json and prints its tables.
    """
    rows = known_lesions(data, split)
    overlap = check_overlap(bundle, rows, allow_overlap)
    sourced = several_sources(rows)
    predictor = Predictor.load(bundle)
    study = {
        "bundle": predictor.bundle.digest,
        "data": fingerprint(rows),
        "split": split,
        "overlap": overlap,
        "sharpness": by_sharpness(predictor, rows),
        "source": by_source(predictor, sourced),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "blur_and_source.json", study)
    show(study)
    console.print(f"Written: {out / 'blur_and_source.json'}.")


def show(study: dict[str, Any]) -> None:
    """Print both tables."""
    sharpness = Table("shorter side in pixels", "images", "macro AUC", "change", "balanced accuracy")
    for side, row in study["sharpness"].items():
        figures = (f"{row['macro_auc']:.3f}", f"{row['auc_change']:+.3f}", f"{row['balanced_accuracy']:.3f}")
        sharpness.add_row(side, f"{row['images']:,}", *figures)
    source = Table("a linear classifier sees", "tells the sources apart (balanced accuracy)")
    for name, value in study["source"]["balanced_accuracy"].items():
        source.add_row(name, f"{value:.3f}")
    source.add_row("nothing (chance)", f"{study['source']['chance']:.3f}")
    console.print(sharpness)
    console.print(source)


if __name__ == "__main__":
    run(main, examples=EXAMPLES)
