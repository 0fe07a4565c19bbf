"""Blocks of HTML of the part Monitoring. Text from the monitor is escaped here."""

from datetime import datetime
from html import escape

from streamlit_app import monitor_wording as wording
from streamlit_app.html_blocks import prose
from streamlit_app.monitor_schema import Figures, Summary

ALARM_CLASS = ' class="sl-alarmed"'
TITLE = f'<h1 class="sl-title">{wording.HEADING}</h1>'


def cards(summary: Summary, now: datetime) -> str:
    """Return the numbers at the top: what serves, and the figures of the whole period."""
    total, serving = summary.total, summary.serving
    if serving:
        version = wording.VERSION.format(version=serving.version or wording.NO_VALUE)
        first = (wording.SERVING, version, wording.SINCE.format(time=wording.since(serving.since, now)))
    else:
        first = (wording.SERVING, wording.SERVING_NOTHING, "")
    size = total.mean_set_size
    refused = wording.REFUSED_NOTE.format(refused=f"{total.refusals:,}", errors=f"{total.errors:,}")
    latency = wording.LATENCY_NOTE.format(p95=wording.milliseconds(total.latency_ms.get("p95")))
    flagged, unknown, sets = _reference_figures(summary)
    numbers = [
        first,
        (wording.PREDICTIONS, f"{total.predictions:,}", refused),
        (wording.LATENCY, wording.milliseconds(total.latency_ms.get("p50")), latency),
        (wording.DRIFT, *_drift(summary, now)),
        (wording.FLAGGED, wording.share(total.flagged_share), _expected(wording.FLAGGED_NOTE, flagged)),
        (wording.UNKNOWN, wording.share(total.unknown_share), _expected(wording.UNKNOWN_NOTE, unknown)),
        (wording.SETS, wording.NO_VALUE if size is None else f"{size:.1f}", _expected(wording.SETS_NOTE, sets)),
        (wording.ESTIMATED, wording.share(summary.performance.estimated_accuracy), _estimated(summary)),
        (wording.REALISED, wording.share(summary.performance.realised.accuracy), _realised(summary)),
    ]
    items = "".join(
        f"<div{ALARM_CLASS if value == wording.DRIFT_ALARM else ''}><dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
        f"<p>{prose(note)}</p></div>"
        for name, value, note in numbers
    )
    return f'<dl class="sl-cards">{items}</dl>'


def _reference_figures(summary: Summary) -> tuple[str, str, str]:
    """Return what is normal: the share flagged, the share of UNK and the mean set size; empty if it is not known."""
    if (drift := summary.newest_drift) is None:
        return "", "", ""
    normal = drift.reference
    flagged, unknown = (
        "" if value is None else wording.share(value) for value in (normal.flagged_share, normal.unknown_share)
    )
    return flagged, unknown, "" if normal.mean_set_size is None else f"{normal.mean_set_size:.1f}"


def _expected(note: str, value: str) -> str:
    return f"{note}; {wording.EXPECTED.format(value=value)}" if value else note


def _drift(summary: Summary, now: datetime) -> tuple[str, str]:
    """Return the word and the note of the drift card."""
    if (drift := summary.newest_drift) is None:
        return wording.NO_VALUE, wording.DRIFT_NOTHING
    if drift.alarm_since is None:
        return wording.DRIFT_NONE, wording.DRIFT_NONE_NOTE.format(pictures=f"{drift.pictures:,}")
    names = sorted(drift.statistics, key=lambda name: -drift.statistics[name])[: wording.DRIFT_NAMES]
    words = ", ".join(wording.STATISTICS.get(name, name) for name in names)
    since = wording.since(drift.alarm_since, now)
    return wording.DRIFT_ALARM, wording.DRIFT_ALARM_NOTE.format(since=since, statistics=words)


def _estimated(summary: Summary) -> str:
    performance = summary.performance
    if not performance.calibration_holds:
        return wording.ESTIMATED_DOUBTFUL
    if performance.estimated_interval_95 is None:
        return wording.ESTIMATED_NOTE
    low, high = (wording.share(bound) for bound in performance.estimated_interval_95)
    return f"{wording.BOUNDS.format(low=low, high=high)}; {wording.ESTIMATED_NOTE}"


def _realised(summary: Summary) -> str:
    figures = summary.performance.realised
    bounds = figures.intervals_95.get("accuracy")
    if bounds is None:
        return wording.REALISED_NOTHING
    low, high = (wording.share(bound) for bound in bounds)
    missed = wording.share(figures.malignant_missed)
    return wording.REALISED_NOTE.format(low=low, high=high, outcomes=f"{figures.outcomes:,}", missed=missed)


def refusals(total: Figures) -> str:
    """Return the refused requests by code."""
    if not total.refusals_by_code:
        return f'<p class="sl-counts">{wording.REFUSALS_NONE}</p>'
    ranked = sorted(total.refusals_by_code.items(), key=lambda item: -item[1])
    rows = "".join(f"<li><code>{escape(code)}</code> <b>{count:,}</b></li>" for code, count in ranked)
    return f'<ul class="sl-refusals">{rows}</ul>'


def problem(title: str, text: str, detail: str = "", kind: str = "") -> str:
    """Return why there are no figures, and what that means."""
    mild = " sl-mild" if kind == "mild" else ""
    small = f"<p><small>{escape(detail)}</small></p>" if detail else ""
    return (
        f'<section class="sl-problem{mild}" role="status"><h3>{escape(title)}</h3><p>{prose(text)}</p>{small}</section>'
    )
