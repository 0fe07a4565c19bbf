"""check_presets.py trains, exports and checks a preset, and says when one does not learn."""

import json
import re
import subprocess
import sys

import pytest

from scripts.check_presets import served_presets
from tests.tiny_lesions import tiny_manifest
from training.config import ROOT


def test_the_documented_table_has_every_preset_to_be_served():
    text = (ROOT / "docs" / "presets.md").read_text()
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == served_presets()
    assert "held_out" not in served_presets()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_preset_is_run_and_described(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    manifest = tiny_manifest(tmp_path / "data")
    command = [sys.executable, ROOT / "scripts" / "check_presets.py", "--data", manifest, "--out", tmp_path / "out"]
    done = subprocess.run([*command, "--preset", "vit_tiny", "--size", "32"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads((tmp_path / "out" / "presets.json").read_text())["vit_tiny"]
    assert row["val_loss"][-1] < row["val_loss"][0]
    assert row["gradcam"] < 0.01
    assert row["runtime"] == "openvino"
    assert "| `vit_tiny` | 5.5 M | 32 px |" in done.stdout
    again = subprocess.run([*command, "--preset", "vit_tiny", "--size", "48"], capture_output=True, text=True)
    assert "| `vit_tiny` | 5.5 M | 32 px |" in again.stdout  # what was trained, not what is asked for now
    unknown = subprocess.run([*command, "--preset", "vit_tinny"], capture_output=True, text=True)
    assert unknown.returncode == 1
    assert "did you mean 'vit_tiny'?" in unknown.stderr
