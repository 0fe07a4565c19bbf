"""check_presets.py trains, exports and checks a preset."""

import json
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from handlers.errors import UserError
from mlflow_tracking.settings import Settings
from scripts.studies import check_presets
from scripts.studies.check_presets import served_presets
from tests.models import tiny_bundle
from tests.tiny_lesions import tiny_manifest
from training.config import ROOT


def test_the_documented_table_has_every_preset_to_be_served():
    section = (ROOT / "docs" / "lab-notes.md").read_text().partition("\n## Presets\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == served_presets()
    assert "held_out" not in served_presets()


def test_a_promoted_preset_is_awaited_while_torchserve_restarts(tmp_path, monkeypatch):
    bundle = tiny_bundle(tmp_path / "bundle")
    expected = {case.image: case.probabilities for case in bundle.golden()}
    turns = iter(["away", "busy"])  # and then it answers

    class Restarting(BaseHTTPRequestHandler):
        def reply(self, values, status=200):
            content = json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self):  # which version is the default
            self.reply([{"modelVersion": "1"}])

        def do_POST(self):
            image = self.rfile.read(int(self.headers["Content-Length"]))
            turn = next(turns, "")
            if turn == "busy":
                self.reply({"code": 503, "message": "no worker is available"}, 503)
            elif turn != "away":
                self.reply({"prediction": {}, "model": {"digest": bundle.digest}, "probabilities": expected[image]})

        def log_message(self, *_):
            pass

    monkeypatch.setattr(check_presets.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0))
    monkeypatch.setattr(check_presets.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # a proxy for other hosts, not for this one
    with ThreadingHTTPServer(("127.0.0.1", 0), Restarting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        settings = Settings(torchserve_url=url, torchserve_management=url)
        assert check_presets.promote(bundle, settings) == 0
        assert next(turns, None) is None
        server.shutdown()


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
