"""From the network's logits to nine probabilities and a set of likely classes; travels in the bundle as numbers.

The fitting is in training/calibration.py; here is only the arithmetic that serving needs.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from handlers.taxonomy import CODES, UNKNOWN


@dataclass(frozen=True)
class Rejection:
    """A ninth probability for a model that never saw an UNK image: p_unk = sigmoid((threshold - energy) / scale).

    energy = logsumexp(logits) is high for what resembles the training images (Liu et al. 2020, "Energy-based
    Out-of-distribution Detection").
    """

    threshold: float
    scale: float

    def probability(self, logits: np.ndarray) -> np.ndarray:
        """Logits (N, K) to the probability of "none of the above" (N,)."""
        energy = _logsumexp(logits)[:, 0]
        return 0.5 * (1 + np.tanh((self.threshold - energy) / (2 * self.scale)))  # a sigmoid that cannot overflow


@dataclass(frozen=True)
class Conformal:
    """Class-conditional conformal sets: class c is in the set when 1 - p_c <= its threshold (Sadinle et al. 2019).

    On exchangeable data the set holds the true class with probability `confidence_level`, for each class by itself.
    """

    confidence_level: float
    thresholds: dict[str, float]


@dataclass(frozen=True)
class Calibration:
    """Temperature (Guo et al. 2017), rejection and conformal sets of one model; the default changes nothing."""

    temperature: float = 1.0
    rejection: Rejection | None = None
    conformal: Conformal | None = None

    def known_probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Logits (N, K) to probabilities over the model's own classes, float64 (N, K), rows summing to 1."""
        scaled = np.asarray(logits, np.float64) / self.temperature
        return np.exp(scaled - _logsumexp(scaled))

    def probabilities(self, logits: np.ndarray, classes: Sequence[str]) -> np.ndarray:
        """Logits (N, K) for `classes` (K codes) to float64 (N, 9) in taxonomy order, rows summing to 1.

        Classes the model was not trained on get 0. With a rejection, UNK gets its probability and the others share
        the rest.
        """
        known = self.known_probabilities(logits)
        out = np.zeros((len(known), len(CODES)))
        out[:, [CODES.index(code) for code in classes]] = known
        if self.rejection is not None and UNKNOWN not in classes:
            unknown = self.rejection.probability(np.asarray(logits, np.float64))
            out *= (1 - unknown)[:, None]
            out[:, CODES.index(UNKNOWN)] = unknown
        return out

    def conformal_sets(self, logits: np.ndarray, classes: Sequence[str]) -> list[list[str]] | None:
        """For each row of logits (N, K) the codes in its conformal set, most probable first; None without conformal.

        UNK joins a set when it is the most probable of the nine. A set that would be empty holds the most probable
        class.
        """
        if self.conformal is None:
            return None
        known = self.known_probabilities(logits)
        limits = np.array([self.conformal.thresholds.get(code, 1.0) for code in classes])
        unknown = (
            self.rejection.probability(np.asarray(logits, np.float64))
            if self.rejection is not None and UNKNOWN not in classes
            else np.zeros(len(known))
        )
        sets = []
        for row, p_unknown in zip(known, unknown, strict=True):
            order = np.argsort(-row)
            inside = [classes[i] for i in order if 1 - row[i] <= limits[i]] or [classes[order[0]]]
            sets.append([UNKNOWN, *inside] if p_unknown > (1 - p_unknown) * row.max() else inside)
        return sets

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as kept in bundle.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Calibration":
        """The inverse of to_dict."""
        return cls(
            values["temperature"],
            Rejection(**values["rejection"]) if values.get("rejection") else None,
            Conformal(**values["conformal"]) if values.get("conformal") else None,
        )


def _logsumexp(values: np.ndarray) -> np.ndarray:
    peak = values.max(axis=1, keepdims=True)
    return peak + np.log(np.exp(values - peak).sum(axis=1, keepdims=True))
