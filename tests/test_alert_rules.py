"""Each alert of `containers/alert_rules.yml` fires when it should, and not just before.

The promtool of the Prometheus image in docker-compose.yml judges. Without an engine these tests fail.
"""

import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from tests.conftest import ROOT

pytestmark = [pytest.mark.containers, pytest.mark.timeout(300)]
IMAGE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]["prometheus"]["image"]
RULES = ROOT / "containers" / "alert_rules.yml"


class Case(NamedTuple):
    """Series, one value a minute in promtool's notation, and whether the alert fires after some minutes."""

    alert: str
    series: dict[str, str]
    minutes: int
    labels: dict[str, str] | None  # of the alert; None: it does not fire


MONITOR = 'up{job="monitor"}'
DRIFT = 'monitor_drift_alarm{version="2"}'
BAD = 'monitor_refusals_total{version="1",code="invalid_image"}'
FAILED = 'monitor_refusals_total{version="1",code="internal_error"}'
ANSWERED = 'monitor_predictions_total{version="1",code="NV"}'
CASES = [
    Case("MonitorDown", {MONITOR: "0x10"}, 5, {"job": "monitor"}),
    Case("MonitorDown", {MONITOR: "1 1 1 0 0 1 0 0", 'up{job="torchserve"}': "0x10"}, 7, None),
    Case("MonitorDatabaseDown", {"monitor_database_up": "0x10"}, 6, {}),
    Case("MonitorDatabaseDown", {"monitor_database_up": "1 1 0x4 1"}, 6, None),
    Case("MonitorBehind", {"monitor_bytes_behind": "200000001x10"}, 6, {}),
    Case("MonitorBehind", {"monitor_bytes_behind": "200000000x10"}, 10, None),
    Case("UnreadableLines", {"monitor_unreadable_lines_total": "7x60 8x30"}, 90, {}),
    Case("UnreadableLines", {"monitor_unreadable_lines_total": "7x10 8x80"}, 90, None),
    Case("ModelErrors", {FAILED: "0x20 1x10"}, 25, {}),
    Case("ModelErrors", {FAILED: "0x5 1x30", BAD: "0+1x40"}, 30, None),
    Case("ManyRefusals", {BAD: "0+1x60", ANSWERED: "0+4x60"}, 60, {}),
    Case("ManyRefusals", {BAD: "0+1x60"}, 60, {}),
    Case("ManyRefusals", {BAD: "0+1x60", ANSWERED: "0+6x60"}, 60, None),
    Case("ManyRefusals", {BAD: "0x50 4 8 12 16x10", ANSWERED: "0x60"}, 60, None),
    Case("Drift", {DRIFT: "0 0 1"}, 2, {"version": "2"}),
    Case("Drift", {DRIFT: "1 1 0"}, 2, None),
]


def alerts() -> dict[str, dict[str, Any]]:
    groups = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def promtool(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run promtool on copies of the rules and of what is in a folder."""
    folder.chmod(0o755)
    shutil.copy(RULES, folder)
    run = ["docker", "run", "--rm", "--network=none", f"--volume={folder}:/rules:ro,z", "--entrypoint=promtool", IMAGE]
    return subprocess.run([*run, *words], capture_output=True, text=True)


def test_each_alert_has_a_case_that_fires_and_one_that_does_not():
    for fires in (True, False):
        assert {case.alert for case in CASES if (case.labels is not None) is fires} == alerts().keys()


def judged(case: Case, folder: Path) -> subprocess.CompletedProcess[str]:
    """Let promtool judge a case."""
    rule = alerts()[case.alert]
    expected = [{"exp_labels": case.labels, "exp_annotations": rule["annotations"]}] if case.labels is not None else []
    table = {
        "rule_files": [RULES.name],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
                "alert_rule_test": [
                    {"eval_time": f"{case.minutes}m", "alertname": case.alert, "exp_alerts": expected},
                ],
            }
        ],
    }
    (folder / "case.yml").write_text(yaml.safe_dump(table))
    return promtool(folder, "test", "rules", "/rules/case.yml")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.alert}-{case.labels is not None}-{case.minutes}")
def test_an_alert_fires_when_it_should(case, tmp_path):
    done = judged(case, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    opposite = judged(case._replace(labels={} if case.labels is None else None), tmp_path)
    assert "FAILED" in opposite.stdout + opposite.stderr


def test_the_rules_are_valid(tmp_path):
    done = promtool(tmp_path, "check", "rules", f"/rules/{RULES.name}")
    assert done.returncode == 0, done.stdout + done.stderr
