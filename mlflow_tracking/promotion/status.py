"""How things stand after a pass, in plain values: for /status and for the page."""

import time
from collections.abc import Mapping
from typing import Any

from mlflow_tracking.promotion.plan import Release
from mlflow_tracking.promotion.reconcile import Pass, Setback


def status(result: Pass, setbacks: Mapping[Release, Setback]) -> dict[str, Any]:
    """A pass, and what was set back, as one JSON-able table."""

    def one(release: Release | None) -> dict[str, Any] | None:
        return {"version": release.version, "digest": release.digest} if release else None

    now, actual = time.monotonic(), result.actual
    loaded = [{**(one(held.release) or {}), "ready": held.ready} for held in (actual.loaded if actual else {}).values()]
    return {
        "desired": {"champion": one(result.desired.champion), "challenger": one(result.desired.challenger)},
        "actual": None
        if actual is None
        else {
            "default": actual.default,
            "serving": one(actual.serving),
            "last_good": one(actual.last_good),
            "loaded": loaded,
        },
        "settled": result.settled,
        "registry_up": result.registry_up,
        "torchserve_up": result.torchserve_up,
        "errors": list(result.errors),
        "refused": [
            {
                **(one(release) or {}),
                "reason": setback.reason,
                "final": setback.final,
                "retry_in_seconds": None if setback.final else max(0, round(setback.retry_at - now)),
            }
            for release, setback in setbacks.items()
        ],
    }
