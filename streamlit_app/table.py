"""The table of many pictures."""

from collections.abc import Sequence

import pandas as pd

from streamlit_app import wording
from streamlit_app.answer_schema import UNKNOWN, Answer

PICTURE = "picture"
PERCENTAGES = ("probability", "malignancy", "unknown")


def overview(answers: Sequence[tuple[str, str | None, Answer]]) -> pd.DataFrame:
    """Return one row for each file name, thumbnail and answer; probabilities in percent."""
    return pd.DataFrame([_row(*answer) for answer in answers])


def _row(name: str, thumbnail: str | None, answer: Answer) -> dict[str, str | float | None]:
    top = answer.ranking[0]
    return {
        PICTURE: thumbnail,
        "file": name,
        "top": answer.classes[top].name,
        "kind": wording.kind(answer, top),
        "probability": 100 * answer.probabilities[top],
        "malignancy": 100 * answer.malignancy,
        "unknown": 100 * answer.probabilities.get(UNKNOWN, 0.0),
        "certainty": wording.certainty(answer)[0],
    }
