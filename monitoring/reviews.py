"""Readings: what reviewers say of kept pictures. Rows are only appended, with reader, time, version and digest.

Of a reader's readings of a picture, the newest counts. A picture is settled if an adjudication names its class, or if
all its readers name the same class. It is closed if they say that they cannot tell, or that the picture is bad. It is
disputed if they differ, until somebody adjudicates.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa

from handlers.errors import UserError
from handlers.kept_images import SHA256
from handlers.taxonomy import CODES
from monitoring.prediction_store import PredictionStore
from monitoring.tables import ANSWER, insert_new, predictions, readings

CANNOT_TELL, BAD_PICTURE = "cannot_tell", "bad_picture"
VERDICTS = (*CODES, CANNOT_TELL, BAD_PICTURE)
READING, ADJUDICATION = "reading", "adjudication"
# Why a picture is in the queue: by chance, or because two versions differ, or the alarm flags it, or none of these.
RANDOM, DISAGREEMENT, ALARMED, UNCERTAIN = "random", "disagreement", "alarmed", "uncertain"

Row = Mapping[str, Any]
State = Literal["settled", "closed", "disputed"]


class ReviewRefused(UserError):
    """A reading that cannot be recorded."""


@dataclass(frozen=True)
class NewReading:
    """A reading as it is submitted. `submission` is unique to it, so that sending it again changes nothing.

    `kind` is READING or ADJUDICATION. `first_opinion` is what the reader said before the model's answer was shown.
    """

    submission: str
    kind: str
    reader: str
    image_sha256: str
    request_id: str
    first_opinion: str
    verdict: str


class Standing(NamedTuple):
    """What the readings of a picture say together. `rows` are those that count; `verdict` is "" while disputed."""

    state: State
    verdict: str
    rows: tuple[Row, ...]


def standing(rows: Sequence[Row]) -> Standing:
    """Return what the readings of one picture, oldest first, say together."""
    adjudications = [row for row in rows if row["kind"] == ADJUDICATION]
    counting = adjudications[-1:] or list({row["reader"]: row for row in rows}.values())
    verdicts = {row["verdict"] for row in counting}
    if len(verdicts) > 1:
        return Standing("disputed", "", tuple(counting))
    [verdict] = verdicts
    return Standing("settled" if verdict in CODES else "closed", verdict, tuple(counting))


def by_picture(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Return the readings of each picture by its SHA-256, oldest first."""
    pictures: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        pictures[row["image_sha256"]].append(row)
    return dict(pictures)


def in_random_share(sha256: str, share: float) -> bool:
    """Return whether a picture is in the random share, which its SHA-256 alone decides."""
    return bool(SHA256.fullmatch(sha256)) and int(sha256[:8], 16) < share * 2**32


def record_reading(store: PredictionStore, reading: NewReading, queued_as: str) -> tuple[int, bool]:
    """Append a reading; return its number, and False if it was submitted before.

    `queued_as` is why the picture was in the queue; of a picture that has readings, the oldest one's reason is kept.
    Raises ReviewRefused for a prediction that the monitor does not have, and for an adjudication of a picture that is
    not disputed. Raises StoreUnavailable.
    """
    with store.connect(writes=True) as connection:
        if (earlier := _submitted(connection, reading.submission)) is not None:
            return earlier, False
        same_picture = readings.c.image_sha256 == reading.image_sha256
        query = sa.select(readings).where(same_picture).order_by(readings.c.id)
        rows: list[Row] = [dict(row) for row in connection.execute(query).mappings()]
        if reading.kind == ADJUDICATION and (not rows or standing(rows).state != "disputed"):
            raise ReviewRefused("This picture is not disputed any more. Go on to the next one.")
        answer = _answer(connection, reading, rows)
        values = vars(reading) | answer | {"recorded": time.time(), "queued_as": queued_as}
        if rows:
            values["queued_as"] = rows[0]["queued_as"]
        is_new = insert_new(connection, readings, values)  # Postgres has writers at the same time
        number = _submitted(connection, reading.submission)
    assert number is not None, "it was just inserted"
    return number, is_new


def _submitted(connection: sa.Connection, submission: str) -> int | None:
    number: int | None = connection.execute(
        sa.select(readings.c.id).where(readings.c.submission == submission)
    ).scalar()
    return number


def _answer(connection: sa.Connection, reading: NewReading, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the prediction that was shown: the one still stored, or that of an earlier reading."""
    query = sa.select(*(predictions.c[name] for name in ANSWER)).where(
        (predictions.c.request_id == reading.request_id) & (predictions.c.image_sha256 == reading.image_sha256)
    )
    shown = connection.execute(query).mappings().first()
    stored: Row | None = dict(shown) if shown else None
    stored = stored or next((row for row in rows if row["request_id"] == reading.request_id), None)
    if stored is None:
        raise ReviewRefused("The monitor does not have this prediction any more. Go on to the next picture.")
    return {name: stored[name] for name in ANSWER}


def stored_readings(store: PredictionStore, after: int = 0) -> list[Row]:
    """Return the readings whose number is above `after`, oldest first. Raises StoreUnavailable."""
    query = sa.select(readings).where(readings.c.id > after).order_by(readings.c.id)
    with store.connect() as connection:
        return [dict(row) for row in connection.execute(query).mappings()]


def reading_mark(store: PredictionStore) -> tuple[int, int]:
    """Return the number of readings and the newest number, which differ after every change. Raises StoreUnavailable."""
    with store.connect() as connection:
        count, newest = connection.execute(sa.select(sa.func.count(), sa.func.max(readings.c.id))).one()
    return int(count), int(newest or 0)
