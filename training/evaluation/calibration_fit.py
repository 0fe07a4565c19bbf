"""Fit the calibration on the `calibration` split, which training never sees: temperature and conformal thresholds.

The rejection of unknown diseases is part of the calibration as well; unknown_class_fit.py fits it.
handlers/calibration.py applies all three.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from handlers.calibration import Calibration, Conformal, split_logits
from handlers.taxonomy import UNKNOWN
from training.evaluation.suspicion_fit import fit_alarm
from training.evaluation.unknown_class_fit import fit_rejection

MALIGNANT_CODES, MELANOMA_CODES = ("MEL", "BCC", "SCC"), ("MEL",)
MIN_IMAGES = 50  # a fit to fewer images would be noise


def fit_calibration(
    logits: ArrayLike,
    labels: ArrayLike,
    classes: Sequence[str],
    confidence_level: float = 0.9,
    residuals: ArrayLike | None = None,
    residual_weight: float = 0.0,
    image_logits: ArrayLike | None = None,
    lesions: ArrayLike | None = None,
    sources: ArrayLike | None = None,
    malignant: Sequence[str] = MALIGNANT_CODES,
) -> Calibration:
    """Fit temperature, rejection, conformal sets and alarms; return the identity for fewer than MIN_IMAGES images.

    Args:
        logits: (N, K) of the calibration split.
        labels: (N,) indices into `classes`; -1 (a class without a logit) and UNK are left out.
        classes: the K codes.
        confidence_level: of the conformal sets.
        residuals: (N,) of the features, for the rejection; None if `residual_weight` is 0.
        image_logits: (N, K) without metadata, for a model that takes metadata. The fit then uses both kinds of logits,
            and the conformal sets keep their promise for both: an image's score is the larger of its two.
        lesions: (N,) lesion of each image, for the conformal sets and alarms; None: each image is its own lesion.
        sources: (N,) data set of each image, for the alarms; None: all images are from one.
        malignant: classes that the alarm is to find; the second alarm is for melanoma alone.
    """
    y = np.asarray(labels, np.int64)
    labelled = (y >= 0) & (y != (classes.index(UNKNOWN) if UNKNOWN in classes else -1))
    y = y[labelled]
    if len(y) < MIN_IMAGES:
        return Calibration()
    split = [split_logits(np.asarray(z)[labelled], classes) for z in (logits, image_logits) if z is not None]
    variants = [lesion_logits for lesion_logits, _ in split]
    z = np.concatenate(variants)
    outlier_logits = np.concatenate([unknown for _, unknown in split]) if UNKNOWN in classes else None
    classes = [code for code in classes if code != UNKNOWN]  # UNK comes last, so the labels stay
    r = None if residuals is None else np.tile(np.asarray(residuals, np.float64)[labelled], len(variants))
    temperature = fit_temperature(z, np.tile(y, len(variants)))
    probabilities = [Calibration(temperature).known_probabilities(variant) for variant in variants]
    lesion_of = np.arange(len(y)) if lesions is None else np.asarray(lesions)[labelled]
    source_of = None if sources is None else np.asarray(sources)[labelled]
    return Calibration(
        temperature,
        fit_rejection(z, temperature, r, residual_weight, outlier_logits),
        fit_conformal(np.min(probabilities, axis=0), y, classes, confidence_level, lesion_of),
        *(fit_alarm(probabilities, y, classes, codes, lesion_of, source_of) for codes in (malignant, MELANOMA_CODES)),
    )


def fit_temperature(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    """Return the temperature with the least negative log-likelihood.

    Guo et al. 2017, "On Calibration of Modern Neural Networks". The likelihood has a single optimum in 1/T; the search
    is over log T between 1/20 and 20.
    """

    def nll(log_t: float) -> float:
        return float(-log_softmax(logits / math.exp(log_t), axis=1)[np.arange(len(labels)), labels].mean())

    optimum = minimize_scalar(nll, bounds=(-math.log(20), math.log(20)), method="bounded", options={"xatol": 1e-4})
    return math.exp(optimum.x)


def fit_conformal(
    probabilities: NDArray[np.float64],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    confidence_level: float,
    lesions: NDArray[Any] | None = None,
) -> Conformal:
    """Fit one threshold on 1 - p_c per class, so that sets contain the true class at the confidence level.

    For a class with n lesions the threshold is its k-th smallest score, k = ceil((n + 1) * level): the finite-sample
    quantile of split conformal prediction (Vovk 2012; Angelopoulos & Bates 2023, section 1). Classes with k > n have
    too few lesions. They share a threshold from all their lesions, which promises coverage for them together, as for
    the clusters of Ding et al. 2023, "Class-Conditional Conformal Prediction with Many Classes". If even these are too
    few, the threshold is 1: the classes are in every set.

    Lesions are exchangeable, images are not. So lesions are counted, and a lesion's score is the largest of its
    images': the sets of all images of a new lesion contain its class at the confidence level.
    """
    lesion_of = np.arange(len(labels)) if lesions is None else lesions
    scores = {}
    for index, code in enumerate(classes):
        mine = labels == index
        scores[code] = pd.Series(1 - probabilities[mine, index]).groupby(lesion_of[mine]).max().to_numpy()
    thresholds = {code: _conformal_quantile(values, confidence_level) for code, values in scores.items()}
    rare = [scores[code] for code in classes if thresholds[code] is None]
    pooled = _conformal_quantile(np.concatenate(rare), confidence_level) if rare else None
    shared = 1.0 if pooled is None else pooled
    return Conformal(confidence_level, {code: shared if value is None else value for code, value in thresholds.items()})


def _conformal_quantile(scores: NDArray[np.float64], confidence_level: float) -> float | None:
    """Return the k-th smallest score; None if there are fewer than k."""
    k = math.ceil((len(scores) + 1) * confidence_level)
    return float(np.sort(scores)[k - 1]) if k <= len(scores) else None
