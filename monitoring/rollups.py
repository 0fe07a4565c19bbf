"""Roll-ups: the sums of a version's predictions and refusals in a minute, an hour, and altogether.

A roll-up is a flat JSON object of numbers that can be added, such as `{"predictions": 812, "code:NV": 640}`. Summaries
and metrics read roll-ups only, so they do not depend on the number of predictions.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any, NamedTuple

from handlers.taxonomy import CODES, UNKNOWN
from monitoring.drift import FIGURES as DRIFT_FIGURES

MINUTE, HOUR, ALWAYS = 60, 3600, 0  # the width of a roll-up in seconds; ALWAYS has no end
# A bin of latency is 5 % wide: percentiles are exact to 2.5 %.
BIN = math.log(1.05)
PERCENTILES = (50, 95, 99)


class Slot(NamedTuple):
    """The place of a roll-up: `start` is in seconds since 1970."""

    width: int
    start: int
    version: str


def add(total: MutableMapping[str, float], sums: Mapping[str, float]) -> None:
    """Add a roll-up to a total."""
    for name, value in sums.items():
        total[name] = total.get(name, 0) + value


def roll_up(rows: Iterable[Mapping[str, Any]]) -> dict[Slot, dict[str, float]]:
    """Return the roll-ups of rows, as `parse_line` returns them, in all three widths."""
    result: defaultdict[Slot, dict[str, float]] = defaultdict(dict)
    for row in rows:
        sums = _refusal_sums(row) if "status" in row else _prediction_sums(row)
        add(result[Slot(MINUTE, int(row["time"]) // MINUTE * MINUTE, row["version"])], sums)
    for slot, sums in list(result.items()):
        add(result[Slot(HOUR, slot.start // HOUR * HOUR, slot.version)], sums)
        add(result[Slot(ALWAYS, 0, slot.version)], sums)
    return dict(result)


def _refusal_sums(row: Mapping[str, Any]) -> dict[str, float]:
    return {"errors" if row["status"] >= 500 else "refusals": 1, f"refusal:{row['code']}": 1}


def _prediction_sums(row: Mapping[str, Any]) -> dict[str, float]:
    latency = round(math.log(max(row["milliseconds"], 0.1)) / BIN)
    sums: dict[str, float] = {"predictions": 1, f"code:{row['code']}": 1, f"latency:{latency}": 1}
    confidence = row["confidence"]
    sums |= {"confidence": confidence, "entropy": row["entropy"], "doubt": confidence * (1 - confidence)}
    if drift := row.get("drift"):
        sums |= {f"drift:{name}": math.log10(max(value, 1)) for name, value in drift.items()} | {"drift": 1}
    for code, probability in zip(CODES, row["probabilities"], strict=True):
        sums[f"probability:{code}"] = probability
    if row["flagged"] is not None:
        sums |= {"judged": 1, "flagged": int(row["flagged"])}
    if row["set_size"] is not None:
        sums[f"set:{row['set_size']}"] = 1
    return sums


def figures(sums: Mapping[str, float]) -> dict[str, Any]:
    """Return the figures of one roll-up or of several added; docs/api.md lists them. A share of nothing is None."""
    predictions = sums.get("predictions", 0)

    def part(name: str, whole: float = predictions) -> float | None:
        return round(sums.get(name, 0) / whole, 6) if whole else None

    def count(prefix: str) -> dict[str, int]:
        return {name[len(prefix) :]: int(value) for name, value in sorted(sums.items()) if name.startswith(prefix)}

    return {
        "predictions": int(predictions),
        "refusals": int(sums.get("refusals", 0)),
        "errors": int(sums.get("errors", 0)),
        "refusals_by_code": count("refusal:"),
        "latency_ms": {f"p{percent}": percentile(sums, percent) for percent in PERCENTILES},
        "classes": {code: part(f"code:{code}") for code in CODES},
        "mean_probabilities": {code: part(f"probability:{code}") for code in CODES},
        "unknown_share": part(f"code:{UNKNOWN}"),
        "flagged_share": part("flagged", sums.get("judged", 0)),
        "confidence": part("confidence"),
        "entropy": part("entropy"),
        "set_sizes": count("set:"),
        "drift": {name: part(f"drift:{name}", sums.get("drift", 0)) for name in DRIFT_FIGURES},
    }


def percentile(sums: Mapping[str, float], percent: float) -> float | None:
    """Return a percentile of the latency in milliseconds, exact to 2.5 %; None without predictions."""
    bins = sorted((int(name[8:]), value) for name, value in sums.items() if name.startswith("latency:"))
    rank, passed = percent / 100 * sum(value for _, value in bins), 0.0
    for number, value in bins:
        passed += value
        if passed >= rank:
            return round(math.exp(number * BIN), 1)
    return None
