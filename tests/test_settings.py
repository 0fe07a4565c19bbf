"""Settings of the registry's side: one reading of the environment for every command.

- a value that cannot be is told in one sentence, by whichever command;
- every command looks for TorchServe's management socket where `make up` puts it, also below a deep folder;
- MLflow's client leaves no file behind that counts installations.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlflow_tracking.settings import SOCKET_PATH, Settings, SettingsError
from scripts.stack import Settings as StackSettings
from tests.conftest import ROOT

COMMANDS = {
    "promote": ["scripts/promote.py", "status"],
    "register": ["scripts/register_model.py", "--run-id", "x"],
    "replay": ["scripts/replay.py"],
    "lineage": ["scripts/lineage.py", "3"],
    "stack": ["scripts/stack.py", "status"],
    "promoter": ["-m", "mlflow_tracking.promotion.service"],
    "predict": ["scripts/predict.py", "lesion.jpg"],
    "evaluate": ["training/evaluate.py", "--bundle", "x", "--data", "x", "--out", "x"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_value_gets_one_sentence(command):
    env = os.environ | {"PROMOTER_PORT": "70000", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *COMMANDS[command]], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    [line] = (done.stdout + done.stderr).splitlines()
    assert line.startswith("PROMOTER_PORT=70000 cannot be: ")


@pytest.mark.parametrize("uri", ["foo", "127.0.0.1:5001", "file:///tmp/runs", "http:", "http:///", "/tmp/runs"])
def test_an_address_of_mlflow_that_cannot_be_gets_one_sentence(monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(SettingsError, match=f"^MLFLOW_TRACKING_URI={uri} cannot be: it is http://HOST:PORT "):
        _ = Settings.load().registry_uri


@pytest.mark.parametrize("uri", ["http://mlflow:5001", "https://kim:key@mlflow.example/base", "sqlite:////tmp/runs.db"])
def test_an_address_of_mlflow_is_taken_as_it_is(monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert Settings.load().registry_uri == uri


@pytest.mark.parametrize("depth", [1, 30])
def test_the_socket_is_where_the_stack_puts_it(monkeypatch, tmp_path, depth):
    for name in ("TORCHSERVE_RUN_DIR", "TORCHSERVE_MANAGEMENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("STACK_STATE", str(tmp_path / ("deep" * depth)))
    socket = Settings.load().management.removeprefix("unix:")
    assert Path(socket).parent == StackSettings.load().run_dir
    assert len(os.fsencode(socket)) <= SOCKET_PATH
    monkeypatch.setenv("TORCHSERVE_RUN_DIR", "/tmp/" + "x" * SOCKET_PATH)
    with pytest.raises(SettingsError, match="name a shorter folder"):
        _ = Settings.load().management


def test_importing_mlflow_leaves_no_file_of_statistics(tmp_path):
    code = "from mlflow_tracking.registry import Registry; Registry('http://127.0.0.1:9').resolve('champion')"
    # Among tests and in CI MLflow is quiet by itself.
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "RegistryUnavailable" in done.stderr
    assert [path for path in tmp_path.rglob("*") if "mlflow" in path.parts] == []
