"""Corrections: the pictures whose class is settled, by readers or by an outcome, and the answers that they judge.

An outcome from a table (pathology) wins over readers. Pictures of the random share are for testing only: they never
train a model, and their figures are the honest estimate, because no model and no reader chose them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa

from handlers.taxonomy import CODES
from monitoring.outcomes import judged, outcome_mark
from monitoring.prediction_store import IDS_AT_ONCE, PredictionStore
from monitoring.reviews import (
    ADJUDICATION,
    RANDOM,
    Row,
    by_picture,
    in_random_share,
    reading_mark,
    standing,
    stored_readings,
)
from monitoring.tables import ANSWER, predictions


@dataclass(frozen=True)
class Correction:
    """A picture whose class is settled.

    `ids` name the rows behind it, such as "reading-12" or "outcome-3". `is_random` pictures must not train a model.
    `is_sampled` says that a reader got the picture by chance; it then counts in the honest estimate. `version` and
    `digest` are those of the answer that was shown or looked up first, and `settled` is the time of the first row.
    """

    image_sha256: str
    diagnosis: str
    source: Literal["outcome", "adjudication", "readers"]
    readers: tuple[str, ...]
    ids: tuple[str, ...]
    is_random: bool
    is_sampled: bool
    version: str
    digest: str
    settled: float


def settled(store: PredictionStore, random_share: float) -> list[Correction]:
    """Return the settled pictures in the order of their SHA-256. Raises StoreUnavailable.

    Args:
        random_share: of the settings (REVIEW_RANDOM_SHARE); pictures that were read keep what they were queued as.
    """
    return _corrections(judged(store), by_picture(stored_readings(store)), random_share)


def _corrections(outcomes: Sequence[Row], read: Mapping[str, list[Row]], random_share: float) -> list[Correction]:
    newest_outcome = {row["image_sha256"]: row for row in sorted(outcomes, key=lambda row: row["id"])}
    corrections = []
    for sha256 in sorted(newest_outcome.keys() | read.keys()):
        rows, outcome = read.get(sha256, []), newest_outcome.get(sha256)
        together = standing(rows) if rows else None
        counting: tuple[Row, ...]
        is_sampled = bool(rows) and rows[0]["queued_as"] == RANDOM
        if outcome:
            diagnosis, source, counting, prefix = outcome["diagnosis"], "outcome", (outcome,), "outcome"
        elif together and together.state == "settled":
            diagnosis, counting, prefix = together.verdict, together.rows, "reading"
            source = "adjudication" if counting[0]["kind"] == ADJUDICATION else "readers"
        else:
            continue
        first = rows[0] if rows else counting[0]
        corrections.append(
            Correction(
                sha256,
                diagnosis,
                source,  # type: ignore[arg-type]  # one of the three words above
                tuple(sorted({row["reader"] for row in counting})),
                tuple(f"{prefix}-{row['id']}" for row in counting),
                is_sampled if rows else in_random_share(sha256, random_share),
                is_sampled,
                first["version"],
                first["digest"],
                min(row["recorded"] for row in (*rows, *counting)),
            )
        )
    return corrections


def judged_answers(store: PredictionStore, version: str | None, sampled_only: bool = False) -> list[Row]:
    """Return the answers whose picture has an outcome or a settled reading, once for each version and picture.

    A version that answers after the readers have settled a picture may have learned from it. Its answer counts only if
    the picture was read by chance, because such pictures train no model. Raises StoreUnavailable.

    Args:
        version: the only version that counts; None for all.
        sampled_only: leave out pictures that were not read by chance.
    """
    outcomes, read = judged(store), by_picture(stored_readings(store))
    corrections = {
        item.image_sha256: item for item in _corrections(outcomes, read, 0) if item.is_sampled or not sampled_only
    }
    answers: dict[tuple[str, str], Row] = {}
    for outcome in outcomes:  # oldest prediction first
        if outcome["image_sha256"] in corrections:
            answers[outcome["version"], outcome["image_sha256"]] = outcome
    by_readers = corrections.keys() & read.keys()
    shown = [row for sha256 in by_readers for row in read[sha256]]
    for row in sorted([*shown, *_predictions(store, by_readers)], key=lambda row: -row["time"]):
        correction = corrections[row["image_sha256"]]
        if row["time"] <= correction.settled or correction.is_sampled:
            answer = {name: row[name] for name in ANSWER} | {"diagnosis": correction.diagnosis}
            answers.setdefault((row["version"], row["image_sha256"]), answer)
    rows = [row for row in answers.values() if version in (None, row["version"])]
    return sorted(rows, key=lambda row: (row["time"], row["request_id"]))


def _predictions(store: PredictionStore, pictures: Iterable[str]) -> list[dict[str, Any]]:
    """Return the stored predictions of pictures."""
    names, rows = list(pictures), []
    columns = [predictions.c[name] for name in ANSWER]
    with store.connect() as connection:
        for first in range(0, len(names), IDS_AT_ONCE):
            named = predictions.c.image_sha256.in_(names[first : first + IDS_AT_ONCE])
            rows += [dict(row) for row in connection.execute(sa.select(*columns).where(named)).mappings()]
    return rows


def opinions(store: PredictionStore) -> dict[str, Any]:
    """Return how many pictures were read by chance, how many of them no reader could tell, and how readers changed.

    `changed_to_model` is the share of readings whose verdict left the first opinion for the model's first class: the
    more, the less independent the readers are. Raises StoreUnavailable.
    """
    rows = stored_readings(store)
    sampled = [pictures for pictures in by_picture(rows).values() if pictures[0]["queued_as"] == RANDOM]
    first = [row for row in rows if row["kind"] != ADJUDICATION]
    changed = [row for row in first if row["verdict"] != row["first_opinion"]]
    to_model = [row for row in changed if row["verdict"] == CODES[_top(row["probabilities"])]]
    return {
        "sampled": len(sampled),
        "sampled_closed": sum(standing(pictures).state == "closed" for pictures in sampled),
        "readings": len(first),
        "changed_to_model": round(len(to_model) / len(first), 6) if first else None,
    }


def correction_mark(store: PredictionStore) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return what differs after every change of outcomes and readings. Raises StoreUnavailable."""
    return outcome_mark(store), reading_mark(store)


def _top(probabilities: list[float]) -> int:
    return probabilities.index(max(probabilities))
