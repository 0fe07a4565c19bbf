"""The model's certainty in one word: its limits, which the page, the table and the CSV share."""

import math
from typing import Literal

from streamlit_app.answer_schema import UNKNOWN, Answer

Certainty = Literal["not recognised", "high", "medium", "low"]

HIGH, MEDIUM = 1.5, 3.0  # below these numbers of equally likely classes


def equal_choices(answer: Answer) -> float:
    """Return the number of equally likely classes with the same entropy: exp(entropy), the perplexity."""
    return math.exp(answer.uncertainty.entropy)


def certainty(answer: Answer) -> Certainty:
    """Return the model's certainty of one answer."""
    if answer.ranking[0] == UNKNOWN:
        return "not recognised"
    choices = equal_choices(answer)
    return "high" if choices < HIGH else "medium" if choices < MEDIUM else "low"
