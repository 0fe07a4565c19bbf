"""The drift of each version in the monitor's database, updated in the transaction that stores the predictions."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import sqlalchemy as sa

from handlers.reference import DRIFT_STATISTICS, Reference, drift_values
from monitoring.drift import BET_SIGNS, DriftState
from monitoring.references import References
from monitoring.tables import drift, insert_new

SHAPE = (len(DRIFT_STATISTICS), len(BET_SIGNS))


def update_drift(
    connection: sa.Connection, rows: Iterable[dict[str, Any]], seen: set[tuple[str, ...]], references: References
) -> None:
    """Take new predictions into their versions' drift, and add the figures to each row as `drift`.

    A picture that is sent again says nothing new and is left out. So are models without a reference.

    Args:
        rows: of the predictions, in the order of the log.
        seen: SHA-256 and version of the pictures that were sent before; gets those of `rows`.
    """
    models: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        picture = (row["image_sha256"], row["version"])
        if picture not in seen:
            seen.add(picture)
            models.setdefault((row["version"], row["digest"]), []).append(row)
    for (version, digest), of_model in models.items():
        if (reference := references.of(digest)) is None:
            continue
        # The row is made first and locked, so that another monitor continues from this state.
        insert_new(connection, drift, {"version": version, "digest": digest} | _row(DriftState(), reference))
        key = (drift.c.version == version) & (drift.c.digest == digest)
        state = _state(connection.execute(sa.select(drift).where(key).with_for_update()).mappings().one())
        values = [
            drift_values(row["width"], row["height"], row["statistics"] or {}, row["probabilities"]) for row in of_model
        ]
        history = state.update(np.array(values), [row["time"] for row in of_model], reference)
        for row, figures in zip(of_model, history, strict=True):
            row["drift"] = figures
        connection.execute(sa.update(drift).where(key).values(_row(state, reference)))


def _row(state: DriftState, reference: Reference) -> dict[str, Any]:
    """Return the columns of a state."""
    return {
        "pictures": state.pictures,
        "evidence": state.evidence.tolist(),
        "alarm_since": state.alarm_since,
        "reference": reference.figures | {"pictures": reference.pictures, "lesions": reference.lesions},
    }


def _state(row: Mapping[Any, Any]) -> DriftState:
    """Return the stored state; a new one if it is that of other statistics."""
    evidence = np.array(row["evidence"])
    return DriftState(row["pictures"], evidence, row["alarm_since"]) if evidence.shape == SHAPE else DriftState()


def drift_states(connection: sa.Connection) -> dict[str, tuple[DriftState, dict[str, Any]]]:
    """Return the state of each version (of its model with most pictures) and its reference's figures."""
    rows = connection.execute(sa.select(drift).order_by(drift.c.pictures)).mappings()
    return {row["version"]: (_state(row), row["reference"]) for row in rows}
