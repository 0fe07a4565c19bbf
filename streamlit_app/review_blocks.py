"""Blocks of HTML of the part Review. Text from the monitor is escaped here."""

from collections.abc import Mapping, Sequence
from html import escape

from streamlit_app import review_wording as wording
from streamlit_app.answer_schema import Answer
from streamlit_app.html_blocks import prose
from streamlit_app.review_schema import EarlierReading, ReviewPicture
from streamlit_app.wording import percent

TITLE = f'<h1 class="sl-title">{wording.HEADING}</h1>'


def note(text: str) -> str:
    """Return a line in small print."""
    return f'<p class="sl-counts">{prose(text)}</p>'


def opinions(readings: Sequence[EarlierReading], names: Mapping[str, str]) -> str:
    """Return the readings that differ."""
    items = "".join(
        f"<li>{prose(wording.READING.format(reader=reading.reader, verdict=names.get(reading.verdict, '')))}</li>"
        for reading in readings
    )
    return f'<section class="sl-problem sl-mild"><h3>{wording.DIFFER}</h3><ul>{items}</ul></section>'


def comparison(picture: ReviewPicture, answer: Answer, verdict: str) -> str:
    """Return what the reader has said, and what the model had answered to the upload."""
    top = answer.ranking[0]
    flagged = {True: wording.FLAGGED, False: wording.NOT_FLAGGED, None: ""}[picture.flagged]
    model = wording.MODEL_SAID.format(
        name=answer.classes[top].name, percent=percent(answer.probabilities[top]), version=picture.version,
        flagged=flagged,
    )  # fmt: skip
    return (
        f'<section class="sl-alarm sl-edge-{answer.kind(top)}" role="status">'
        f"<h2>{escape(wording.YOU_SAID.format(verdict=verdict))}</h2><p>{prose(model)}</p></section>"
    )
