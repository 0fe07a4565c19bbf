"""Fitting what turns logits into honest answers, on the `calibration` split, which training never sees.

Three things are fitted, all from the logits of that split: a temperature, a rejector, and conformal thresholds.
handlers/calibration.py applies them.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from handlers.calibration import Calibration, Conformal
from handlers.unknown_class import Rejection

# The share of known lesions that the rejector may call unknown before anything else.
FALSE_REJECTION = 0.05
MIN_IMAGES = 50  # below this a fit would be noise


def fit_calibration(
    logits: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str],
    confidence_level: float = 0.9,
    residuals: ArrayLike | None = None,
    residual_weight: float = 0.0,
    alone: ArrayLike | None = None,
    lesions: ArrayLike | None = None,
) -> Calibration:
    """Fit temperature, rejection and conformal thresholds.

    Args:
        logits: (N, K) of the calibration split.
        labels: (N,) indices into `classes`; -1 (a class without a logit) is left out.
        classes: the K codes.
        confidence_level: of the conformal sets.
        residuals: (N,) of the features, for the rejection; none if `residual_weight` is 0.
        alone: (N, K) of the same pictures without the metadata that `logits` hold, for a model that takes them and may
            be asked without. All is then fitted on both, and the conformal sets keep their promise either way: an
            image's score is the larger of its two.
        lesions: (N,) of each image, for the conformal sets; None: each image is a lesion of its own.

    Returns the identity if there are fewer than MIN_IMAGES images.
    """
    labelled = np.asarray(labels, np.int64)
    kept = labelled >= 0
    y = labelled[kept]
    if len(y) < MIN_IMAGES:
        return Calibration()
    ways = [np.asarray(z, np.float64)[kept] for z in (logits, alone) if z is not None]
    z = np.concatenate(ways)
    r = None if residuals is None else np.tile(np.asarray(residuals, np.float64)[kept], len(ways))
    temperature = fit_temperature(z, np.tile(y, len(ways)))
    known = np.min([Calibration(temperature).known_probabilities(way) for way in ways], axis=0)
    of = None if lesions is None else np.asarray(lesions)[kept]
    conformal = fit_conformal(known, y, classes, confidence_level, of)
    return Calibration(temperature, fit_rejection(z, temperature, r, residual_weight), conformal)


def fit_temperature(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """The temperature with the least negative log-likelihood.

    Guo et al. 2017, "On Calibration of Modern Neural Networks". The likelihood has a single optimum in 1/T; the search
    is over log T between 1/20 and 20.
    """

    def nll(log_t: float) -> float:
        return float(-log_softmax(logits / math.exp(log_t), axis=1)[np.arange(len(labels)), labels].mean())

    found = minimize_scalar(nll, bounds=(-math.log(20), math.log(20)), method="bounded", options={"xatol": 1e-4})
    return math.exp(found.x)


def fit_rejection(
    logits: NDArray[np.float64],
    temperature: float = 1.0,
    residuals: NDArray[np.float64] | None = None,
    residual_weight: float = 0.0,
) -> Rejection:
    """The rejector: how unusually low the familiarity of an image is (handlers.calibration), for known lesions.

    The scale is the robust standard deviation of the familiarity (1.4826 times its median absolute deviation) over 4,
    so that p_unk goes from 0.88 to 0.12 over one standard deviation.

    UNK comes first of the nine when p_unk > (1 - p_unk) * p, with p the highest probability among the known classes,
    which is threshold > familiarity + scale * log(p). The threshold is the FALSE_REJECTION quantile of the right
    side, so that this share of known lesions is called unknown first of all.

    So the ninth probability is not the chance of an unknown disease, which nobody can fit without images of one: it
    says how strange this image is among known lesions. The network was not trained for it; lesions of a class it never
    saw often look like one it knows, and pass (scripts/studies/unknowns.py measures how often).
    """
    familiarity = Rejection(0.0, 1.0, residual_weight).familiarity(logits, residuals)
    scale = max(1.4826 * float(np.median(np.abs(familiarity - np.median(familiarity)))) / 4, 1e-3)
    log_top = log_softmax(logits / temperature, axis=1).max(1)
    return Rejection(float(np.quantile(familiarity + scale * log_top, FALSE_REJECTION)), scale, residual_weight)


def fit_conformal(
    probabilities: NDArray[np.float64],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    confidence_level: float,
    lesions: NDArray[Any] | None = None,
) -> Conformal:
    """Thresholds on 1 - p_c, one a class, so that sets hold the true class with the wanted probability in each class.

    For a class with n lesions the threshold is its k-th smallest score, k = ceil((n + 1) * level): the finite-sample
    quantile of split conformal prediction (Vovk 2012; Angelopoulos & Bates 2023, section 1). Classes with k > n, of
    which there are too few lesions to promise anything, share a threshold, found in the same way from all their
    lesions, and the promise is one for them together (as for the clusters of Ding et al. 2023, "Class-Conditional
    Conformal Prediction with Many Classes"). If they are too few together the threshold is 1: they are in every set.

    Lesions are counted and not images, since it is lesions that are exchangeable. A lesion's score is the largest of
    its images', so that with the wanted probability the sets of all images of a new lesion hold its class.
    """
    of = np.arange(len(labels)) if lesions is None else lesions
    scores = {}
    for index, code in enumerate(classes):
        mine = labels == index
        scores[code] = pd.Series(1 - probabilities[mine, index]).groupby(of[mine]).max().to_numpy()
    found = {code: _conformal_quantile(each, confidence_level) for code, each in scores.items()}
    rare = [scores[code] for code in classes if found[code] is None]
    together = _conformal_quantile(np.concatenate(rare), confidence_level) if rare else None
    shared = 1.0 if together is None else together
    return Conformal(confidence_level, {code: shared if one is None else one for code, one in found.items()})


def _conformal_quantile(scores: NDArray[np.float64], confidence_level: float) -> float | None:
    """The k-th smallest score; None if there are fewer than k."""
    k = math.ceil((len(scores) + 1) * confidence_level)
    return float(np.sort(scores)[k - 1]) if k <= len(scores) else None
