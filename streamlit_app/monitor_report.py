"""The report of the part Monitoring: one HTML file with the figures of a period, which needs nothing else.

It has no scripts, and its charts are SVG. Text from the monitor is escaped here or in `monitor_blocks`.
"""

from collections.abc import Sequence
from datetime import datetime
from html import escape

from streamlit_app import monitor_blocks, report, wording
from streamlit_app import monitor_wording as words
from streamlit_app.monitor_charts import BLUE, CLASS_COLOURS, GREY, ORANGE, RED
from streamlit_app.monitor_schema import Summary, VersionDrift

WIDTH, HEIGHT = 720, 160  # of a chart, in the units of its SVG
DRIFT_COLOURS = (RED, BLUE, GREY)  # of wording.DRIFT_LINES, as on the page
Line = tuple[Sequence[float | None], str]  # the value of each interval, and the colour


def render(summary: Summary, written: datetime) -> str:
    """Return the report as HTML: traffic, class mix, drift, estimated and realised performance."""
    version = words.ALL_VERSIONS if summary.version is None else words.VERSION.format(version=summary.version)
    period = words.REPORT_PERIOD.format(
        since=words.local_time(summary.since), now=words.local_time(summary.now), version=version
    )
    groups = summary.performance.realised.slices
    sections = (
        ("", monitor_blocks.cards(summary, summary.now)),
        (words.TRAFFIC, _traffic(summary)),
        (words.CLASS_MIX, _class_mix(summary)),
        (words.DRIFT_CHART, _drift(summary)),
        (words.REFUSALS, monitor_blocks.refusals(summary.total)),
        (words.SLICES, f"{monitor_blocks.slices(groups)}<p>{words.SLICE_NOTE}</p>" if groups else ""),
    )
    body = "".join(f"<section>{_heading(title)}{content}</section>" for title, content in sections if content)
    head = (
        f"<h1>{words.REPORT_TITLE}</h1><p>{escape(period)}</p>"
        f"<p>{wording.REPORT_WRITTEN.format(time=words.local_time(written))}</p>"
        f'<p class="notice">{escape(wording.REPORT_DISCLAIMER)}</p>'
    )
    return report.page(words.REPORT_TITLE, head, body)


def _heading(title: str) -> str:
    return f"<h2>{escape(title)}</h2>" if title else ""


def _traffic(summary: Summary) -> str:
    """Return requests by interval as bars, and a row for each version."""
    rows = [
        (
            version,
            *(f"{count:,}" for count in (figures.predictions, figures.refusals, figures.errors)),
            *(words.milliseconds(figures.latency_ms.get(name)) for name in words.PERCENTILES),
        )
        for version, figures in summary.versions.items()
    ]
    counts = [interval.predictions + interval.refusals + interval.errors for interval in summary.intervals]
    return _bars(counts, words.TRAFFIC) + _table(words.REPORT_TRAFFIC, rows)


def _class_mix(summary: Summary) -> str:
    """Return the share of each class as the most probable one, as bars."""
    rows = "".join(
        f'<tr><th>{escape(code)}</th><td><i style="width:{100 * (share or 0):.1f}%;background:{colour}"></i></td>'
        f"<td>{words.share(share)}</td></tr>"
        for (code, share), colour in zip(summary.total.classes.items(), CLASS_COLOURS, strict=False)
    )
    return f'<table class="bars codes">{rows}</table>'


def _drift(summary: Summary) -> str:
    """Return the evidence by interval with the line of the alarm, and a row for each version."""
    newest = summary.newest_drift
    if newest is None:
        return f"<p>{words.DRIFT_NOTHING}</p>"
    lines: list[Line] = [
        ([getattr(interval.drift, name) for interval in summary.intervals], colour)
        for name, colour in zip(words.DRIFT_LINES, DRIFT_COLOURS, strict=True)
    ]
    legend = " · ".join(
        f'<b style="color:{colour}">{name}</b>'
        for name, colour in zip(words.DRIFT_LINES.values(), DRIFT_COLOURS, strict=True)
    )
    rows = [(version, *_evidence(drift)) for version, drift in summary.drift.items()]
    return (
        f"{_lines(lines, newest.alarm_at, words.DRIFT_CHART)}"
        f"<p>{legend} · {words.REPORT_LINE.format(value=f'{newest.alarm_at:g}')}</p>{_table(words.REPORT_DRIFT, rows)}"
    )


def _evidence(drift: VersionDrift) -> tuple[str, ...]:
    """Return the cells of a version: alarm, pictures, the three figures, and the statistics that changed most."""
    names = sorted(drift.statistics, key=lambda name: -drift.statistics[name])[: words.DRIFT_NAMES]
    changed = ", ".join(f"{words.STATISTICS.get(name, name)} {drift.statistics[name]:.1f}" for name in names)
    alarm = words.DRIFT_NONE if drift.alarm_since is None else words.local_time(drift.alarm_since)
    values = (getattr(drift, name) for name in words.DRIFT_LINES)
    figures = (words.NO_VALUE if value is None else f"{value:.1f}" for value in values)
    return alarm, f"{drift.pictures:,}", *figures, changed


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<table class="figures"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _bars(counts: Sequence[int], title: str) -> str:
    highest, step = max(1, *counts) if counts else 1, WIDTH / max(1, len(counts))
    shapes = "".join(
        f'<rect x="{place * step:.1f}" y="{HEIGHT * (1 - count / highest):.1f}" width="{0.9 * step:.1f}" '
        f'height="{HEIGHT * count / highest:.1f}" fill="{BLUE}"/>'
        for place, count in enumerate(counts)
        if count
    )
    return _chart(shapes, title) + f"<p>{words.REPORT_HIGHEST.format(count=f'{highest:,}')}</p>"


def _lines(lines: Sequence[Line], alarm_at: float, title: str) -> str:
    present = [value for values, _ in lines for value in values if value is not None]
    top, step = 1.1 * max([alarm_at, *present]), WIDTH / max(1, len(lines[0][0]))

    def height(value: float) -> float:
        return HEIGHT * (1 - value / top)

    shapes = (
        f'<line x1="0" x2="{WIDTH}" y1="{height(alarm_at):.1f}" y2="{height(alarm_at):.1f}" stroke="{ORANGE}" '
        'stroke-dasharray="6 4" stroke-width="2"/>'
    )
    for values, colour in lines:
        for place, value in enumerate(values):
            if value is not None:
                shapes += f'<circle cx="{(place + 0.5) * step:.1f}" cy="{height(value):.1f}" r="3" fill="{colour}"/>'
    return _chart(shapes, title)


def _chart(shapes: str, title: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{shapes}</svg>'
