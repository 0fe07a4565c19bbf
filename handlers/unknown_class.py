"""The ninth class, "none of the above" (UNK): its probability.

Only what serving computes. training/evaluation/unknown_class_fit.py fits threshold, scale, weight and the space of
known lesions; scripts/studies/unknowns.py compares detectors.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rejection:
    """The probability of UNK: p_unk = sigmoid((threshold - familiarity) / scale).

    familiarity = logsumexp(logits) - outlier_logit - residual_weight * residual. It is high for images that excite the
    classes as known lesions do, and whose features lie in the space that known lesions span. The outlier logit is that
    of UNK, for a model that was trained with outliers (Hendrycks et al. 2019), and 0 for others. Without it this is
    virtual-logit matching (Wang et al. 2022, "ViM"), with a weight of 0 the energy score (Liu et al. 2020).
    """

    threshold: float
    scale: float
    residual_weight: float = 0.0

    def familiarity(
        self, logits: np.ndarray, residuals: np.ndarray | None = None, outlier_logits: np.ndarray | None = None
    ) -> np.ndarray:
        """Compute familiarity (N,) from the known classes' logits (N, K), residuals (N,) and outlier logits (N,).

        Raises ValueError if residuals are missing and their weight is not 0.
        """
        energy = logsumexp(np.asarray(logits, np.float64))[:, 0]
        if outlier_logits is not None:
            energy = energy - outlier_logits
        if not self.residual_weight:
            return energy
        if residuals is None:
            raise ValueError("This rejection needs the residuals of the features.")
        return energy - self.residual_weight * np.asarray(residuals, np.float64)

    def probability(
        self, logits: np.ndarray, residuals: np.ndarray | None = None, outlier_logits: np.ndarray | None = None
    ) -> np.ndarray:
        """Compute the probability of UNK (N,); arguments and errors as for `familiarity`."""
        distance = self.threshold - self.familiarity(logits, residuals, outlier_logits)
        return 0.5 * (1 + np.tanh(distance / (2 * self.scale)))  # a sigmoid that cannot overflow


def logsumexp(values: np.ndarray) -> np.ndarray:
    """Return the logarithm of the sum of exponentials of each row: (N, K) to (N, 1)."""
    peak = values.max(axis=1, keepdims=True)
    return peak + np.log(np.exp(values - peak).sum(axis=1, keepdims=True))
