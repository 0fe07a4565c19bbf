"""Realised performance by sex, age and site, so that a model that fails for some patients is seen."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from handlers.metadata import FIELDS
from handlers.taxonomy import CODES, MALIGNANT

FEWEST = 10  # outcomes; with fewer, an accuracy says nothing
AGES = ((30, "under 30"), (50, "30–49"), (70, "50–69"), (math.inf, "70 and older"))  # years below, name
Z = 1.96  # of a 95 % interval
Row = Mapping[str, Any]


def slices(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return the figures of each group of patients: by sex, by age and by site; empty if no row has any of them.

    The group of rows without the value is None. Accuracy and its interval are None with fewer than FEWEST outcomes.
    `malignant_missed` counts malignant lesions whose first class is not malignant, out of `malignant`. Of several
    answers to a picture, the newest counts.

    Args:
        rows: answers whose class is settled (monitoring.corrections), oldest first.
    """
    newest = list({row["image_sha256"]: row for row in rows}.values())
    table = []
    for field in FIELDS:
        groups: dict[str | None, list[Row]] = {}
        for row in newest:
            groups.setdefault(_group(field, (row["metadata_sent"] or {}).get(field)), []).append(row)
        if groups.keys() - {None}:
            table += [
                {"field": field, "group": group, **_figures(groups[group])}
                for group in sorted(groups, key=_order(field))
            ]
    return table


def _group(field: str, value: Any) -> str | None:
    if field != "age" or value is None:
        return None if value is None else str(value)
    return next((name for limit, name in AGES if float(value) < limit), None)


def _order(field: str) -> Callable[[str | None], tuple[bool, int, str]]:
    names = [name for _, name in AGES] if field == "age" else []
    return lambda group: (group is None, names.index(group) if group in names else 0, group or "")


def _figures(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the counts and shares of one group."""
    truth = [CODES.index(row["diagnosis"]) for row in rows]
    top = [row["probabilities"].index(max(row["probabilities"])) for row in rows]
    right = sum(first == code for first, code in zip(top, truth, strict=True))
    malignant = [first for first, code in zip(top, truth, strict=True) if MALIGNANT[code]]
    missed = sum(not MALIGNANT[first] for first in malignant)
    enough = len(rows) >= FEWEST
    return {
        "outcomes": len(rows),
        "accuracy": right / len(rows) if enough else None,
        "accuracy_95": share_interval(right, len(rows)) if enough else None,
        "malignant": len(malignant),
        "malignant_missed": missed,
        "malignant_missed_95": share_interval(missed, len(malignant)) if malignant else None,
    }


def share_interval(part: int, whole: int) -> tuple[float, float]:
    """Return the 95 % interval of a share by Wilson (1927), which also holds for few pictures and for 0 and 100 %."""
    share, weight = part / whole, Z**2 / whole
    centre = (share + weight / 2) / (1 + weight)
    margin = Z * math.sqrt(share * (1 - share) / whole + weight / (4 * whole)) / (1 + weight)
    return max(0.0, centre - margin), min(1.0, centre + margin)
