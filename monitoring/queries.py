"""Questions to the monitor's database. Each raises StoreUnavailable if it does not answer."""

from typing import Any

import sqlalchemy as sa

from monitoring.drift import DriftState
from monitoring.drift_record import drift_states
from monitoring.prediction_store import PredictionStore
from monitoring.rollups import ALWAYS, HOUR, Slot
from monitoring.tables import log_files, predictions, rollups


def unreadable_lines(store: PredictionStore) -> int:
    """Return the number of unreadable lines."""
    with store.connect() as connection:
        return int(connection.execute(sa.select(sa.func.sum(log_files.c.unreadable))).scalar() or 0)


def sums(
    store: PredictionStore, width: int, since: float = 0, version: str | None = None
) -> list[tuple[Slot, dict[str, float]]]:
    """Return the roll-ups of a width that begin at `since` or later, oldest first."""
    query = sa.select(rollups).where((rollups.c.width == width) & (rollups.c.start >= since))
    if version is not None:
        query = query.where(rollups.c.version == version)
    with store.connect() as connection:
        rows = connection.execute(query.order_by(rollups.c.start, rollups.c.version)).all()
    return [(Slot(row.width, row.start, row.version), row.sums) for row in rows]


def active_hours(store: PredictionStore) -> dict[str, tuple[int, int]]:
    """Return the first and the last hour with predictions or refusals, by version, in seconds since 1970."""
    columns = rollups.c.version, sa.func.min(rollups.c.start), sa.func.max(rollups.c.start)
    query = sa.select(*columns).where(rollups.c.width == HOUR).group_by(rollups.c.version)
    with store.connect() as connection:
        return {version: (first, last) for version, first, last in connection.execute(query)}


def latest(store: PredictionStore, limit: int, version: str | None = None) -> list[dict[str, Any]]:
    """Return the newest predictions, newest first."""
    query = sa.select(predictions).order_by(predictions.c.time.desc()).limit(limit)
    if version is not None:
        query = query.where(predictions.c.version == version)
    with store.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def drift_by_version(store: PredictionStore) -> dict[str, tuple[DriftState, dict[str, Any]]]:
    """Return the drift of each version, and the figures of its reference."""
    with store.connect() as connection:
        return drift_states(connection)


def totals(store: PredictionStore) -> dict[str, dict[str, float]]:
    """Return the sums since the beginning, by version."""
    return {slot.version: sums for slot, sums in sums(store, ALWAYS)}
