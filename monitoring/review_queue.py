"""The review queue: which kept picture a reader gets next.

Two streams are mixed. The random share comes in the order of its SHA-256 and never by usefulness, so that its figures
stay honest. All others come by usefulness: two versions differ, the alarm flags the picture, the model is uncertain.
When no picture is unread, those that one other reader has read come again for a second opinion.
"""

import math
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from handlers.kept_images import kept
from handlers.taxonomy import CODES
from monitoring.prediction_store import IDS_AT_ONCE, PredictionStore
from monitoring.reviews import (
    ADJUDICATION,
    ALARMED,
    DISAGREEMENT,
    RANDOM,
    READING,
    UNCERTAIN,
    Row,
    by_picture,
    in_random_share,
    reading_mark,
    standing,
    stored_readings,
)
from monitoring.tables import predictions

READERS = 2  # of a picture; more only to adjudicate
LEASE_SECONDS = 300.0  # in which a picture is not given to another reader as well
FRESH_SECONDS, COST_FACTOR = 2.0, 20  # the candidates are read again after the longer of 2 s and 20 times their cost
NAMES = ("request_id", "image_sha256", "time", "version", "digest", "flagged", "set_size", "entropy", "code")


@dataclass(frozen=True)
class QueuedPicture:
    """A kept picture with its newest prediction, why it is in the queue, and how useful a reading would be."""

    answer: Row
    queued_as: str
    usefulness: float


def usefulness(answer: Row, versions_differ: bool) -> float:
    """Return how much a reading may teach: 1 for versions that differ, 0.5 for the alarm, up to 1.25 for uncertainty.

    Uncertainty is the entropy (0 to 1), and a quarter for the size of the likely set.
    """
    size = answer["set_size"] or 1
    uncertainty = answer["entropy"] / math.log(len(CODES)) + 0.25 * (size - 1) / (len(CODES) - 1)
    return float(versions_differ) + 0.5 * bool(answer["flagged"]) + uncertainty


