"""Sheets of pictures with heatmaps: right and wrong examples of each class, and the errors that cost most."""

import io
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from handlers.prediction import Prediction
from handlers.predictor import Predictor
from handlers.taxonomy import CODES, MALIGNANT, UNKNOWN
from training.evaluation.figures import examples_figure
from training.evaluation.served_predictions import explain_rows, nine_probabilities

THUMBNAIL = 256  # side of a picture in pixels
ERRORS_SHOWN = 4  # of each kind

Cell = tuple[Image.Image, Image.Image, str]


def examples(
    predictor: Predictor, rows: pd.DataFrame, predictions: Sequence[Prediction], picture_alone: bool = False
) -> Figure:
    """Show for each true class the surest right, the surest wrong, and the least sure prediction, with heatmaps."""
    nine = nine_probabilities(predictions)
    top, confidence = nine.argmax(1), nine.max(1)
    truth = np.array([CODES.index(label) for label in rows["label"]])
    sheet = []
    for k in np.unique(truth):
        mine, right = truth == k, top == k
        candidates = [(mine & right, confidence), (mine & ~right, confidence), (mine, -confidence)]
        places = [int(np.argmax(np.where(mask, score, -2))) if mask.any() else None for mask, score in candidates]
        cells = _cells(predictor, rows, [place for place in places if place is not None], picture_alone)
        sheet.append((CODES[k], [None if place is None else cells[place] for place in places]))
    return examples_figure(sheet)


def costliest_errors(
    predictor: Predictor, rows: pd.DataFrame, predictions: Sequence[Prediction], picture_alone: bool = False
) -> Figure | None:
    """Show malignant lesions whose first class is not malignant, melanomas first, and benign ones whose first class is.

    The surest errors come first, by the sum of the malignant classes' probabilities. Each lesion appears once. None if
    there is no such error.
    """
    nine = nine_probabilities(predictions)
    labels = rows["label"].to_numpy(str)
    is_malignant = MALIGNANT[[CODES.index(label) for label in labels]]
    called_malignant, share = MALIGNANT[nine.argmax(1)], nine[:, MALIGNANT].sum(1)
    kinds = {
        "Missed MEL": (labels == "MEL") & ~called_malignant,
        "Missed": is_malignant & (labels != "MEL") & ~called_malignant,
        "False alarm": ~is_malignant & (labels != UNKNOWN) & called_malignant,
    }
    sheet = []
    for title, is_error in kinds.items():
        by_cost = np.argsort(-share if title == "False alarm" else share, kind="stable")
        ranked = rows.iloc[by_cost[is_error[by_cost]]].drop_duplicates("lesion_id").index[:ERRORS_SHOWN].tolist()
        if ranked:
            cells = _cells(predictor, rows, ranked, picture_alone)
            sheet.append((title, [_with_truth(cells[place], labels[place], title) for place in ranked]))
    return examples_figure(sheet) if sheet else None


def _with_truth(cell: Cell, label: str, title: str) -> Cell:
    picture, heatmap, caption = cell
    return picture, heatmap, caption if title.endswith(label) else f"{caption}, is {label}"


def _cells(predictor: Predictor, rows: pd.DataFrame, places: Sequence[int], picture_alone: bool) -> dict[int, Cell]:
    """Return picture, heatmap and caption of these rows, by their place."""
    explained = explain_rows(predictor, rows.iloc[list(places)], picture_alone)
    return {place: _cell(prediction) for place, prediction in zip(places, explained, strict=True)}


def _cell(prediction: Prediction) -> Cell:
    image, heatmap = prediction.image.image.copy(), Image.open(io.BytesIO(prediction.overlay_png or b""))
    for picture in (image, heatmap):
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return image, heatmap, f"{prediction.code} {prediction.probabilities[prediction.code]:.2f}"
