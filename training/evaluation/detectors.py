"""Published ways to score how unlike known lesions an image is, from a network's features and logits.

Every detector is fitted on images of known lesions and gives one number an image, high for what is unknown. They differ
in what they look at: the logits alone (`max_softmax` to `standardised_logit`), the features (`mahalanobis`,
`relative_mahalanobis`, `knn`), or both (`react`, `grad_norm`, `vim`). scripts/studies/unknowns.py judges them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp, softmax

Array = NDArray[np.float64]

NEIGHBOURS = 50  # Sun et al. 2022 take 50 to 1000, growing with the size of the training set
REACT_PERCENTILE = 90  # Sun, Guo & Li 2021
RIDGE = 1e-3  # of the mean variance, added to covariances: few images, many features


@dataclass(frozen=True)
class Outputs:
    """What a network says of N images: `features` (N, D), the head's input, and `logits` (N, K)."""

    features: Array
    logits: Array


@dataclass(frozen=True)
class Known:
    """What detectors are fitted on: outputs of images of known lesions, their labels (N,), and the linear head."""

    outputs: Outputs
    labels: NDArray[np.int64]
    weight: Array  # (K, D)
    bias: Array  # (K,)


Score = Callable[[Outputs], Array]


def max_softmax(known: Known) -> Score:
    """One minus the largest probability (Hendrycks & Gimpel 2017)."""
    return lambda out: 1 - softmax(out.logits, axis=1).max(1)


def max_logit(known: Known) -> Score:
    """The largest logit, negative (Hendrycks et al. 2022, "Scaling Out-of-Distribution Detection")."""
    return lambda out: -out.logits.max(1)


def energy(known: Known) -> Score:
    """The energy, -logsumexp of the logits (Liu et al. 2020)."""
    return lambda out: -logsumexp(out.logits, axis=1)


def standardised_logit(known: Known) -> Score:
    """The largest logit, standardised among known images predicted as the same class (Jung et al. 2021)."""
    top, value = known.outputs.logits.argmax(1), known.outputs.logits.max(1)
    classes = known.outputs.logits.shape[1]
    chosen = [value[top == k] if (top == k).sum() > 1 else value for k in range(classes)]
    mean, deviation = np.array([v.mean() for v in chosen]), np.array([v.std() + 1e-6 for v in chosen])

    def score(out: Outputs) -> Array:
        predicted = out.logits.argmax(1)
        return -(out.logits.max(1) - mean[predicted]) / deviation[predicted]

    return score


def react(known: Known) -> Score:
    """The energy with features clipped at a high percentile of the known images' (Sun, Guo & Li 2021)."""
    limit = np.percentile(known.outputs.features, REACT_PERCENTILE)
    return lambda out: -logsumexp(np.minimum(out.features, limit) @ known.weight.T + known.bias, axis=1)


def grad_norm(known: Known) -> Score:
    """The norm of the gradient at the head of the divergence from a uniform answer, negative (Huang et al. 2021)."""
    classes = known.weight.shape[0]
    return lambda out: -np.abs(out.features).sum(1) * np.abs(1 / classes - softmax(out.logits, axis=1)).sum(1)


def mahalanobis(known: Known) -> Score:
    """The smallest Mahalanobis distance to a class mean, with a covariance shared by the classes (Lee et al. 2018)."""
    features, labels = known.outputs.features, known.labels
    means = np.stack([features[labels == k].mean(0) for k in np.unique(labels)])
    centred = features - means[np.searchsorted(np.unique(labels), labels)]
    precision = _precision(centred)
    return lambda out: np.min([_squared(out.features - mean, precision) for mean in means], axis=0)


def relative_mahalanobis(known: Known) -> Score:
    """The Mahalanobis distance less that to the mean of all known images (Ren et al. 2021)."""
    features = known.outputs.features
    mean, by_class = features.mean(0), mahalanobis(known)
    precision = _precision(features - mean)
    return lambda out: by_class(out) - _squared(out.features - mean, precision)


def knn(known: Known) -> Score:
    """The distance to the NEIGHBOURS-th nearest known image, features of unit length (Sun et al. 2022)."""
    bank = _unit(known.outputs.features)
    k = min(NEIGHBOURS, len(bank)) - 1

    def score(out: Outputs) -> Array:
        squared = 2 - 2 * _unit(out.features) @ bank.T
        return np.sqrt(np.maximum(np.partition(squared, k, axis=1)[:, k], 0))

    return score


@dataclass(frozen=True)
class KnownSpace:
    """What of the features' space known lesions do not take: `origin` (D,), orthonormal directions `basis` (D, R), and
    the `weight` that makes the length along them comparable with a logit."""

    origin: Array
    basis: Array
    weight: float

    def residuals(self, features: Array) -> Array:
        """Length (N,) of what features (N, D) have outside the space of known lesions."""
        return np.asarray(np.linalg.norm((features - self.origin) @ self.basis, axis=1))


def known_space(known: Known) -> KnownSpace:
    """The minor half of the features' principal directions, about the point where the logits are nearest to zero.

    The weight makes the mean residual as large as the mean top logit (Wang et al. 2022, "ViM").
    """
    origin = -np.linalg.pinv(known.weight) @ known.bias
    shifted = known.outputs.features - origin
    _, vectors = np.linalg.eigh(shifted.T @ shifted / len(shifted))
    space = KnownSpace(origin, vectors[:, : vectors.shape[1] // 2], 1.0)  # eigh sorts ascending: the minor ones first
    mean = max(float(space.residuals(known.outputs.features).mean()), 1e-9)
    return replace(space, weight=float(known.outputs.logits.max(1).mean()) / mean)


def vim(known: Known) -> Score:
    """Virtual-logit matching: the residual outside the known space, as a logit, less the energy (Wang et al. 2022).

    handlers.calibration.Rejection serves it.
    """
    space = known_space(known)
    return lambda out: space.weight * space.residuals(out.features) - logsumexp(out.logits, axis=1)


DETECTORS: dict[str, Callable[[Known], Score]] = {
    fit.__name__: fit
    for fit in (
        max_softmax, max_logit, energy, standardised_logit, react, grad_norm, vim,
        mahalanobis, relative_mahalanobis, knn,
    )
}  # fmt: skip


def _precision(centred: Array) -> Array:
    covariance = centred.T @ centred / len(centred)
    covariance += RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
    return np.asarray(np.linalg.inv(covariance))


def _squared(difference: Array, precision: Array) -> Array:
    return np.einsum("nd,de,ne->n", difference, precision, difference, optimize=True)


def _unit(features: Array) -> Array:
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
