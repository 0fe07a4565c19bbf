"""The answers of /summary, /predictions and /versions; docs/api.md shows them."""

import math
import time
from collections import defaultdict
from datetime import UTC, datetime
from typing import Any

from handlers.taxonomy import CODES
from mlflow_tracking.promotion.audit import AuditLog
from monitoring import queries
from monitoring.drift import ALARM
from monitoring.performance import RealisedPerformance, accuracy_interval, estimated_accuracy
from monitoring.prediction_store import PredictionStore
from monitoring.rollups import HOUR, MINUTE, add, figures

# The width of an interval in seconds: the shortest that gives no more than INTERVALS of them.
WIDTHS = (60, 300, 900, 3600, 3 * 3600, 6 * 3600, 86400, 7 * 86400)
INTERVALS = 120


def stamp(seconds: float) -> str:
    """Return a time in seconds since 1970 as ISO 8601."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def summary(
    store: PredictionStore, realised: RealisedPerformance, hours: float, version: str | None, minute_history: float
) -> dict[str, Any]:
    """Return the figures of the last hours: of all versions, of each, and by interval.

    Args:
        version: the only version that counts; None for all.
        realised: of the store; over all settled pictures, because pathology comes months later.
        minute_history: the seconds for which minutes are kept. Earlier intervals are hours or longer.
    """
    now = time.time()
    interval = next((width for width in WIDTHS if hours * 3600 / width <= INTERVALS), WIDTHS[-1])
    if hours * 3600 > minute_history:
        interval = max(interval, HOUR)
    begin = int(now - hours * 3600) // interval * interval
    intervals: defaultdict[int, dict[str, float]] = defaultdict(dict)
    versions: defaultdict[str, dict[str, float]] = defaultdict(dict)
    total: dict[str, float] = {}
    for slot, sums in queries.sums(store, MINUTE if interval < HOUR else HOUR, begin, version):
        for counter in (intervals[slot.start // interval * interval], versions[slot.version], total):
            add(counter, sums)
    starts = range(begin, int(now) + 1, interval)
    drift = {name: state for name, state in drift_report(store).items() if name in versions}
    return {
        "now": stamp(now),
        "since": stamp(begin),
        "hours": hours,
        "version": version,
        "interval_seconds": interval,
        "total": figures(total),
        "performance": {
            "estimated_accuracy": estimated_accuracy(total),
            "estimated_interval_95": accuracy_interval(total),
            "calibration_holds": all(calibration_holds(state) for state in drift.values()),
            "realised": realised.of(version),
            "realised_random": realised.of(version, sampled_only=True),
        },
        "versions": {name: figures(versions[name]) for name in sorted(versions, key=_order)},
        "drift": {name: drift[name] for name in sorted(drift, key=_order)},
        "intervals": [{"start": stamp(start), **figures(intervals[start])} for start in starts],
    }


def drift_report(store: PredictionStore) -> dict[str, dict[str, Any]]:
    """Return each version's evidence of drift as logarithms to base 10, and the figures of its reference."""
    return {
        version: {
            "pictures": state.pictures,
            "alarm_since": stamp(state.alarm_since) if state.alarm_since else None,
            "alarm_at": math.log10(ALARM),
            **_logarithms(state.figures),
            "statistics": _logarithms(state.statistics),
            "reference": reference,
        }
        for version, (state, reference) in queries.drift_by_version(store).items()
    }


def calibration_holds(state: dict[str, Any]) -> bool:
    """Return whether a version's pictures are still like those that its probabilities were calibrated for.

    Not in an alarm, and not known if the reference was made of other pictures, as after retraining.
    """
    return state["alarm_since"] is None and bool(state["reference"].get("calibration", True))


def _logarithms(values: dict[str, float]) -> dict[str, float]:
    return {name: round(math.log10(max(value, 1)), 3) for name, value in values.items()}


def latest_predictions(store: PredictionStore, limit: int, version: str | None) -> list[dict[str, Any]]:
    """Return the newest predictions, newest first."""
    rows = queries.latest(store, limit, version)
    for row in rows:
        row["time"] = stamp(row["time"])
        row["probabilities"] = dict(zip(CODES, row["probabilities"], strict=True))
        row["set"] = row.pop("likely_set")
    return rows


def serving(audit: AuditLog) -> dict[str, Any] | None:
    """Return the version that serves, its digest and since when; None before the first deployment."""
    event = audit.newest("serve")
    return {"version": event.get("version"), "digest": event.get("digest"), "since": event["at"]} if event else None


def version_line(store: PredictionStore, audit: AuditLog) -> dict[str, Any]:
    """Return what happened to the versions, oldest first, and the predictions of each."""
    hours, totals = queries.active_hours(store), queries.totals(store)
    return {
        "serving": serving(audit),
        "versions": [
            {
                "version": version,
                "first_hour": stamp(hours[version][0]),
                "last_hour": stamp(hours[version][1]),
                "predictions": int(totals.get(version, {}).get("predictions", 0)),
            }
            for version in sorted(hours, key=_order)
        ],
        "events": [
            {name: value for name, value in row.items() if name not in ("before", "hash", "seq")}
            for row in audit.rows()
            if row.get("event", "prune") != "prune"  # damaged lines, and deleted archives
        ],
    }


def _order(version: str) -> tuple[int, str]:
    return (int(version) if version.isdigit() else -1, version)
