"""Fit the alarm: thresholds on the share of malignant classes that keep a promised sensitivity.

Conformal risk control (Angelopoulos et al. 2024) on the calibration split, which training never sees.
handlers/suspicion.py applies the thresholds.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers.suspicion import Alarm, Promise
from mlflow_tracking import classification_metrics as metrics

MIN_LESIONS = 30  # to be found in a source, for a promise that holds in this source by itself
SENSITIVITIES = (0.8, 0.85, 0.9, 0.95, 0.97, 0.99)


def fit_alarm(
    variants: Sequence[NDArray[np.float64]],
    labels: NDArray[np.int64],
    classes: Sequence[str],
    codes: Sequence[str],
    lesions: NDArray[Any],
    sources: NDArray[Any] | None = None,
) -> Alarm:
    """Fit the promises for the classes `codes`.

    A promise holds for all sources together, and in each source with MIN_LESIONS: its threshold is the lowest of
    theirs. Without that, a source that the network finds harder would pay for the others. A higher promise never has a
    higher threshold than a lower one.

    Args:
        variants: probabilities (N, K) of the calibration split's images; two for a model that takes metadata, with and
            without them. The promises hold for both.
        labels: (N,) indices into `classes`, the K codes.
        codes: the classes to be found.
        lesions: (N,) lesion of each image.
        sources: (N,) data set of each image; None: all are from one.
    """
    positive = np.isin(labels, [index for index, code in enumerate(classes) if code in codes])
    shares = [Alarm(tuple(codes), 0, ()).share(probabilities, classes) for probabilities in variants]
    share = np.where(positive, np.min(shares, axis=0), np.max(shares, axis=0))
    groups = [positive]
    if sources is not None:
        by_source = [positive & (sources == source) for source in np.unique(sources[positive])]
        groups += [group for group in by_source if len(np.unique(lesions[group])) >= MIN_LESIONS]
    promises: list[Promise] = []
    for sensitivity in SENSITIVITIES:
        thresholds = [risk_threshold(share[group], lesions[group], 1 - sensitivity) for group in groups]
        if thresholds[0] is None:
            continue
        earlier = promises[-1].threshold if promises else 1.0
        threshold = min(earlier, *(value for value in thresholds if value is not None))
        flagged = metrics.group_means(share[~positive] >= threshold, lesions[~positive])
        promises.append(Promise(sensitivity, threshold, float(flagged.mean()) if len(flagged) else None))
    return Alarm(tuple(codes), len(np.unique(lesions[positive])), tuple(promises))


def risk_threshold(shares: NDArray[np.float64], lesions: NDArray[Any], risk: float) -> float | None:
    """Return the highest threshold whose expected share of missed lesions is at most `risk`; None if none is.

    A lesion's loss at threshold t is the share of its images below t. For n lesions with mean loss R(t), a new
    lesion's expected loss is at most `risk` if n / (n + 1) * R(t) + 1 / (n + 1) <= risk (Angelopoulos et al. 2024,
    theorem 1, with losses up to 1).

    Args:
        shares: (N,) of images of the lesions to be found.
        lesions: (N,) lesion of each image.
    """
    _, place, images = np.unique(lesions, return_inverse=True, return_counts=True)
    n = len(images)
    if n == 0 or 1 / (n + 1) > risk:
        return None
    order = np.argsort(shares)
    # The losses if the threshold were just above each image's share, in ascending order.
    losses = np.cumsum(1 / images[place[order]])
    allowed = (n + 1) * risk - 1
    missed = int(np.searchsorted(losses, allowed + 1e-9, side="right"))  # images that may lie below the threshold
    return float(shares[order[missed]]) if missed < len(shares) else float(shares[order[-1]])
