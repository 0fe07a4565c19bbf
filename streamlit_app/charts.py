"""The charts of the page (Plotly)."""

import html
import textwrap

import plotly.graph_objects as go

from streamlit_app import wording
from streamlit_app.answer_schema import Answer, ClassKind

# Legible on light and on dark, and distinct for readers with red-green blindness. style.css repeats them.
CLASS_COLOURS: dict[ClassKind, str] = {"malignant": "#d0483e", "other": "#3a8fa6", "unknown": "#8a97a2"}
TRACK_COLOUR = "rgba(128, 145, 155, 0.14)"
ROW_HEIGHT = 46  # pixels


def probability_chart(answer: Answer) -> go.Figure:
    """Return horizontal bars, the most probable class on top; colour and label say which classes are malignant."""
    codes = answer.ranking
    values = [answer.probabilities[code] for code in codes]
    labels = [_label(answer, code) for code in codes]
    track = go.Bar(  # 100 % behind each bar, with the value at its end
        x=[1] * len(codes),
        y=labels,
        orientation="h",
        marker={"color": TRACK_COLOUR},
        text=[wording.percent(value) for value in values],
        textposition="outside",
        textfont={"size": 14},
        cliponaxis=False,
        hovertext=[_hover_text(answer, code) for code in codes],
        hovertemplate="%{hovertext}<extra></extra>",
    )
    bars = go.Bar(
        x=values,
        y=labels,
        orientation="h",
        marker={"color": [CLASS_COLOURS[answer.kind(code)] for code in codes]},
        hoverinfo="skip",
    )
    figure = go.Figure([track, bars])
    figure.update_xaxes(range=[0, 1], visible=False, fixedrange=True)
    figure.update_yaxes(autorange="reversed", fixedrange=True, automargin=True, ticks="", tickfont={"size": 13})
    figure.update_layout(
        height=ROW_HEIGHT * len(codes) + 8,
        margin={"l": 0, "r": 60, "t": 0, "b": 0},
        bargap=0.5,
        barmode="overlay",
        barcornerradius=5,
        showlegend=False,
        hoverlabel={"align": "left"},
    )
    return figure


def _label(answer: Answer, code: str) -> str:
    name, kind = html.escape(answer.classes[code].name), wording.kind(answer, code)
    return f"{name}<br><span style='font-size:11px;opacity:.75'>{html.escape(code)} · {kind}</span>"


def _hover_text(answer: Answer, code: str) -> str:
    lesion = answer.classes[code]
    description = "<br>".join(html.escape(line) for line in textwrap.wrap(lesion.description, 52))
    return (
        f"<b>{html.escape(lesion.name)}</b> ({html.escape(code)}, {wording.kind(answer, code)})<br>"
        f"{wording.percent(answer.probabilities[code])}<br>{description}"
    )


def in_words(answer: Answer) -> str:
    """Return the nine probabilities as text for screen readers."""
    return ", ".join(wording.with_percent(answer, code) for code in answer.ranking)
