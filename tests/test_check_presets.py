"""check_presets.py trains, exports and checks a preset."""

import json
import re
import subprocess
import sys

import pytest

from handlers.errors import UserError
from scripts.studies import check_presets
from scripts.studies.check_presets import served_presets
from tests.tiny_lesions import tiny_manifest
from training.config import ROOT


def test_the_documented_table_has_every_preset_to_be_served():
    section = (ROOT / "docs" / "lab-notes.md").read_text().partition("\n## Presets\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == served_presets()
    assert "held_out" not in served_presets()


def test_a_bundle_without_its_checkpoint_is_an_error(tmp_path):
    manifest, out = tiny_manifest(tmp_path / "data"), tmp_path / "out"
    (out / "vit_tiny" / "bundle").mkdir(parents=True)
    with pytest.raises(UserError, match="There is no checkpoint"):
        check_presets.main(manifest, out, ["vit_tiny"])


def test_an_unknown_preset_is_reported_before_the_data_is_read(tmp_path):
    with pytest.raises(UserError, match="There is no preset 'vit_tinny'") as error:
        check_presets.main(tmp_path / "nowhere.csv", tmp_path / "out", ["vit_tinny"])
    assert error.value.exit_code == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_preset_runs_from_training_to_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    manifest = tiny_manifest(tmp_path / "data")
    command = [sys.executable, ROOT / "scripts" / "studies" / "check_presets.py"]
    command += ["--data", manifest, "--out", tmp_path / "out"]
    done = subprocess.run([*command, "--preset", "vit_tiny", "--size", "32"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads((tmp_path / "out" / "presets.json").read_text())["vit_tiny"]
    assert row["val_loss"][-1] < row["val_loss"][0]
    assert row["gradcam"] < 0.01
    assert row["runtime"] == "openvino"
    assert "| `vit_tiny` | 5.5 M | 32 px |" in done.stdout
    again = subprocess.run([*command, "--preset", "vit_tiny", "--size", "48"], capture_output=True, text=True)
    assert "| `vit_tiny` | 5.5 M | 32 px |" in again.stdout  # the size of the trained model, not the new option
    unknown = subprocess.run([*command, "--preset", "vit_tinny"], capture_output=True, text=True)
    assert unknown.returncode == 2
    assert "There is no preset 'vit_" in unknown.stderr
