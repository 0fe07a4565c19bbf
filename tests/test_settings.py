"""Settings: every command reads the environment in the same way.

- an unusable value gives one sentence, whichever command reads it;
- every command finds TorchServe's management socket where `make up` puts it, also below a deep folder;
- MLflow's client writes no file of statistics.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlflow_tracking.stack_settings import SOCKET_PATH, Settings, SettingsError
from scripts.stack import StackSettings
from tests.conftest import ROOT

COMMANDS = [
    ["scripts/promote.py", "status"],
    ["scripts/register_model.py", "--run-id", "x"],
    ["scripts/replay.py"],
    ["scripts/lineage.py", "3"],
    ["scripts/stack.py", "status"],
    ["mlflow_tracking/promotion/service.py"],
    ["scripts/predict.py", "lesion.jpg"],
    ["training/evaluate.py", "--bundle", "x", "--data", "x", "--out", "x"],
]
# All in one process, because each alone would import torch or mlflow again.
RUN_ALL = """
import contextlib, io, json, runpy, sys
outcomes = []
for command in json.loads(sys.argv[1]):
    sys.argv, code = command, None
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as end:
            code = end.code
    outcomes.append((command[0], code, out.getvalue()))
print(json.dumps(outcomes))
"""


def test_every_command_answers_an_unusable_value_with_one_sentence():
    env = os.environ | {"PROMOTER_PORT": "70000", "PYTHONPATH": str(ROOT)}
    program = [sys.executable, "-c", RUN_ALL, json.dumps(COMMANDS)]
    done = subprocess.run(program, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    sentence = "PROMOTER_PORT is '70000': it must be a port number from 1 to 65535."
    assert json.loads(done.stdout) == [[command[0], 1, f"{sentence}\n"] for command in COMMANDS]


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("MLFLOW_PORT", "x", "a port number from 1 to 65535"),
        ("PROMOTER_POLL_SECONDS", "0", "a number of seconds above 0"),
        ("PROMOTER_KEEP_ARCHIVES", "-1", "a whole number, 0 or greater"),
    ],
)
def test_an_unusable_value_is_named_with_its_rule(monkeypatch, name, value, rule):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as raised:
        Settings.load()
    assert str(raised.value) == f"{name} is '{value}': it must be {rule}."


@pytest.mark.parametrize("uri", ["foo", "127.0.0.1:5001", "file:///tmp/runs", "http:", "http:///", "/tmp/runs"])
def test_an_unusable_address_of_mlflow_gives_one_sentence(monkeypatch, uri):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(SettingsError, match=f"^MLFLOW_TRACKING_URI is '{uri}': it must be http://HOST:PORT, "):
        _ = Settings.load().registry_uri
    for usable in ("http://mlflow:5001", "https://kim:key@mlflow.example/base", "sqlite:////tmp/runs.db"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", usable)
        assert Settings.load().registry_uri == usable


@pytest.mark.parametrize("depth", [1, 30])
def test_the_socket_is_where_the_stack_puts_it(monkeypatch, tmp_path, depth):
    for name in ("TORCHSERVE_RUN_DIR", "TORCHSERVE_MANAGEMENT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("STACK_STATE", str(tmp_path / ("deep" * depth)))
    socket = Settings.load().management.removeprefix("unix:")
    assert Path(socket).parent == StackSettings.load().run_dir
    assert len(os.fsencode(socket)) <= SOCKET_PATH
    monkeypatch.setenv("TORCHSERVE_RUN_DIR", "/tmp/" + "x" * SOCKET_PATH)
    with pytest.raises(SettingsError, match="Set a shorter one"):
        _ = Settings.load().management


def test_importing_mlflow_leaves_no_file_of_statistics(tmp_path):
    code = "from mlflow_tracking.registry import Registry; Registry('http://127.0.0.1:9').resolve('champion')"
    # Among tests and in CI MLflow is quiet by itself.
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "RegistryUnavailable" in done.stderr
    assert [path for path in tmp_path.rglob("*") if "mlflow" in path.parts] == []


def test_each_of_several_torchserves_has_a_log(tmp_path):
    names = (
        "predictions.jsonl",
        "predictions.jsonl.1",
        "1/predictions.jsonl",
        "2/predictions.jsonl.1",
        "x/predictions.jsonl",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    logs = Settings(prediction_log=tmp_path / "predictions.jsonl").prediction_logs
    assert [str(path.relative_to(tmp_path)) for path in logs] == [names[0], names[2], names[1], names[3]]


@pytest.mark.parametrize(
    ("name", "value"), [("TORCHSERVE_URL", "file:{folder}/1.url"), ("PROMOTER_KEY_FILE", "{folder}/key")]
)
def test_a_file_that_a_setting_names(tmp_path, monkeypatch, name, value):
    monkeypatch.setenv(name, value.format(folder=tmp_path))
    settings = Settings()
    with pytest.raises(SettingsError, match=f"{name} names {tmp_path}.*, which cannot be read"):
        _ = (settings.inference_url, settings.promoter_key)
    (tmp_path / "1.url").write_text("http://10.0.0.2:8080\n")
    (tmp_path / "key").write_text("secret\n")
    assert (settings.inference_url, settings.promoter_key) in (
        ("http://10.0.0.2:8080", b""), ("http://127.0.0.1:8080", b"secret"),
    )  # fmt: skip
