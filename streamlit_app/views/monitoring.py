"""Monitoring: what serves, traffic and latency, what the model answers, the versions, the latest predictions."""

from datetime import UTC, datetime
from typing import Any

import pandas as pd
import streamlit as st

from streamlit_app import connections, html_blocks, monitor_blocks, monitor_charts, monitor_report
from streamlit_app import monitor_wording as wording
from streamlit_app.monitor_client import MonitorError
from streamlit_app.monitor_schema import RecordedPrediction, Summary, VersionEvent

REFRESH_SECONDS = 10
LATEST = 50  # predictions in the table
ROUTINE = {"store", "load", "revive", "retire"}  # steps of every deployment, which the table leaves out
CHART_OPTIONS = {"displayModeBar": False}


def monitoring() -> None:
    """Draw this part of the page. The figures refresh by themselves."""
    with st.container(key="monitor-head", horizontal=True, vertical_alignment="bottom"):
        st.html(monitor_blocks.TITLE)
        period = st.segmented_control(
            wording.PERIOD_LABEL, list(wording.PERIODS), default=wording.DEFAULT_PERIOD, required=True, key="period"
        )
        versions = [wording.ALL_VERSIONS, *st.session_state.get("versions", [])]
        version = st.selectbox(wording.VERSION_LABEL, versions, key="version", width=180)
    figures(wording.PERIODS[period], None if version == wording.ALL_VERSIONS else version)


@st.fragment(run_every=REFRESH_SECONDS)
def figures(hours: float, version: str | None) -> None:
    """Draw everything that changes with time."""
    client = connections.monitor_client()
    try:
        summary = client.summary(hours, version)
        events, latest = client.events(), client.latest(LATEST, version)
    except MonitorError as error:
        st.html(monitor_blocks.problem(wording.AWAY, wording.AWAY_TEXT, str(error)))
        return
    if version is None and (versions := list(summary.versions)) != st.session_state.get("versions", []):
        st.session_state.versions = versions
        st.rerun()
    show_state(summary)
    st.html(monitor_blocks.cards(summary, datetime.now(UTC)))
    st.download_button(
        wording.REPORT, lambda: monitor_report.render(summary, datetime.now(UTC)), wording.REPORT_FILE, "text/html",
        on_click="ignore", icon=":material/print:", help=wording.REPORT_HELP,
    )  # fmt: skip
    if summary.total.predictions + summary.total.refusals + summary.total.errors:
        show_charts(summary, events)
    else:
        st.html(monitor_blocks.problem(wording.EMPTY, wording.EMPTY_TEXT, kind="mild"))
    show_tables(summary, events, latest)


def show_state(summary: Summary) -> None:
    """Draw why predictions are missing, if they are."""
    state = summary.state
    if not state.recording:
        st.html(monitor_blocks.problem(wording.RECORDING_OFF, state.reason, kind="mild"))
    elif not state.database_up:
        st.warning(wording.DATABASE_AWAY)
    elif state.behind > 10**6:
        st.warning(wording.BEHIND.format(megabytes=state.behind // 10**6))


def show_charts(summary: Summary, events: list[VersionEvent]) -> None:
    """Draw the charts, two in a row where there is room."""
    charts = {
        wording.TRAFFIC: monitor_charts.traffic(summary.intervals, events),
        wording.LATENCY_CHART: monitor_charts.latency(summary.intervals),
        wording.CLASS_MIX: monitor_charts.class_mix(summary.intervals),
        wording.SHARES: monitor_charts.shares(summary.intervals),
    }
    if newest := summary.newest_drift:
        charts[wording.DRIFT_CHART] = monitor_charts.drift(summary.intervals, newest.alarm_at)
    columns = st.columns(2, gap="large")
    for place, (title, figure) in enumerate(charts.items()):
        with columns[place % 2]:
            st.html(html_blocks.heading(title))
            st.plotly_chart(figure, config=CHART_OPTIONS, key=f"chart-{place}")


def show_tables(summary: Summary, events: list[VersionEvent], latest: list[RecordedPrediction]) -> None:
    """Draw refusals, the history of the versions, performance by patient group, and the latest predictions."""
    versions, refusals = st.columns([2, 1], gap="large")
    with versions:
        st.html(html_blocks.heading(wording.EVENTS))
        rows = [_event_row(event) for event in reversed(events) if event.event not in ROUTINE]
        if rows:
            _table(rows, wording.EVENT_COLUMNS)
        else:
            st.caption(wording.EVENTS_NONE)
    with refusals:
        st.html(html_blocks.heading(wording.REFUSALS))
        st.html(monitor_blocks.refusals(summary.total))
    if groups := summary.performance.realised.slices:
        st.html(html_blocks.heading(wording.SLICES))
        st.html(monitor_blocks.slices(groups))
        st.caption(wording.SLICE_NOTE)
    if latest:
        st.html(html_blocks.heading(wording.LATEST))
        _table([_prediction_row(prediction) for prediction in latest], wording.LATEST_COLUMNS)
        st.caption(wording.LINEAGE)


def _event_row(event: VersionEvent) -> dict[str, Any]:
    name = wording.EVENT_NAMES.get(event.event, event.event)
    if event.event == "alias seen" and not event.version:
        name = wording.ALIAS_REMOVED
    return {
        "time": wording.local_time(event.at),
        "event": name.format(alias=event.alias),
        "version": event.version,
        "by": event.by,
        "remark": event.reason or event.remark,
    }


def _prediction_row(prediction: RecordedPrediction) -> dict[str, Any]:
    return prediction.model_dump() | {
        "time": wording.local_time(prediction.time),
        "confidence": f"{prediction.confidence:.3f}",
        "milliseconds": round(prediction.milliseconds),
    }


def _table(rows: list[dict[str, Any]], columns: dict[str, str]) -> None:
    frame = pd.DataFrame(rows)[list(columns)].rename(columns=columns)
    wide = {columns["remark"]: st.column_config.TextColumn(width="large")} if "remark" in columns else {}
    st.dataframe(frame, hide_index=True, height=min(38 + 35 * len(rows), 400), column_config=wide)