class ReviewQueue:
    """The queue of all readers. Its methods raise StoreUnavailable.

    Args:
        folder: of the kept pictures.
        random_share: of the pictures, and of each reader's readings, that chance chooses.
    """

    def __init__(self, store: PredictionStore, folder: Path, random_share: float) -> None:
        self.store, self.folder, self.random_share = store, folder, random_share
        self._lock = threading.Lock()
        self._candidates: dict[str, QueuedPicture] = {}
        self._stale_at = 0.0
        self._rows: list[Row] = []
        self._leases: dict[str, tuple[str, float]] = {}  # SHA-256: reader and end

    def next_picture(self, reader: str, kind: str) -> dict[str, Any] | None:
        """Return the next picture for a reader, with the answer to be shown after the first opinion; None if none is.

        An adjudication comes with the readings that differ.
        """
        with self._lock:
            self._refresh()
            read = by_picture(self._rows)
            if kind == ADJUDICATION:
                names = [name for name, rows in read.items() if name in self._candidates and _is_disputed(rows)]
            else:
                names = self._ordered(reader, read)
            names = [name for name in names if self._is_free(name, reader)] or names
            if not names:
                return None
            self._leases[names[0]] = (reader, time.monotonic() + LEASE_SECONDS)
            return self._described(names[0], kind, read)

    def reason(self, sha256: str) -> str:
        """Return why a picture is in the queue; a picture that is no candidate is there by its uncertainty."""
        with self._lock:
            self._refresh()
            candidate = self._candidates.get(sha256)
            return candidate.queued_as if candidate else UNCERTAIN

    def status(self, reader: str) -> dict[str, Any]:
        """Return the progress: pictures by what their readings say, what waits for this reader, and the random share.

        `waiting` counts unread pictures, `second` those that wait for this reader's second opinion.
        """
        with self._lock:
            self._refresh()
            read = by_picture(self._rows)
        states = [standing(rows).state for rows in read.values()]
        sampled = {name for name, rows in read.items() if rows[0]["queued_as"] == RANDOM}
        unread = self._candidates.keys() - read.keys()
        disputed = [name for name in self._candidates.keys() & read.keys() if _is_disputed(read[name])]
        random_unread = sum(self._candidates[name].queued_as == RANDOM for name in unread)
        return {
            "kept": len(self._candidates),
            "waiting": len(unread),
            "second": len(self._second(reader, read)),
            "disputed": len(disputed),
            "settled": states.count("settled"),
            "closed": states.count("closed"),
            "mine": sum(row["reader"] == reader and row["kind"] == READING for row in self._rows),
            "random": {"read": len(sampled), "waiting": random_unread},
        }

    def _refresh(self) -> None:
        """Read new readings, and the candidates if they are stale."""
        count, newest = reading_mark(self.store)
        last = self._rows[-1]["id"] if self._rows else 0
        self._rows += stored_readings(self.store, last) if newest > last else []
        if len(self._rows) != count:  # a picture was forgotten
            self._rows = stored_readings(self.store)
        began = time.monotonic()
        if began >= self._stale_at:
            self._candidates = candidates(self.store, kept(self.folder), self.random_share)
            self._leases = {name: lease for name, lease in self._leases.items() if lease[1] > began}
            cost = time.monotonic() - began
            self._stale_at = began + max(FRESH_SECONDS, COST_FACTOR * cost)

    def _ordered(self, reader: str, read: Mapping[str, list[Row]]) -> list[str]:
        """Return the pictures for a reader, the next one first."""
        unread = self._candidates.keys() - read.keys()
        if not unread:
            return self._second(reader, read)
        chosen = sorted(name for name in unread if self._candidates[name].queued_as == RANDOM)
        useful = sorted(unread - set(chosen), key=lambda name: (-self._candidates[name].usefulness, name))
        own = [row for row in self._rows if row["reader"] == reader and row["kind"] == READING]
        is_random_turn = sum(row["queued_as"] == RANDOM for row in own) <= self.random_share * len(own)
        return [*chosen, *useful] if is_random_turn else [*useful, *chosen]

    def _second(self, reader: str, read: Mapping[str, list[Row]]) -> list[str]:
        """Return the pictures that wait for a second reader and may be read by this one, the most useful first."""
        names = [
            name
            for name in self._candidates.keys() & read.keys()
            if standing(read[name]).state == "settled"
            and len(readers := {row["reader"] for row in read[name]}) < READERS
            and reader not in readers
        ]
        return sorted(names, key=lambda name: (-self._candidates[name].usefulness, name))

    def _is_free(self, name: str, reader: str) -> bool:
        holder, end = self._leases.get(name, (reader, 0.0))
        return holder == reader or end < time.monotonic()

    def _described(self, name: str, kind: str, read: Mapping[str, list[Row]]) -> dict[str, Any] | None:
        candidate, query = self._candidates[name], sa.select(predictions.c.probabilities, predictions.c.likely_set)
        with self.store.connect() as connection:
            row = connection.execute(query.where(predictions.c.request_id == candidate.answer["request_id"])).first()
        if row is None:  # deleted meanwhile
            self._stale_at = 0.0
            return None
        rows = standing(read[name]).rows if kind == ADJUDICATION else ()
        fields = ("reader", "first_opinion", "verdict", "recorded")
        return {
            **candidate.answer,
            "kind": kind,
            "queued_as": read[name][0]["queued_as"] if name in read else candidate.queued_as,
            "probabilities": dict(zip(CODES, row.probabilities, strict=True)),
            "set": row.likely_set,
            "readings": [{field: reading[field] for field in fields} for reading in rows],
        }


def candidates(store: PredictionStore, pictures: Iterable[str], random_share: float) -> dict[str, QueuedPicture]:
    """Return the candidate of each kept picture that has a stored prediction. Raises StoreUnavailable."""
    names, columns = list(pictures), [predictions.c[name] for name in NAMES]
    answers: defaultdict[str, list[Row]] = defaultdict(list)
    with store.connect() as connection:
        for first in range(0, len(names), IDS_AT_ONCE):
            named = predictions.c.image_sha256.in_(names[first : first + IDS_AT_ONCE])
            for row in connection.execute(sa.select(*columns).where(named)).mappings():
                answers[row["image_sha256"]].append(dict(row))
    return {name: _candidate(name, rows, random_share) for name, rows in answers.items()}


def _candidate(name: str, rows: list[Row], random_share: float) -> QueuedPicture:
    newest = max(rows, key=lambda row: row["time"])
    versions_differ = len({row["code"] for row in rows}) > 1
    if in_random_share(name, random_share):
        queued_as = RANDOM
    elif versions_differ:
        queued_as = DISAGREEMENT
    else:
        queued_as = ALARMED if newest["flagged"] else UNCERTAIN
    return QueuedPicture(newest, queued_as, usefulness(newest, versions_differ))


def _is_disputed(rows: list[Row]) -> bool:
    return standing(rows).state == "disputed"
