"""The monitor's figures for Prometheus. Counters come from the database, so a restart of the monitor resets none."""

import time
from collections.abc import Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from monitoring import queries
from monitoring.prediction_store import PredictionStore
from monitoring.rollups import HOUR, MINUTE, add, figures

ERROR = "internal_error"  # the model failed; containers/alert_rules.yml
# Gauges of the last hour, by version: name, key in `figures`, text.
GAUGES = (
    ("unknown_share", "Share of predictions UNK in the last hour"),
    ("flagged_share", "Share of predictions flagged as suspicious in the last hour"),
    ("confidence", "Mean of the highest probability in the last hour"),
    ("entropy", "Mean entropy of the probabilities in the last hour, in nats"),
)


def state_metrics(state: dict[str, Any]) -> Iterator[Metric]:
    """Yield the monitor's own state, which needs no database."""
    yield GaugeMetricFamily("monitor_recording", "Whether the prediction log is on", value=state["recording"])
    yield GaugeMetricFamily("monitor_database_up", "Whether the database answers", value=state["database_up"])
    yield GaugeMetricFamily("monitor_bytes_behind", "Bytes of the log that are not stored yet", value=state["behind"])


def figure_metrics(store: PredictionStore) -> Iterator[Metric]:
    """Yield counters since the beginning and gauges of the last hour. Raises StoreUnavailable."""
    answered = CounterMetricFamily("monitor_predictions", "Predictions", labels=["version", "code"])
    refused = CounterMetricFamily("monitor_refusals", "Refused requests and errors", labels=["version", "code"])
    for version, sums in queries.totals(store).items():
        # Prometheus sees no increase in a series that begins above zero.
        sums = {f"refusal:{ERROR}": 0, **sums}
        for name, value in sums.items():
            kind, _, code = name.partition(":")
            if kind in ("code", "refusal"):
                (answered if kind == "code" else refused).add_metric([version, code], value)
    yield answered
    yield refused
    yield CounterMetricFamily(
        "monitor_unreadable_lines", "Unreadable lines of the log", value=queries.unreadable_lines(store)
    )

    gauges = [GaugeMetricFamily(f"monitor_{name}", text, labels=["version"]) for name, text in GAUGES]
    latency = GaugeMetricFamily(
        "monitor_latency_seconds", "Latency of predictions in the last hour", labels=["version", "percentile"]
    )
    mix = GaugeMetricFamily("monitor_class_share", "Share of a class in the last hour", labels=["version", "code"])
    recent: dict[str, dict[str, float]] = {}
    for slot, sums in queries.sums(store, MINUTE, time.time() - HOUR):
        add(recent.setdefault(slot.version, {}), sums)
    for version, counter in recent.items():
        values = figures(counter)
        for gauge, (name, _) in zip(gauges, GAUGES, strict=True):
            if values[name] is not None:
                gauge.add_metric([version], values[name])
        for percent, milliseconds in values["latency_ms"].items():
            if milliseconds is not None:
                latency.add_metric([version, percent], milliseconds / 1000)
        for code, share in values["classes"].items():
            if share is not None:
                mix.add_metric([version, code], share)
    drift = GaugeMetricFamily(
        "monitor_drift_evidence", "Evidence of drift; the alarm begins at 10,000", labels=["version", "figure"]
    )
    alarm = GaugeMetricFamily("monitor_drift_alarm", "Whether the drift alarm is on", labels=["version"])
    for version, (state, _) in queries.drift_by_version(store).items():
        if version in recent:
            alarm.add_metric([version], state.alarm_since is not None)
            for name, value in state.figures.items():
                drift.add_metric([version, name], value)
    yield from (*gauges, latency, mix, drift, alarm)
