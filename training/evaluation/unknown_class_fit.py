"""Fit the detection of unknown diseases: the ninth class, UNK.

Two fits, both from images of known lesions only: where their features lie (`fit_known_space`, on the validation split),
and how low an image's familiarity may be before it is called unknown (`fit_rejection`, on the calibration split).
handlers/unknown_class.py applies them; scripts/studies/unknowns.py measures how well they work.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax
from torch import nn

from handlers.errors import UserError
from handlers.unknown_class import Rejection

Array = NDArray[np.float64]

FALSE_REJECTION = 0.05  # the share of known lesions whose most probable class may be UNK


class KnownSpaceError(UserError):
    """The features of known lesions cannot be described; detection then uses the logits only."""


@dataclass(frozen=True)
class KnownLesions:
    """Network outputs for images of known lesions, and the head: features (N, D), logits (N, K), labels (N,)."""

    features: Array
    logits: Array
    labels: NDArray[np.int64]
    weight: Array  # (K, D)
    bias: Array  # (K,)


@dataclass(frozen=True)
class KnownSpace:
    """The part of the feature space that known lesions do not use: `origin` (D,) and orthonormal `basis` (D, R).

    `weight` scales a length along the basis to the size of a logit.
    """

    origin: Array
    basis: Array
    weight: float

    def residuals(self, features: Array) -> Array:
        """Return the length (N,) of features (N, D) outside the space of known lesions."""
        return np.asarray(np.linalg.norm((features - self.origin) @ self.basis, axis=1))


def fit_known_space(lesions: KnownLesions) -> KnownSpace:
    """Fit the minor half of the features' principal directions, about the point where the logits are nearest to zero.

    The weight makes the mean residual as large as the mean top logit (Wang et al. 2022, "ViM").
    """
    origin = -np.linalg.pinv(lesions.weight) @ lesions.bias
    shifted = lesions.features - origin
    _, vectors = np.linalg.eigh(shifted.T @ shifted / len(shifted))
    space = KnownSpace(origin, vectors[:, : vectors.shape[1] // 2], 1.0)  # eigh sorts ascending: minor directions first
    mean = max(float(space.residuals(lesions.features).mean()), 1e-9)
    return replace(space, weight=float(lesions.logits.max(1).mean()) / mean)


def known_space_of(head: nn.Module, features: Array, logits: Array, labels: NDArray[np.int64]) -> KnownSpace:
    """Fit the known space of a network from a split that its weights were not fitted to.

    Args:
        head: the network's classifier.
        features, logits: (N, D) and (N, K) of the split.
        labels: (N,); -1 for a class without a logit, which is left out.

    Raises:
        KnownSpaceError: the head is not one linear layer, or there are fewer images than features.
    """
    if not isinstance(head, nn.Linear):
        raise KnownSpaceError("Detection of unknown diseases uses the logits only, because the head has hidden layers.")
    labelled = labels >= 0
    if labelled.sum() < features.shape[1]:
        raise KnownSpaceError(
            "Detection of unknown diseases uses the logits only, because there are fewer validation images "
            f"({labelled.sum():,}) than features ({features.shape[1]:,})."
        )
    weight, bias = (tensor.detach().cpu().double().numpy() for tensor in (head.weight, head.bias))
    return fit_known_space(KnownLesions(features[labelled], logits[labelled], labels[labelled], weight, bias))


def fit_rejection(
    logits: Array,
    temperature: float = 1.0,
    residuals: Array | None = None,
    residual_weight: float = 0.0,
    outlier_logits: Array | None = None,
) -> Rejection:
    """Fit the rejection of images with unusually low familiarity (handlers.unknown_class) on known lesions.

    The scale is the robust standard deviation of the familiarity (1.4826 times its median absolute deviation) over 4,
    so that p_unk falls from 0.88 to 0.12 over one standard deviation.

    UNK is the most probable class when p_unk > (1 - p_unk) * p, with p the highest probability of a known class, which
    is threshold > familiarity + scale * log(p). The threshold is the FALSE_REJECTION quantile of the right side, so
    that this share of known lesions is rejected.

    So p_unk is not the chance of an unknown disease, which cannot be fitted without images of one. It says how unusual
    an image is among known lesions.
    """
    familiarity = Rejection(0.0, 1.0, residual_weight).familiarity(logits, residuals, outlier_logits)
    scale = max(1.4826 * float(np.median(np.abs(familiarity - np.median(familiarity)))) / 4, 1e-3)
    log_top = log_softmax(logits / temperature, axis=1).max(1)
    return Rejection(float(np.quantile(familiarity + scale * log_top, FALSE_REJECTION)), scale, residual_weight)
