"""Blocks of HTML of the part Monitoring. Text from the monitor is escaped here."""

from collections.abc import Sequence
from datetime import datetime
from html import escape

from streamlit_app import monitor_wording as wording
from streamlit_app.html_blocks import prose
from streamlit_app.monitor_schema import Figures, PatientGroup, Realised, Summary

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
        (wording.REALISED, *_realised(summary.performance.realised, wording.REALISED_NOTHING)),
        (wording.RANDOM, *_realised(summary.performance.realised_random, wording.RANDOM_NOTHING)),
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


def _realised(figures: Realised, nothing: str) -> tuple[str, str]:
    """Return the accuracy and its note; `nothing` is the note without outcomes."""
    accuracy, bounds = wording.share(figures.accuracy), figures.intervals_95.get("accuracy")
    if bounds is None:
        return accuracy, nothing
    low, high = (wording.share(bound) for bound in bounds)
    missed, outcomes = wording.share(figures.malignant_missed), f"{figures.outcomes:,}"
    return accuracy, wording.REALISED_NOTE.format(low=low, high=high, outcomes=outcomes, missed=missed)


def slices(groups: Sequence[PatientGroup]) -> str:
    """Return the realised performance by sex, age and site as a table."""
    titles = "".join(f'<th scope="col">{escape(title)}</th>' for title in wording.SLICE_COLUMNS)
    rows = ""
    for before, group in zip((None, *groups), groups, strict=False):
        if before is None or before.field != group.field:
            field = wording.SLICE_FIELDS.get(group.field, group.field)
            rows += f'<tr><th colspan="{len(wording.SLICE_COLUMNS)}" scope="rowgroup">{escape(field)}</th></tr>'
        name = wording.SLICE_NOT_SENT if group.group is None else group.group
        accuracy = wording.SLICE_FEW
        if group.accuracy is not None:
            accuracy = _with_bounds(wording.share(group.accuracy), group.accuracy_95)
        missed = wording.NO_VALUE
        if group.malignant:
            counts = wording.SLICE_MISSED.format(missed=f"{group.malignant_missed:,}", malignant=f"{group.malignant:,}")
            missed = _with_bounds(counts, group.malignant_missed_95)
        cells = "".join(f"<td>{cell}</td>" for cell in (f"{group.outcomes:,}", accuracy, missed))
        rows += f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>'
    return f'<table class="sl-slices"><thead><tr>{titles}</tr></thead><tbody>{rows}</tbody></table>'


def _with_bounds(value: str, bounds: tuple[float, float] | None) -> str:
    if bounds is None:
        return value
    low, high = (wording.share(bound) for bound in bounds)
    return f"{value} <small>{wording.BOUNDS.format(low=low, high=high)}</small>"


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
