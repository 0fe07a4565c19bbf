"""The monitor's HTTP answers, from the real command: figures, versions, metrics, and its words without a database."""

import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from handlers.taxonomy import CODES
from mlflow_tracking.promotion.audit import AuditLog
from monitoring.monitor import Monitor
from monitoring.monitor_service import create_app
from scripts import child_processes
from scripts.child_processes import free_ports
from tests.conftest import ROOT
from tests.live import PLAIN
from tests.monitored_log import (
    NOW,
    RotatedLog,
    archive_with,
    many,
    normal_reference,
    prediction,
    refusal,
    settings_of,
)
from tests.waiting import eventually


@pytest.fixture(scope="module")
def state(tmp_path_factory) -> Path:
    """A state folder whose log and audit log have two versions."""
    folder = tmp_path_factory.mktemp("state")
    digest = archive_with(normal_reference(), folder / "store", version="2")
    RotatedLog(folder).write(
        many(120, NOW - 600)
        + many(80, NOW, version="2", digest=digest)
        + refusal("a", NOW)
        + refusal("b", NOW, "internal_error", 500)
    )
    audit = AuditLog(folder / "store")
    audit.append("serve", "promoter", version="1", digest="sha256:1")
    audit.append("gate refused", "promoter", version="3", digest="sha256:3")
    audit.append("serve", "promoter", version="2", digest="sha256:2", previous="1")
    audit.append("prune", "promoter", archive="skin_vit-0.mar")
    return folder


@pytest.fixture(scope="module")
def monitor(state, tmp_path_factory):
    """The address of a running monitor."""
    [port] = free_ports(1)
    env = {"STACK_STATE": str(state), "MODEL_STORE": str(state / "store"), "MONITOR_PORT": str(port)}
    log = tmp_path_factory.mktemp("log") / "monitor.log"
    process = child_processes.start(
        [sys.executable, "-m", "monitoring.monitor_service"], os.environ | env, log, cwd=str(ROOT)
    )
    url = f"http://127.0.0.1:{port}"
    try:

        def has_all() -> bool:
            answer = httpx.get(f"{url}/summary", **PLAIN)  # 503 until the database is open
            return answer.is_success and answer.json()["total"]["predictions"] == 200

        eventually(has_all, 30, log.read_text)
        yield url
    finally:
        process.terminate()
        process.wait()


def get(url: str, **params):
    response = httpx.get(url, params=params, **PLAIN)
    assert response.status_code == 200, response.text
    return response.json()


def test_the_summary_has_figures_by_version_and_time(monitor):
    body = get(f"{monitor}/summary", hours=1)
    assert body["state"] == {"recording": True, "database_up": True, "behind": 0, "reason": "", "error": ""}
    assert (body["serving"]["version"], body["serving"]["digest"]) == ("2", "sha256:2")
    assert {name: part["predictions"] for name, part in body["versions"].items()} == {"1": 120, "2": 80}
    assert body["total"]["refusals_by_code"] == {"internal_error": 1, "invalid_image": 1}
    assert sum(body["total"]["classes"].values()) == pytest.approx(1, abs=1e-4)
    assert 10 < body["total"]["latency_ms"]["p50"] < body["total"]["latency_ms"]["p99"] < 105
    assert sum(interval["predictions"] for interval in body["intervals"]) == 200
    assert body["interval_seconds"] == 60
    one = get(f"{monitor}/summary", hours=1, version="1")
    assert one["total"]["predictions"] == 120
    empty = get(f"{monitor}/summary", hours=1, version="none")
    assert empty["total"]["predictions"] == 0
    assert empty["total"]["unknown_share"] is None


def test_the_latest_predictions_are_the_newest(monitor):
    rows = get(f"{monitor}/predictions", limit=3)["predictions"]
    assert [row["request_id"] for row in rows] == ["2-0-79", "2-0-78", "2-0-77"]
    assert set(rows[0]["probabilities"]) == set(CODES)
    assert get(f"{monitor}/predictions", limit=1, version="1")["predictions"][0]["version"] == "1"


def test_the_line_of_versions_has_what_happened_to_them(monitor):
    body = get(f"{monitor}/versions")
    assert [event["event"] for event in body["events"]] == ["serve", "gate refused", "serve"]
    assert [(version["version"], version["predictions"]) for version in body["versions"]] == [("1", 120), ("2", 80)]
    assert not {"hash", "before"} & set(body["events"][0])


@pytest.mark.parametrize(
    "query", ["summary?hours=0", "summary?hours=x", "predictions?limit=5000", "predictions?limit=0"]
)
def test_wrong_questions_are_refused(monitor, query):
    assert httpx.get(f"{monitor}/{query}", **PLAIN).status_code == 422


def test_metrics_have_every_name_that_the_alert_rules_use(monitor):
    families = text_string_to_metric_families(httpx.get(f"{monitor}/metrics", **PLAIN).text)
    samples = {
        (sample.name, *map(sample.labels.get, sorted(sample.labels))): sample.value
        for family in families
        for sample in family.samples
    }
    assert samples[("monitor_refusals_total", "invalid_image", "1")] == 1
    assert sum(value for (name, *_), value in samples.items() if name == "monitor_predictions_total") == 200
    assert samples[("monitor_database_up",)] == 1
    rules = yaml.safe_load((ROOT / "containers" / "alert_rules.yml").read_text())
    expressions = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    used = {name for expression in expressions for name in re.findall(r"monitor_\w+", expression)}
    assert used <= {name for name, *_ in samples}


@contextmanager
def service(settings):
    with TestClient(create_app(Monitor(settings))) as client:
        yield client


def test_without_a_database_the_state_is_given_and_figures_are_503(tmp_path):
    RotatedLog(tmp_path).write(prediction("r"))
    settings = settings_of(tmp_path, monitor_database=f"sqlite:///{tmp_path / 'away' / 'monitor.db'}")
    with service(settings) as client:
        eventually(lambda: "does not answer" in client.get("/health").json()["error"])
        assert client.get("/health").status_code == 200, "the service works; the database does not"
        answer = client.get("/summary")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "database_unavailable")
        assert "monitor_database_up 0.0" in client.get("/metrics").text
        (tmp_path / "away").mkdir()
        eventually(lambda: client.get("/summary").status_code == 200)


def test_without_a_log_it_says_how_to_record(tmp_path):
    with service(settings_of(tmp_path, prediction_log="off")) as client:
        eventually(lambda: client.get("/health").json()["database_up"])
        assert client.get("/health").json()["reason"] == (
            "The prediction log is off. Set PREDICTION_LOG to a file to record predictions."
        )
        assert client.get("/summary").json()["serving"] is None


def test_a_loop_that_hangs_is_noticed(tmp_path, monkeypatch):
    monitor = Monitor(settings_of(tmp_path))
    with TestClient(create_app(monitor)) as client:
        eventually(lambda: client.get("/health").json()["database_up"])
        monkeypatch.setattr(time, "monotonic", lambda real=time.monotonic: real() + 10_000)
        assert not monitor.alive()


def test_it_needs_no_library_for_pictures_or_models():
    """Its image has none."""
    program = (
        "import sys; sys.modules.update(dict.fromkeys(['PIL', 'cv2', 'torch', 'pandas', 'mlflow', 'scipy'])); "
        "import monitoring.monitor_service, scripts.forget, scripts.load_outcomes"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
