"""The state after a pass as JSON values, for /status and for the page."""

import time
from collections.abc import Mapping
from typing import Any

from mlflow_tracking.promotion.backoff import Setback
from mlflow_tracking.promotion.plan import Actual, Release
from mlflow_tracking.promotion.reconcile import Pass


def status(result: Pass, setbacks: Mapping[Release, Setback]) -> dict[str, Any]:
    """Return a pass and the setbacks as JSON values."""
    desired = result.desired
    return {
        "desired": {"champion": _release(desired.champion), "challenger": _release(desired.challenger)},
        "actual": _actual(result.actual) if result.actual else None,
        "settled": result.settled,
        "registry_up": result.registry_up,
        "torchserve_up": result.torchserve_up,
        "errors": list(result.errors),
        "refused": [_setback(release, setback) for release, setback in setbacks.items()],
    }


def _release(release: Release | None) -> dict[str, Any] | None:
    return {"version": release.version, "digest": release.digest} if release else None


def _actual(actual: Actual) -> dict[str, Any]:
    return {
        "default": actual.default,
        "serving": _release(actual.serving),
        "last_good": _release(actual.last_good),
        "loaded": [{**vars(held.release), "ready": held.ready} for held in actual.loaded.values()],
    }


def _setback(release: Release, setback: Setback) -> dict[str, Any]:
    wait = None if setback.final else max(0, round(setback.retry_at - time.monotonic()))
    return {**vars(release), "reason": setback.reason, "final": setback.final, "retry_in_seconds": wait}
