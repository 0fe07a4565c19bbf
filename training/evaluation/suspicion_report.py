"""How well the alarm keeps its promises on new lesions: by source, with its price and its operating curve."""

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from handlers.suspicion import Alarm
from handlers.taxonomy import UNKNOWN
from mlflow_tracking import classification_metrics as metrics

MIN_LESIONS = 10  # sources with fewer lesions to be found get no figures
CURVE_POINTS = 101
EVERYWHERE = "all sources"

Shares = NDArray[np.float64]


def suspicion_report(rows: pd.DataFrame, alarm: Alarm, shares: Shares, resamples: int = 0) -> dict[str, Any]:
    """Compute the kept sensitivity and the price of every promise, for all sources and for each.

    Sensitivity and price are means over lesions of the share of a lesion's images that are flagged. Images labelled UNK
    are left out.

    Args:
        rows: of a manifest, with label, lesion_id and source.
        alarm: of the bundle.
        shares: (N,) the alarm's share of each image.
        resamples: of the bootstrap over lesions for the 95 % intervals; 0 for none.
    """
    is_lesion = (rows["label"] != UNKNOWN).to_numpy()
    rows, shares = rows[is_lesion].reset_index(drop=True), shares[is_lesion]
    positive = rows["label"].isin(alarm.codes).to_numpy()
    by_source = {EVERYWHERE: np.ones(len(rows), bool)}
    by_source |= {str(name): (rows["source"] == name).to_numpy() for name in sorted(set(rows["source"]))}
    lesions = rows["lesion_id"].to_numpy(str)
    sources = {}
    for name, chosen in by_source.items():
        suspicious, others = chosen & positive, chosen & ~positive
        if len(set(lesions[suspicious])) >= MIN_LESIONS and others.any():
            sources[name] = _source_figures(alarm, shares, lesions, suspicious, others, resamples)
    return {"codes": list(alarm.codes), "sources": sources}


def _source_figures(
    alarm: Alarm,
    shares: Shares,
    lesions: NDArray[np.str_],
    positive: NDArray[np.bool_],
    others: NDArray[np.bool_],
    resamples: int,
) -> dict[str, Any]:
    def rates(chosen: NDArray[np.bool_], threshold: float) -> NDArray[np.float64]:
        """Return the share of each lesion's images that are flagged."""
        return metrics.group_means(shares[chosen] >= threshold, lesions[chosen])

    promises = []
    for promise in alarm.promises:
        kept, price = rates(positive, promise.threshold), rates(others, promise.threshold)
        figures: dict[str, Any] = {
            "promised": promise.sensitivity,
            "threshold": promise.threshold,
            "sensitivity": float(kept.mean()),
            "benign_flagged": float(price.mean()),
        }
        if resamples:
            figures |= {
                "sensitivity_95": metrics.interval(metrics.bootstrap_means(kept, resamples)),
                "benign_flagged_95": metrics.interval(metrics.bootstrap_means(price, resamples)),
            }
        promises.append(figures)
    thresholds = np.quantile(shares[positive | others], np.linspace(0, 1, CURVE_POINTS))
    return {
        "lesions": len(set(lesions[positive])),
        "other_lesions": len(set(lesions[others])),
        "promises": promises,
        "curve": {
            "benign_flagged": [float(rates(others, threshold).mean()) for threshold in thresholds],
            "sensitivity": [float(rates(positive, threshold).mean()) for threshold in thresholds],
        },
    }
