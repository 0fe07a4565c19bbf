"""Outcomes: the true diagnoses of pictures that the model has answered, as pathology finds them months later.

Rows are only appended, with reader and time. The newest row of a request counts. A row keeps what the model had
answered, because predictions are deleted after MONITOR_KEEP_DAYS.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import sqlalchemy as sa

from monitoring.prediction_store import IDS_AT_ONCE, PredictionStore
from monitoring.tables import ANSWER, outcomes, predictions


class PictureOutcome(NamedTuple):
    """The true class (a code) of the picture of a request id or of an image file's SHA-256.

    `metadata` are the patient's age, sex and site where the table has them; they replace those that the client sent.
    """

    key: str
    diagnosis: str
    metadata: Mapping[str, float | str] = {}  # never changed


@dataclass
class Recorded:
    """The numbers of outcomes that are new and that were there before, and the keys without a prediction."""

    new: int = 0
    unchanged: int = 0
    unmatched: list[str] = field(default_factory=list)


def record(store: PredictionStore, table: Sequence[PictureOutcome], reader: str) -> Recorded:
    """Append the outcomes of all predictions that they name, in one transaction. Raises StoreUnavailable.

    A SHA-256 names all predictions of that picture. An outcome that is known already is not appended again.
    """
    recorded, now = Recorded(), time.time()
    with store.connect(writes=True) as connection:
        for first in range(0, len(table), IDS_AT_ONCE):
            piece = table[first : first + IDS_AT_ONCE]
            matches = _matches(connection, [outcome.key for outcome in piece])
            newest = _newest(connection, {row["request_id"] for rows in matches.values() for row in rows})
            rows = []
            for outcome in piece:
                if outcome.key not in matches:
                    recorded.unmatched.append(outcome.key)
                for prediction in matches.get(outcome.key, ()):
                    request = prediction["request_id"]
                    earlier = newest.get(request)
                    metadata = earlier.metadata if earlier else prediction["metadata_sent"] or {}
                    added = PictureOutcome(request, outcome.diagnosis, {**metadata, **outcome.metadata})
                    if added == earlier:
                        recorded.unchanged += 1
                        continue
                    newest[request] = added
                    values = {"diagnosis": added.diagnosis, "metadata_sent": added.metadata}
                    rows.append(prediction | values | {"recorded": now, "reader": reader})
            if rows:
                connection.execute(sa.insert(outcomes), rows)
            recorded.new += len(rows)
    return recorded


def _matches(connection: sa.Connection, keys: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return the predictions of each key that has one: those still stored, or those of earlier outcomes."""
    matches: dict[str, dict[str, dict[str, Any]]] = {}
    for source in (outcomes, predictions):
        columns = [source.c[name] for name in ANSWER]
        is_named = source.c.request_id.in_(keys) | source.c.image_sha256.in_(keys)
        for row in connection.execute(sa.select(*columns).where(is_named)).mappings():
            for key in (row["request_id"], row["image_sha256"]):
                matches.setdefault(key, {})[row["request_id"]] = dict(row)
    return {key: list(rows.values()) for key, rows in matches.items()}


def _newest(connection: sa.Connection, requests: Iterable[str]) -> dict[str, PictureOutcome]:
    """Return the newest outcome of each request that has one."""
    identifiers, newest = list(requests), dict[str, PictureOutcome]()
    for first in range(0, len(identifiers), IDS_AT_ONCE):
        named = outcomes.c.request_id.in_(identifiers[first : first + IDS_AT_ONCE])
        columns = outcomes.c.request_id, outcomes.c.diagnosis, outcomes.c.metadata_sent
        for request, diagnosis, sent in connection.execute(sa.select(*columns).where(named).order_by(outcomes.c.id)):
            newest[request] = PictureOutcome(request, diagnosis, sent or {})
    return newest


def outcome_mark(store: PredictionStore) -> tuple[int, int]:
    """Return the number of outcomes and the newest number, which differ after every change. Raises StoreUnavailable."""
    with store.connect() as connection:
        count, newest = connection.execute(sa.select(sa.func.count(), sa.func.max(outcomes.c.id))).one()
    return int(count), int(newest or 0)


def judged(store: PredictionStore, version: str | None = None) -> list[dict[str, Any]]:
    """Return the newest outcome of each prediction that has one, oldest prediction first. Raises StoreUnavailable."""
    query = sa.select(outcomes)
    if version is not None:
        query = query.where(outcomes.c.version == version)
    with store.connect() as connection:
        rows = connection.execute(query.order_by(outcomes.c.id)).mappings().all()
    newest = {row["request_id"]: dict(row) for row in rows}
    return sorted(newest.values(), key=lambda row: row["time"])
