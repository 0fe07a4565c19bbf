"""How good the answers are: estimated from the model's own confidence, and realised once outcomes are known."""

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from handlers.taxonomy import CODES, MALIGNANT, UNKNOWN
from mlflow_tracking import classification_metrics as metrics
from monitoring.corrections import correction_mark, judged_answers, opinions
from monitoring.prediction_store import PredictionStore
from monitoring.rollups import figures
from monitoring.slices import slices

RESAMPLES = 500
REFRESH_SECONDS = 60.0  # for new predictions of pictures that are settled
Row = Mapping[str, Any]


def estimated_accuracy(sums: Mapping[str, float]) -> float | None:
    """Return the accuracy that the model expects of its own answers: the mean of the highest probabilities.

    This holds as long as the probabilities are calibrated for the pictures that arrive (Guillory et al. 2021, "average
    confidence"). None without predictions.

    Args:
        sums: of roll-ups (monitoring.rollups).
    """
    value: float | None = figures(sums)["confidence"]
    return value


def accuracy_interval(sums: Mapping[str, float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the accuracy that the model expects, by the normal approximation; None without one.

    A prediction with confidence p is right with probability p, so its variance is p (1 - p).

    Args:
        sums: of roll-ups (monitoring.rollups).
    """
    count = sums.get("predictions", 0)
    if not count:
        return None
    mean, margin = sums["confidence"] / count, 1.96 * math.sqrt(sums.get("doubt", 0)) / count
    return max(0.0, mean - margin), min(1.0, mean + margin)


def realised(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the figures over answers whose class is settled (monitoring.corrections), as served: UNK is an answer.

    `malignant_missed` is the share of malignant lesions whose first class is not malignant, `flagged_malignant` and
    `flagged_others` the shares that the alarm flagged. Intervals are 95 %, by bootstrap over pictures. A figure without
    pictures is None.
    """
    if not rows:
        return {"outcomes": 0}
    truth = np.array([CODES.index(row["diagnosis"]) for row in rows])
    nine = np.array([row["probabilities"] for row in rows], np.float64)
    nine /= nine.sum(1, keepdims=True)  # the log rounds to six digits
    top, pictures = nine.argmax(1), np.array([row["image_sha256"] for row in rows])
    is_malignant = MALIGNANT[truth]
    flagged = np.array([np.nan if row["flagged"] is None else row["flagged"] for row in rows], np.float64)
    drawn = metrics.bootstrap(truth, nine, pictures, RESAMPLES, metrics=["accuracy", "balanced_accuracy"])
    return {
        "outcomes": len(rows),
        "accuracy": metrics.accuracy(truth, nine),
        "balanced_accuracy": metrics.balanced_accuracy(truth, nine),
        "ece": metrics.expected_calibration_error(truth, nine),
        "malignant_missed": _mean(~MALIGNANT[top[is_malignant]]),
        "flagged_malignant": _mean(flagged[is_malignant]),
        "flagged_others": _mean(flagged[~is_malignant & (truth != CODES.index(UNKNOWN))]),
        "recall": {CODES[k]: float((top[truth == k] == k).mean()) for k in np.unique(truth)},
        "intervals_95": {name: list(bounds) for name, bounds in drawn.items()},
    }


class RealisedPerformance:
    """The realised figures of a database, computed again after a new outcome or reading, or after REFRESH_SECONDS."""

    def __init__(self, store: PredictionStore) -> None:
        self.store = store
        self._figures: dict[tuple[str | None, bool], dict[str, Any]] = {}
        self._mark: object = None
        self._computed = 0.0

    def of(self, version: str | None, sampled_only: bool = False) -> dict[str, Any]:
        """Return `realised` over all settled pictures that a version answered; None: of all versions.

        Args:
            sampled_only: count only pictures that were read by chance (monitoring.corrections); their figures are the
                honest estimate. Adds how readers came to them; without it, the figures by sex, age and site.

        Raises StoreUnavailable.
        """
        mark, now, key = correction_mark(self.store), time.monotonic(), (version, sampled_only)
        if mark != self._mark or now - self._computed > REFRESH_SECONDS:
            self._figures, self._mark, self._computed = {}, mark, now
        if key not in self._figures:
            rows = judged_answers(self.store, version, sampled_only)
            self._figures[key] = realised(rows) | (opinions(self.store) if sampled_only else {"slices": slices(rows)})
        return self._figures[key]


def _mean(values: Any) -> float | None:
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else None
