"""The reference of a bundle: what is normal for its predictions, so that drift can be seen.

It is fitted on the calibration split, or after retraining on pictures as they arrive, as served
(training/evaluation/reference_fit.py), and compared with the predictions of patients (monitoring/drift.py). The monitor
has no libraries for pictures, so this module needs none.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers.taxonomy import CODES

REFERENCE = "reference.json"
# What is sent, and what the network's features say of it: familiarity as in handlers/unknown_class.py.
INPUT_STATISTICS = ("size", "brightness", "contrast", "red", "blue", "sharpness", "familiarity")
OUTPUT_STATISTICS = tuple(f"probability of {code}" for code in CODES)
DRIFT_STATISTICS = (*INPUT_STATISTICS, *OUTPUT_STATISTICS)
LEVELS = np.linspace(0, 1, 201)  # of the quantiles


def drift_values(
    width: int | None, height: int | None, statistics: Mapping[str, float], probabilities: Sequence[float]
) -> list[float]:
    """Return a prediction's values in the order of DRIFT_STATISTICS, NaN for a missing one.

    Args:
        width: of the picture as sent, in pixels; `height` likewise.
        statistics: those of handlers.prediction.Prediction.
        probabilities: the nine, in taxonomy order.
    """
    # Many pictures have the same size, whose logarithm must stay equal to the rounded quantile.
    size = round(math.log2(width * height), 4) if width and height else math.nan
    return [size, *(statistics.get(name, math.nan) for name in INPUT_STATISTICS[1:]), *probabilities]


@dataclass(frozen=True)
class Reference:
    """What is normal for one model.

    `pictures` and `lesions` are their numbers. `figures` are those of the monitor's summary, such as the share of each
    class. `quantiles` has the values of each drift statistic at LEVELS; each lesion counts once.
    """

    pictures: int
    lesions: int
    figures: dict[str, Any]
    quantiles: dict[str, list[float]]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Reference":
        """Invert to_dict. Raises KeyError, TypeError or ValueError for anything else."""
        quantiles = {name: [float(value) for value in values["quantiles"][name]] for name in DRIFT_STATISTICS}
        if any(len(row) != len(LEVELS) for row in quantiles.values()):
            raise ValueError(f"quantiles must have {len(LEVELS)} values")
        return cls(int(values["pictures"]), int(values["lesions"]), dict(values["figures"]), quantiles)

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, as kept in reference.json."""
        return asdict(self)

    def ranks(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the share of the reference's lesions below each value, between 0 and 1: (N, S) to (N, S).

        Equal values share their middle rank, so the mean over the reference is 1/2. NaN stays NaN.
        """
        ranks = np.empty_like(values)
        for column, name in enumerate(DRIFT_STATISTICS):
            quantiles, column_values = np.array(self.quantiles[name]), values[:, column]
            first = np.searchsorted(quantiles, column_values, "left")
            last = np.searchsorted(quantiles, column_values, "right") - 1
            between = np.interp(column_values, quantiles, LEVELS)
            ends = len(LEVELS) - 1
            middle = (LEVELS[np.minimum(first, ends)] + LEVELS[np.maximum(last, 0)]) / 2
            ranks[:, column] = np.where(last >= first, middle, between)
        return np.where(np.isnan(values), np.nan, ranks)
