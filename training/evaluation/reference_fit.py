"""Fit the reference of a bundle: what is normal for its predictions on the calibration split, as served."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from handlers.prediction import Prediction
from handlers.reference import DRIFT_STATISTICS, LEVELS, Reference, drift_values
from handlers.taxonomy import CODES, UNKNOWN

MIN_LESIONS = 150  # with fewer, only large changes would differ from chance
LOGGED_DIGITS = 6  # of a probability in the prediction log


def fit_reference(predictions: Sequence[Prediction], lesions: Sequence[str], is_calibration: bool = True) -> Reference:
    """Return the reference of predictions of pictures that are like those to come. `figures` are as in docs/api.md.

    `lesions` has the lesion of each picture, and each lesion counts once. `is_calibration` says that the pictures are
    those of the calibration split; with others, no drift does not mean that the calibration holds.
    """
    counts = Counter(lesions)
    weights = np.array([1 / counts[lesion] for lesion in lesions])
    values = [
        drift_values(answer.image.width, answer.image.height, answer.statistics, list(answer.probabilities.values()))
        for answer in predictions
    ]
    quantiles = np.quantile(np.array(values), LEVELS, axis=0, weights=weights, method="inverted_cdf")
    codes = Counter(answer.code for answer in predictions)
    flagged = [
        bool(answer.malignant.flagged) for answer in predictions if answer.malignant and answer.malignant.promise
    ]
    sets = [len(answer.conformal_set) for answer in predictions if answer.conformal_set is not None]
    count = len(predictions)
    figures = {
        "calibration": is_calibration,
        "classes": {code: codes[code] / count for code in CODES},
        "unknown_share": codes[UNKNOWN] / count,
        "flagged_share": float(np.mean(flagged)) if flagged else None,
        "confidence": float(np.mean([max(answer.probabilities.values()) for answer in predictions])),
        "entropy": float(np.mean([answer.entropy for answer in predictions])),
        "mean_set_size": float(np.mean(sets)) if sets else None,
    }
    rows = quantiles.round(LOGGED_DIGITS).T.tolist()
    return Reference(count, len(counts), figures, dict(zip(DRIFT_STATISTICS, rows, strict=True)))
