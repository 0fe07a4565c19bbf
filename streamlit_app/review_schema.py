"""The monitor's answers about reviews, checked before the page shows them. docs/api.md describes them."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from streamlit_app.answer_schema import UNKNOWN, Answer, ExplainedClass, Probability

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Kind = Literal["reading", "adjudication"]


class RandomProgress(BaseModel):
    """Pictures of the random share: those that were read, and those that wait."""

    read: int
    waiting: int


class ReviewStatus(BaseModel):
    """The progress of the review, and the nine classes in the order of their keys."""

    keep_days: int
    kept: int
    waiting: int
    second: int
    disputed: int
    settled: int
    closed: int
    mine: int
    random: RandomProgress
    classes: dict[str, ExplainedClass] = Field(min_length=2, max_length=9)


class EarlierReading(BaseModel):
    """A reading that another one contradicts."""

    reader: str
    verdict: str


class ReviewPicture(BaseModel):
    """The picture to be read, with the model's answer to the upload, which is shown after the first opinion."""

    image_sha256: Sha256
    request_id: str
    kind: Kind
    queued_as: Literal["random", "disagreement", "alarmed", "uncertain"]
    time: datetime
    version: str
    digest: str
    flagged: bool | None
    entropy: float = Field(ge=0)
    set_: list[str] | None = Field(None, alias="set")
    probabilities: dict[str, Probability]
    readings: list[EarlierReading] = []

    def answer(self, classes: dict[str, ExplainedClass]) -> Answer:
        """Return the model's answer as the page's charts take it, without a heatmap."""
        top = max(self.probabilities, key=self.probabilities.__getitem__)
        target = top if top != UNKNOWN else next(iter(classes))
        return Answer.model_validate(
            {
                "schema": 1,
                "model": {"name": "", "version": self.version, "digest": self.digest},
                "probabilities": self.probabilities,
                "classes": {code: lesion.model_dump() for code, lesion in classes.items()},
                "uncertainty": {"entropy": self.entropy, "conformal_set": self.set_},
                "gradcam": {"target": target, "grid": [[0.0]]},
                "disclaimer": "",
            }
        )


class NextPicture(BaseModel):
    """The next picture of a reader; None if none is left."""

    picture: ReviewPicture | None


class RecordedReading(BaseModel):
    """The number of a reading, and whether it is new."""

    id: int
    new: bool
