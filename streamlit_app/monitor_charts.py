"""The charts of the part Monitoring (Plotly). Times are UTC."""

from collections.abc import Sequence
from datetime import datetime

import plotly.graph_objects as go

from streamlit_app import monitor_wording as wording
from streamlit_app.monitor_schema import Interval, VersionEvent

HEIGHT = 280  # pixels
BLUE, ORANGE, RED, GREY = "#3a8fa6", "#d98b2b", "#d0483e", "#8a97a2"
# Distinct for readers with red-green blindness (Okabe & Ito 2008); UNK is grey.
CLASS_COLOURS = ("#d55e00", "#0072b2", "#e69f00", "#009e73", "#56b4e9", "#cc79a7", "#f0e442", "#7a4f9e", GREY)
MARKED = {"serve": BLUE, "rollback": ORANGE, "check refused": RED}  # events drawn as lines


def traffic(intervals: Sequence[Interval], events: Sequence[VersionEvent]) -> go.Figure:
    """Return requests by interval, with a line for each promotion, roll-back and refused version."""
    times = [interval.start for interval in intervals]
    counts = {
        wording.ANSWERED: ([interval.predictions for interval in intervals], BLUE),
        wording.REFUSED: ([interval.refusals for interval in intervals], ORANGE),
        wording.FAILED: ([interval.errors for interval in intervals], RED),
    }
    bars = [go.Bar(x=times, y=values, name=name, marker_color=colour) for name, (values, colour) in counts.items()]
    figure = _figure(bars)
    figure.update_layout(barmode="stack", bargap=0.1)
    for event in events:
        if event.event in MARKED and times and event.at >= times[0]:
            _mark(figure, event.at, f"{event.version}", MARKED[event.event])
    return figure


def latency(intervals: Sequence[Interval]) -> go.Figure:
    """Return the percentiles of the latency by interval, in milliseconds."""
    lines = [
        _line(intervals, [interval.latency_ms.get(key) for interval in intervals], name, colour)
        for (key, name), colour in zip(wording.PERCENTILES.items(), (BLUE, ORANGE, RED), strict=True)
    ]
    return _figure(lines)


def class_mix(intervals: Sequence[Interval]) -> go.Figure:
    """Return the share of each class among the predictions of an interval."""
    codes = list(intervals[0].classes) if intervals else []
    times = [interval.start for interval in intervals]
    bars = [
        go.Bar(x=times, y=[interval.classes[code] for interval in intervals], name=code, marker_color=colour)
        for code, colour in zip(codes, CLASS_COLOURS, strict=False)
    ]
    figure = _figure(bars)
    figure.update_layout(barmode="stack", bargap=0.05)
    figure.update_yaxes(tickformat=".0%", range=[0, 1])
    return figure


def shares(intervals: Sequence[Interval]) -> go.Figure:
    """Return the shares of predictions that are flagged, and that have UNK first."""
    lines = [
        _line(intervals, [interval.flagged_share for interval in intervals], wording.FLAGGED_SHARE, RED),
        _line(intervals, [interval.unknown_share for interval in intervals], wording.UNKNOWN_SHARE, GREY),
    ]
    figure = _figure(lines)
    figure.update_yaxes(tickformat=".0%")
    return figure


def drift(intervals: Sequence[Interval], alarm_at: float) -> go.Figure:
    """Return the evidence of drift by interval, as logarithms to base 10, with the line of the alarm."""
    lines = [
        _line(intervals, [getattr(interval.drift, key) for interval in intervals], name, colour)
        for (key, name), colour in zip(wording.DRIFT_LINES.items(), (RED, BLUE, GREY), strict=True)
    ]
    figure = _figure(lines)
    figure.add_hline(y=alarm_at, line={"color": RED, "dash": "dot"}, annotation_text=wording.ALARM_LINE)
    return figure


def _line(intervals: Sequence[Interval], values: Sequence[float | None], name: str, colour: str) -> go.Scatter:
    times = [interval.start for interval in intervals]
    return go.Scatter(
        x=times,
        y=values,
        name=name,
        mode="lines+markers",
        line={"color": colour},
        marker={"size": 4},
        connectgaps=False,
    )


def _mark(figure: go.Figure, time: datetime, text: str, colour: str) -> None:
    figure.add_shape(type="line", x0=time, x1=time, yref="paper", y0=0, y1=1, line={"color": colour, "dash": "dot"})
    figure.add_annotation(x=time, yref="paper", y=1, yanchor="bottom", text=text, showarrow=False, font={"size": 11})


def _figure(traces: Sequence[go.Bar | go.Scatter]) -> go.Figure:
    figure = go.Figure(list(traces))
    figure.update_xaxes(fixedrange=True)
    figure.update_yaxes(fixedrange=True, rangemode="tozero", automargin=True)
    figure.update_layout(
        height=HEIGHT,
        margin={"l": 0, "r": 0, "t": 22, "b": 0},
        legend={"orientation": "h", "yanchor": "top", "y": -0.26, "x": 0},
        hovermode="x unified",
    )
    return figure
