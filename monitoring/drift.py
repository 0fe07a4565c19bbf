"""Drift: are the pictures and answers still like those of the calibration split, on which every promise rests?

Each statistic of a prediction is ranked among those of the bundle's reference: its gain 2 * rank - 1 is 0 on average as
long as nothing has changed. Bets on a change multiply their evidence by 1 + bet * (gain - tolerance) / (1 + tolerance),
which is at most 1 on average without a change, and start again at 1 whenever they fall below: e-detectors (Shin, Ramdas
& Rinaldo 2022). The mean over all statistics and bets is the joint evidence. The alarm begins when it reaches ALARM;
without a change, that happens on average at most once in ALARM predictions. scripts/studies/drift_detection.py measures
both this and the delay after real changes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers.reference import DRIFT_STATISTICS, INPUT_STATISTICS, Reference

ALARM = 10_000.0
ALARM_END = 100.0  # far below, so that an alarm does not flicker
BETS = (0.25, 0.5, 0.9)
BET_SIGNS = np.array([sign * bet for bet in BETS for sign in (1, -1)])
# The reference is a sample too. Mean gains within this many of its standard errors are no change.
STANDARD_ERRORS = 5.0
# Evidence counts no further, so that the alarm ends within some hundred pictures after the change has ended.
CEILING = 1e8
FIGURES = ("joint", "input", "output")


@dataclass
class DriftState:
    """The evidence of each statistic's bets (S, B) for one version, after a number of pictures."""

    pictures: int = 0
    evidence: NDArray[np.float64] = field(default_factory=lambda: np.ones((len(DRIFT_STATISTICS), len(BET_SIGNS))))
    alarm_since: float | None = None  # seconds since 1970

    @property
    def figures(self) -> dict[str, float]:
        """The joint evidence, and that of inputs and outputs."""
        return dict(zip(FIGURES, map(float, _figures(self.evidence)), strict=True))

    @property
    def statistics(self) -> dict[str, float]:
        """The evidence of each statistic."""
        return dict(zip(DRIFT_STATISTICS, self.evidence.mean(1).tolist(), strict=True))

    def update(
        self, values: NDArray[np.float64], times: Sequence[float], reference: Reference
    ) -> list[dict[str, float]]:
        """Take in pictures in order; return the figures after each.

        Args:
            values: (N, S) in the order of DRIFT_STATISTICS (handlers.reference.drift_values); NaN for a missing one.
            times: (N,) in seconds since 1970.
            reference: of the model.
        """
        gains = 2 * np.nan_to_num(reference.ranks(values), nan=0.5) - 1
        # The standard deviation of a uniform gain is 1 / sqrt(3).
        tolerance = STANDARD_ERRORS / math.sqrt(3 * max(reference.lesions, 1))
        factors = 1 + (BET_SIGNS * gains[:, :, None] - tolerance * abs(BET_SIGNS)) / (1 + tolerance)
        history = np.empty_like(factors)
        for number, factor in enumerate(factors):
            self.evidence = np.minimum(np.maximum(self.evidence, 1) * factor, CEILING)
            history[number] = self.evidence
        self.pictures += len(values)
        figures = np.stack(_figures(history), axis=1).tolist()
        for time, (joint, *_) in zip(times, figures, strict=True):
            if joint < ALARM_END:
                self.alarm_since = None
            elif joint >= ALARM and self.alarm_since is None:
                self.alarm_since = time
        return [dict(zip(FIGURES, row, strict=True)) for row in figures]


def _figures(evidence: NDArray[np.float64]) -> tuple[Any, Any, Any]:
    """Return the joint, input and output evidence of (..., S, B)."""
    by_statistic, inputs = evidence.mean(-1), len(INPUT_STATISTICS)
    return by_statistic.mean(-1), by_statistic[..., :inputs].mean(-1), by_statistic[..., inputs:].mean(-1)
