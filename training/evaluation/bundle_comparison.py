"""Two bundles on the same pictures: their figures, and the differences with paired intervals."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from handlers.prediction import Prediction
from handlers.taxonomy import KNOWN_CODES
from mlflow_tracking import classification_metrics as metrics
from training.evaluation.evaluation_report import MIN_SLICE, build_report, headline
from training.evaluation.served_predictions import conformal_sets, nine_probabilities

Figures = dict[str, float | None]


class _Answers:
    """One bundle's answers to the rows, from which the single figures of any subset are computed."""

    def __init__(self, rows: pd.DataFrame, predictions: Sequence[Prediction]) -> None:
        self.labels, self.lesions = rows["label"].to_numpy(str), rows["lesion_id"].to_numpy(str)
        self.is_known = np.isin(self.labels, KNOWN_CODES)
        self.probabilities, self.sets = nine_probabilities(predictions), conformal_sets(predictions)

    def figures(self, chosen: metrics.Labels) -> Figures:
        """Return the single figures over the rows at these places."""
        sets = None if self.sets is None else [self.sets[place] for place in chosen]
        return headline(
            build_report(self.labels[chosen].tolist(), self.probabilities[chosen], sets, self.lesions[chosen].tolist())
        )


def compare_bundles(
    rows: pd.DataFrame, predictions: Sequence[Prediction], others: Sequence[Prediction], resamples: int = 0
) -> dict[str, Any]:
    """Compare the predictions of one bundle with the `others` of another, over all rows and by source.

    Each resampling of the lesions is the same for both bundles, so the interval is that of the difference (a paired
    bootstrap; Efron & Tibshirani 1993, section 10). Sources with fewer than MIN_SLICE known lesions' images are left
    out.

    Returns:
        "all" and "sources": for each figure that both bundles have, `value`, `against` (the other's), `difference`, and
        with resamples `interval_95` of the difference.
    """
    pair = _Answers(rows, predictions), _Answers(rows, others)
    sources = rows["source"].to_numpy(str)
    by_source = {source: np.flatnonzero(sources == source) for source in sorted(set(sources))}
    return {
        "all": _differences(*pair, np.arange(len(rows)), resamples),
        "sources": {
            source: _differences(*pair, chosen, resamples)
            for source, chosen in by_source.items()
            if pair[0].is_known[chosen].sum() >= MIN_SLICE
        },
    }


def _differences(bundle: _Answers, other: _Answers, chosen: metrics.Labels, resamples: int) -> dict[str, Any]:
    value, against = bundle.figures(chosen), other.figures(chosen)
    draws = [
        (bundle.figures(chosen[drawn]), other.figures(chosen[drawn]))
        for drawn in metrics.resampled(bundle.lesions[chosen], resamples)
        if bundle.is_known[chosen[drawn]].any()
    ]
    table: dict[str, Any] = {"images": len(chosen)}
    for name in value:
        difference = _difference(value, against, name)
        if difference is None:
            continue
        table[name] = {"value": value[name], "against": against[name], "difference": difference}
        drawn_differences = [d for draw in draws if (d := _difference(*draw, name)) is not None]
        if drawn_differences:
            table[name]["interval_95"] = metrics.interval(drawn_differences)
    return table


def _difference(value: Figures, against: Figures, name: str) -> float | None:
    first, second = value.get(name), against.get(name)
    return None if first is None or second is None else first - second
