"""Suspicion: is this lesion suspicious, at a sensitivity that the model promises?

Only what serving computes. training/evaluation/suspicion_fit.py fits the thresholds by conformal risk control.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MALIGNANT, MELANOMA = "malignant", "melanoma"
DEFAULT_SENSITIVITY = 0.9


@dataclass(frozen=True)
class Promise:
    """A threshold that misses at most 1 - `sensitivity` of the lesions to be found, and what that costs.

    `benign_flagged` is the share of the calibration split's other lesions that it flags, None if there are none.
    """

    sensitivity: float
    threshold: float
    benign_flagged: float | None


@dataclass(frozen=True)
class Alarm:
    """The promises for one kind of lesion, from the lowest sensitivity to the highest.

    `codes` are the classes to be found. `lesions` is the number of such lesions in the calibration split.
    """

    codes: tuple[str, ...]
    lesions: int
    promises: tuple[Promise, ...]

    def share(self, probabilities: NDArray[np.float64], classes: Sequence[str]) -> NDArray[np.float64]:
        """Return the sum (N,) of the probabilities (N, K) of the classes to be found, among the K `classes`."""
        return np.asarray(probabilities[:, [code in self.codes for code in classes]].sum(1))

    @property
    def sensitivities(self) -> tuple[float, ...]:
        """The sensitivities that can be chosen."""
        return tuple(promise.sensitivity for promise in self.promises)

    def promise(self, sensitivity: float | None = None) -> Promise | None:
        """Return the promise of a sensitivity; without one that of DEFAULT_SENSITIVITY, or else the highest.

        None if there are no promises, or none of this sensitivity.
        """
        by_sensitivity = {promise.sensitivity: promise for promise in self.promises}
        if sensitivity is not None:
            return by_sensitivity.get(sensitivity)
        highest = self.promises[-1] if self.promises else None
        return by_sensitivity.get(DEFAULT_SENSITIVITY, highest)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Alarm":
        """Return the alarm in bundle.json, which has the dataclass's fields."""
        promises = tuple(Promise(**promise) for promise in values["promises"])
        return cls(tuple(values["codes"]), values["lesions"], promises)


@dataclass(frozen=True)
class Suspicion:
    """The alarm's answer for one picture: its share, and the promise that decides; None where nothing is promised."""

    share: float
    alarm: Alarm
    promise: Promise | None

    @property
    def flagged(self) -> bool | None:
        """Whether the picture is suspicious; None without a promise."""
        return None if self.promise is None else self.share >= self.promise.threshold

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: the decision, the promise behind it, and all promises; null without a promise."""
        promise = self.promise
        return {
            "flagged": self.flagged,
            "threshold": promise.threshold if promise else None,
            "sensitivity": promise.sensitivity if promise else None,
            "benign_flagged": promise.benign_flagged if promise else None,
            "promises": [asdict(promise) for promise in self.alarm.promises],
        }
