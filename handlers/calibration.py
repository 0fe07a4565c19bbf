"""Calibration: a network's logits to nine probabilities and a set of likely classes.

Here is only what serving computes; training/evaluation/calibration_fit.py fits the numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from handlers.suspicion import MALIGNANT, MELANOMA, Alarm, Suspicion
from handlers.taxonomy import CODES, UNKNOWN
from handlers.unknown_class import Rejection, logsumexp


@dataclass(frozen=True)
class Conformal:
    """Class-conditional conformal sets: class c is in the set when 1 - p_c <= its threshold (Sadinle et al. 2019).

    On exchangeable data the set holds the true class with probability `confidence_level`, within each class.
    """

    confidence_level: float
    thresholds: dict[str, float]


def split_logits(logits: np.ndarray, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None]:
    """Split logits (N, K) into those of the known classes and those of UNK (N,), None for a model without UNK."""
    logits = np.asarray(logits, np.float64)
    if UNKNOWN not in classes:
        return logits, None
    index = list(classes).index(UNKNOWN)
    return np.delete(logits, index, axis=1), logits[:, index]


@dataclass(frozen=True)
class Calibration:
    """Temperature (Guo et al. 2017), rejection, conformal sets and alarms of one model; the default changes nothing.

    `malignant` and `melanoma` are the alarms; None without a fit.
    """

    temperature: float = 1.0
    rejection: Rejection | None = None
    conformal: Conformal | None = None
    malignant: Alarm | None = None
    melanoma: Alarm | None = None

    def known_probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Convert logits (N, K) of classes other than UNK to their probabilities, float64 (N, K), rows summing to 1."""
        scaled = np.asarray(logits, np.float64) / self.temperature
        return np.exp(scaled - logsumexp(scaled))

    def probabilities(
        self, logits: np.ndarray, classes: Sequence[str], residuals: np.ndarray | None = None
    ) -> np.ndarray:
        """Convert logits (N, K) of `classes` (K codes) to float64 (N, 9) in taxonomy order, rows summing to 1.

        `residuals` (N,) come from the serving graph. Classes that the model was not trained on get 0. UNK gets its
        probability and the other classes share the rest.
        """
        lesion_logits, _ = split_logits(logits, classes)
        unknown = self.unknown_probability(logits, classes, residuals)
        out = np.zeros((len(lesion_logits), len(CODES)))
        columns = [CODES.index(code) for code in classes if code != UNKNOWN]
        out[:, columns] = self.known_probabilities(lesion_logits) * (1 - unknown)[:, None]
        out[:, CODES.index(UNKNOWN)] = unknown
        return out

    def familiarity(
        self, logits: np.ndarray, classes: Sequence[str], residuals: np.ndarray | None = None
    ) -> np.ndarray:
        """Return how familiar each picture is to the model (N,); handlers/unknown_class.py has the formula."""
        lesion_logits, outlier_logits = split_logits(logits, classes)
        rejection = self.rejection or Rejection(0.0, 1.0)
        return rejection.familiarity(lesion_logits, residuals, outlier_logits)

    def unknown_probability(
        self, logits: np.ndarray, classes: Sequence[str], residuals: np.ndarray | None = None
    ) -> np.ndarray:
        """Return the probability of UNK (N,): 0 for a model without a rejection and without a logit for UNK."""
        lesion_logits, outlier_logits = split_logits(logits, classes)
        if self.rejection is not None:
            return self.rejection.probability(lesion_logits, residuals, outlier_logits)
        if outlier_logits is not None:
            return Rejection(0.0, 1.0).probability(lesion_logits, None, outlier_logits)  # softmax
        return np.zeros(len(lesion_logits))

    def conformal_sets(
        self, logits: np.ndarray, classes: Sequence[str], residuals: np.ndarray | None = None
    ) -> list[list[str]] | None:
        """Return the codes in the conformal set of each row of logits (N, K), most probable first.

        None without conformal thresholds. UNK joins a set if it is the most probable of the nine. An empty set gets
        the most probable class.
        """
        if self.conformal is None:
            return None
        class_probabilities = self.known_probabilities(split_logits(logits, classes)[0])
        unknown = self.unknown_probability(logits, classes, residuals)
        classes = [code for code in classes if code != UNKNOWN]
        limits = np.array([self.conformal.thresholds.get(code, 1.0) for code in classes])
        sets = []
        for row, p_unknown in zip(class_probabilities, unknown, strict=True):
            order = np.argsort(-row)
            inside = [classes[i] for i in order if 1 - row[i] <= limits[i]] or [classes[order[0]]]
            sets.append([UNKNOWN, *inside] if p_unknown > (1 - p_unknown) * row.max() else inside)
        return sets

    def suspicions(
        self, alarm: Alarm | None, logits: np.ndarray, classes: Sequence[str], sensitivities: Sequence[float | None]
    ) -> list[Suspicion] | None:
        """Return an alarm's answer for each row of logits (N, K) at the sensitivity requested with it.

        The share is one among the lesion classes, so UNK never hides a melanoma. None without an alarm.
        """
        if alarm is None:
            return None
        probabilities = self.known_probabilities(split_logits(logits, classes)[0])
        shares = alarm.share(probabilities, [code for code in classes if code != UNKNOWN])
        return [
            Suspicion(float(share), alarm, alarm.promise(sensitivity))
            for share, sensitivity in zip(shares, sensitivities, strict=True)
        ]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Calibration":
        """Return the calibration in bundle.json, which has the dataclass's fields."""
        return cls(
            values["temperature"],
            Rejection(**values["rejection"]) if values.get("rejection") else None,
            Conformal(**values["conformal"]) if values.get("conformal") else None,
            *(Alarm.from_dict(values[name]) if values.get(name) else None for name in (MALIGNANT, MELANOMA)),
        )
