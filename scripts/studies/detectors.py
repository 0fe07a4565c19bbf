"""Published detectors of unknown classes, from a network's features and logits; unknowns.py compares them.

Every detector is fitted on images of known lesions and returns one number per image, high for unknown ones. They use
the logits (`max_softmax`, `max_logit`, `energy`), the features (`mahalanobis`), or both (`react`, `vim`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax

from training.evaluation.unknown_class_fit import KnownLesions, fit_known_space

Array = NDArray[np.float64]

REACT_PERCENTILE = 90  # Sun, Guo & Li 2021
RIDGE = 1e-3  # of the mean variance, added to covariances: few images, many features


@dataclass(frozen=True)
class DetectorInputs:
    """A network's outputs for N images: `features` (N, D), the head's input, and `logits` (N, K)."""

    features: Array
    logits: Array


Score = Callable[[DetectorInputs], Array]


def max_softmax(lesions: KnownLesions) -> Score:
    """One minus the largest probability (Hendrycks & Gimpel 2017)."""
    return lambda out: 1 - softmax(out.logits, axis=1).max(1)


def max_logit(lesions: KnownLesions) -> Score:
    """The largest logit, negative (Hendrycks et al. 2022, "Scaling Out-of-Distribution Detection")."""
    return lambda out: -out.logits.max(1)


def energy(lesions: KnownLesions) -> Score:
    """The energy, -logsumexp of the logits (Liu et al. 2020)."""
    return lambda out: -logsumexp(out.logits, axis=1)


def react(lesions: KnownLesions) -> Score:
    """The energy with features clipped at a high percentile of the known images' (Sun, Guo & Li 2021)."""
    limit = np.percentile(lesions.features, REACT_PERCENTILE)
    return lambda out: -logsumexp(np.minimum(out.features, limit) @ lesions.weight.T + lesions.bias, axis=1)


def mahalanobis(lesions: KnownLesions) -> Score:
    """The smallest Mahalanobis distance to a class mean, with a covariance shared by the classes (Lee et al. 2018)."""
    features, labels = lesions.features, lesions.labels
    means = np.stack([features[labels == k].mean(0) for k in np.unique(labels)])
    centred = features - means[np.searchsorted(np.unique(labels), labels)]
    precision = _precision(centred)
    return lambda out: np.min([_squared(out.features - mean, precision) for mean in means], axis=0)


def vim(lesions: KnownLesions) -> Score:
    """Virtual-logit matching: the residual outside the known space, as a logit, less the energy (Wang et al. 2022).

    handlers.calibration.Rejection serves it.
    """
    space = fit_known_space(lesions)
    return lambda out: space.weight * space.residuals(out.features) - logsumexp(out.logits, axis=1)


DETECTORS: dict[str, Callable[[KnownLesions], Score]] = {
    fit.__name__: fit for fit in (max_softmax, max_logit, energy, react, mahalanobis, vim)
}


def _precision(centred: Array) -> Array:
    covariance = centred.T @ centred / len(centred)
    covariance += RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    return np.asarray(np.linalg.inv(covariance))


def _squared(difference: Array, precision: Array) -> Array:
    return np.einsum("nd,de,ne->n", difference, precision, difference, optimize=True)
