"""Lines of the prediction log: one JSON object for each prediction or refusal, checked before it is stored.

`handlers/skin_lesion_handler.py` writes the lines. A field that a line lacks is None, so logs of older versions are
read too. A line that does not fit is unreadable; it is counted and never stored.
"""

import math
import time
from datetime import datetime
from typing import Annotated, Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from handlers.taxonomy import CODES

AHEAD_SECONDS = 86400  # a line with a later time comes from a wrong clock and would stay the newest for ever
EARLIEST = datetime.fromisoformat("2020-01-01T00:00:00Z").timestamp()
# Printable ASCII: Postgres refuses NUL, and no name needs more.
Name = Annotated[str, StringConstraints(pattern=r"^[\x20-\x7e]*$", max_length=200)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Size = Annotated[int, Field(ge=0, le=10**9)]


class _Line(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    time: AwareDatetime
    request_id: Name | None = None
    version: Name = ""

    @property
    def seconds(self) -> float:
        """The time in seconds since 1970."""
        return self.time.timestamp()


class PredictionLine(_Line):
    """A prediction."""

    image_sha256: Name
    model: Name = ""
    digest: Name = ""
    probabilities: dict[Name, Share]
    milliseconds: Annotated[float, Field(ge=0, le=10**8)]
    metadata_sent: dict[Name, Number | Name] = Field(default={}, max_length=20)
    flagged: bool | None = None
    likely_set: list[Name] | None = Field(default=None, validation_alias="set", max_length=len(CODES))
    entropy: Number | None = None
    width: Size | None = None
    height: Size | None = None
    statistics: dict[Name, Number] | None = Field(default=None, max_length=50)


class RefusalLine(_Line):
    """A refused request, or an error of the model."""

    code: Annotated[Name, Field(min_length=1)]
    status: Annotated[int, Field(ge=100, le=599)]


def parse_line(line: bytes, fallback_id: str) -> dict[str, Any] | None:
    """Return a line as a row for the database, or None for an unreadable line.

    A row has `status` if it is a refusal. `fallback_id` takes the place of a missing request id.
    """
    kind = PredictionLine if b'"probabilities"' in line else RefusalLine
    try:
        values = kind.model_validate_json(line)
    except ValidationError:
        return None
    seconds = values.seconds
    if not EARLIEST <= seconds <= time.time() + AHEAD_SECONDS:
        return None
    row = values.model_dump(exclude={"time", "probabilities"})
    row |= {"time": seconds, "request_id": values.request_id or fallback_id}
    if isinstance(values, PredictionLine):
        if values.probabilities.keys() != set(CODES):
            return None
        row["probabilities"] = [values.probabilities[code] for code in CODES]
        row |= _derived(row)
    return row


def _derived(row: dict[str, Any]) -> dict[str, Any]:
    """Return what the database stores to be searched: the diagnosis, its probability, set size and entropy in nats."""
    probabilities: list[float] = row["probabilities"]
    confidence, entropy, likely = max(probabilities), row["entropy"], row["likely_set"]
    if entropy is None:
        entropy = -sum(share * math.log(share) for share in probabilities if share > 0)
    return {
        "code": CODES[probabilities.index(confidence)],
        "confidence": confidence,
        "entropy": entropy,
        "set_size": None if likely is None else len(likely),
    }
