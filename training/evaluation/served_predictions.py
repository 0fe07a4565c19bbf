"""A bundle's predictions for the rows of a manifest, as served: from the pictures' bytes through handlers.predictor."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.request import Request
from handlers.taxonomy import CODES
from mlflow_tracking.command_line import progress_bar
from training.data.manifest import ManifestError

BATCH = 32


def predict_rows(
    predictor: Predictor,
    rows: pd.DataFrame,
    tta: bool = False,
    picture_alone: bool = False,
    label: str = "evaluating",
) -> list[Prediction]:
    """Predict every row's image, without heatmap, with the row's metadata unless `picture_alone`.

    `label` names the progress bar.

    Raises:
        ManifestError: an image cannot be read.
    """
    predictions: list[Prediction] = []
    with progress_bar(label) as progress:
        for start in range(0, len(rows), BATCH):
            batch = rows.iloc[start : start + BATCH]
            predictions += _predict(predictor, batch, picture_alone, gradcam="none", tta=tta)
            progress(len(predictions), len(rows))
    return predictions


def explain_rows(predictor: Predictor, rows: pd.DataFrame, picture_alone: bool = False) -> list[Prediction]:
    """Predict the images of a few rows with the heatmap over the picture. Raises ManifestError."""
    return _predict(predictor, rows, picture_alone, gradcam="overlay")


def nine_probabilities(predictions: Sequence[Prediction]) -> NDArray[np.float64]:
    """Return the probabilities of predictions, (N, 9) in taxonomy order."""
    return np.array([[prediction.probabilities[code] for code in CODES] for prediction in predictions])


def conformal_sets(predictions: Sequence[Prediction]) -> list[list[str]] | None:
    """Return the conformal set of each prediction; None if the model has none."""
    if predictions[0].conformal_set is None:
        return None
    return [prediction.conformal_set or [] for prediction in predictions]


def _predict(predictor: Predictor, rows: pd.DataFrame, picture_alone: bool, **options: Any) -> list[Prediction]:
    inputs, requests = predictor.config.metadata, []
    for path, row in zip(rows["path"], rows[list(inputs.fields)].to_dict("records"), strict=True):
        try:
            metadata = {} if picture_alone else inputs.understood(row)
            requests.append(Request(Path(path).read_bytes(), metadata=metadata, **options))
        except OSError as error:
            raise ManifestError(f"{path} cannot be read ({error.strerror}); prepare the manifest again.") from error
    predictions = []
    for path, prediction in zip(rows["path"], predictor.predict(requests), strict=True):
        if not isinstance(prediction, Prediction):
            raise ManifestError(f"{path} cannot be evaluated. {prediction}")
        predictions.append(prediction)
    return predictions
