"""From the network's logits to nine probabilities and a set of likely classes; travels in the bundle as numbers.

The fitting is in training/evaluation/calibration_fit.py; here is only the arithmetic that serving needs.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from handlers.taxonomy import CODES, UNKNOWN


@dataclass(frozen=True)
class Rejection:
    """A ninth probability for a model that never saw an UNK image: p_unk = sigmoid((threshold - familiarity) / scale).

    familiarity = logsumexp(logits) - residual_weight * residual: high for what excites the classes as known lesions do
    and whose features lie in the space that those span. With the weight of training/evaluation/detectors.py it is virtual-logit
    matching (Wang et al. 2022, "ViM"), with a weight of 0 the energy (Liu et al. 2020).
    """

    threshold: float
    scale: float
    residual_weight: float = 0.0

    def familiarity(self, logits: np.ndarray, residuals: np.ndarray | None = None) -> np.ndarray:
        """Logits (N, K) and residuals (N,) (handlers.runtimes; not needed where their weight is 0) to (N,).

        Raises ValueError where residuals are needed and there are none.
        """
        energy = _logsumexp(np.asarray(logits, np.float64))[:, 0]
        if not self.residual_weight:
            return energy
        if residuals is None:
            raise ValueError("This rejection needs the residuals of the features.")
        return energy - self.residual_weight * np.asarray(residuals, np.float64)

    def probability(self, logits: np.ndarray, residuals: np.ndarray | None = None) -> np.ndarray:
        """The probability of "none of the above" (N,); arguments, and what is raised, as for `familiarity`."""
        away = self.threshold - self.familiarity(logits, residuals)
        return 0.5 * (1 + np.tanh(away / (2 * self.scale)))  # a sigmoid that cannot overflow


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

    def probabilities(
        self, logits: np.ndarray, classes: Sequence[str], residuals: np.ndarray | None = None
    ) -> np.ndarray:
        """Logits (N, K) for `classes` (K codes) to float64 (N, 9) in taxonomy order, rows summing to 1.

        `residuals` (N,) are the serving graph's. Classes the model was not trained on get 0. With a rejection, UNK gets
        its probability and the others share the rest.
        """
        known = self.known_probabilities(logits)
        out = np.zeros((len(known), len(CODES)))
        out[:, [CODES.index(code) for code in classes]] = known
        if self.rejection is not None and UNKNOWN not in classes:
            unknown = self.rejection.probability(logits, residuals)
            out *= (1 - unknown)[:, None]
            out[:, CODES.index(UNKNOWN)] = unknown
        return out

    def conformal_sets(
        self, logits: np.ndarray, classes: Sequence[str], residuals: np.ndarray | None = None
    ) -> list[list[str]] | None:
        """For each row of logits (N, K) the codes in its conformal set, most probable first; None without conformal.

        UNK joins a set when it is the most probable of the nine. A set that would be empty holds the most probable
        class.
        """
        if self.conformal is None:
            return None
        known = self.known_probabilities(logits)
        limits = np.array([self.conformal.thresholds.get(code, 1.0) for code in classes])
        unknown = (
            self.rejection.probability(logits, residuals)
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
