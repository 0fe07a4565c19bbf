"""The start of TorchServe.

- It starts with the ledger's version if its archive is intact, else with the last good one or none, and logs which.
- Every port and folder follows the environment, so that two stacks can run side by side.
- Management is a socket in a folder that only the owner can open.
- Each of several takes a number, and folders of that number.
- `--help` explains a script and its variables, and starts nothing.
- Java replaces the script's process, with a minimal environment: no PYTHONPATH overrides the archive's code.
"""

import ast
import fcntl
import importlib.util
import json
import os
import re
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from handlers.file_limits import MAX_BYTES, MAX_UNCOMPRESSED_BYTES
from handlers.files import file_sha256
from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion.ledger import Entry, Ledger
from mlflow_tracking.stack_settings import ROOT, Settings

FOLDER = Path(__file__).parent.parent / "torchserve"
SETTINGS = {"minWorkers": 1, "maxWorkers": 1, "batchSize": 8, "maxBatchDelay": 2, "responseTimeout": 60}


@pytest.fixture(scope="module")
def render_config():
    spec = importlib.util.spec_from_file_location("render_config", FOLDER / "render_config.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def env(tmp_path) -> Iterator[dict[str, str]]:
    # Sockets need short paths, which pytest's folders are not everywhere.
    with tempfile.TemporaryDirectory(prefix="ts-", dir="/tmp") as state:
        yield {"MODEL_STORE": str(tmp_path / "store"), "STACK_STATE": state}


def properties(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def store_with(folder: Path, *versions: str) -> Ledger:
    """A store whose ledger says that the versions served one after the other."""
    ledger = Ledger()
    folder.mkdir()
    for version in versions:
        name = f"skin_vit-{version}.mar"
        (folder / name).write_text(f"archive {version}")
        sha256 = file_sha256(folder / name)
        ledger = ledger.stored(name, Entry(sha256, version, f"sha256:{version * 64}", SETTINGS)).serving(name)
    ledgers.write(folder, ledger)
    return ledger


def snapshot(path: Path) -> dict | None:
    text = properties(path).get("model_snapshot")
    return json.loads(text)["models"]["skin_vit"] if text else None


def test_an_empty_store_gives_no_models(render_config, env):
    path, remarks = render_config.render(env)
    assert snapshot(path) is None
    assert remarks == []


def test_it_starts_with_the_version_that_served_last(render_config, env, tmp_path):
    store_with(tmp_path / "store", "1", "2")
    path, remarks = render_config.render(env)
    assert snapshot(path) == {"2": {"marName": "skin_vit-2.mar", "defaultVersion": True, **SETTINGS}}
    assert remarks == ["Starting with version 2."]


@pytest.mark.parametrize("fault", ["changed", "missing"])
def test_a_damaged_archive_is_replaced_by_the_last_good_one(render_config, env, tmp_path, fault):
    store_with(tmp_path / "store", "1", "2")
    archive = tmp_path / "store" / "skin_vit-2.mar"
    archive.write_text("forged") if fault == "changed" else archive.unlink()
    path, remarks = render_config.render(env)
    assert list(snapshot(path)) == ["1"]
    assert remarks[0].startswith("Version 2 is left out: ") and "skin_vit-2.mar" in remarks[0]
    assert remarks[1] == "Starting with version 1."
    (tmp_path / "store" / "skin_vit-1.mar").unlink()
    assert snapshot(render_config.render(env)[0]) is None, "better no model than a forged one"


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": 2}', '{"schema": 1, "model": "skin_vit", "archives": {}}']
)
def test_a_damaged_ledger_is_reported_and_does_not_stop_the_start(render_config, env, tmp_path, text):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / ledgers.LEDGER).write_text(text)
    path, [remark] = render_config.render(env)
    assert snapshot(path) is None
    assert "cannot be read" in remark


def test_ports_and_folders_follow_the_environment(render_config, env, tmp_path):
    ports = {"TORCHSERVE_PORT": "19080", "TORCHSERVE_METRICS_PORT": "19082"}
    values = properties(render_config.render(env | ports | {"TORCHSERVE_RUN_DIR": env["STACK_STATE"] + "/r"})[0])
    assert values["inference_address"] == "http://127.0.0.1:19080"
    assert values["metrics_address"] == "http://127.0.0.1:19082"
    assert values["management_address"] == f"unix:{env['STACK_STATE']}/r/management.sock"
    assert values["model_store"] == str(tmp_path / "store")
    assert (values["grpc_inference_port"], values["grpc_management_port"]) == ("0", "0")
    assert "$" not in "".join(values.values())


def test_non_ascii_letters_are_escaped_for_java(render_config, env):
    """A properties file is Latin-1 to Java, with other letters by their numbers."""
    place = Path(env["STACK_STATE"]) / "prüf läsion 皮"
    text = render_config.render(env | {"STACK_STATE": str(place), "MODEL_STORE": str(place / "store")})[0].read_text()
    assert text.isascii()
    lines = text.encode("latin-1").decode("unicode_escape").splitlines()
    values = dict(line.split("=", 1) for line in lines if "=" in line)
    assert values["model_store"] == str(place / "store")
    assert values["management_address"].startswith(f"unix:{place}/")


def test_the_promoter_looks_for_management_where_the_start_puts_it(render_config, env, monkeypatch):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    for name in ("TORCHSERVE_RUN_DIR", "TORCHSERVE_MANAGEMENT"):
        monkeypatch.delenv(name, raising=False)
    assert Settings().management == properties(render_config.render(env)[0])["management_address"]


def test_only_the_owner_reaches_management(render_config, env, tmp_path):
    path, _ = render_config.render(env)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_path_too_long_for_a_socket_is_refused_with_a_sentence(render_config, env, tmp_path):
    with pytest.raises(render_config.StartError, match="a folder with a shorter path"):
        render_config.render(env | {"TORCHSERVE_RUN_DIR": str(tmp_path / ("x" * 100))})


def test_a_second_torchserve_in_the_same_folder_is_refused(render_config, env, tmp_path):
    run = Path(env["STACK_STATE"]) / "run"
    run.mkdir()
    with socket.socket(socket.AF_UNIX) as alive:
        alive.bind(str(run / "management.sock"))
        alive.listen()
        with pytest.raises(render_config.StartError, match="is running already"):
            render_config.render(env)
    render_config.render(env)  # a killed server left its socket, without a listener


def test_render_config_needs_only_the_standard_library():
    tree = ast.parse((FOLDER / "render_config.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in names} <= set(sys.stdlib_module_names)


def test_the_largest_allowed_image_fits_into_a_request():
    template = properties(FOLDER / "config.properties")
    largest = max(MAX_BYTES * 4 / 3, MAX_UNCOMPRESSED_BYTES)  # in base64 or as a form, with the options
    assert int(template["max_request_size"]) > largest + 4096
    assert f"client_max_body_size {template['max_request_size']};" in (ROOT / "containers/nginx.conf").read_text()


def test_the_model_config_is_what_the_handler_and_torchserve_expect():
    values = yaml.safe_load((FOLDER / "model-config.yaml").read_text())
    assert values["handler"].keys() == {"precision", "threads"}
    assert values["batchSize"] > 1


@pytest.fixture
def fake_java(tmp_path):
    """A Java that says its version, or shows how it was called."""

    def make(version: str, folder: str = "java") -> Path:
        path = tmp_path / folder / "bin" / "java"
        path.parent.mkdir(parents=True)
        path.write_text(
            f"""#!/bin/sh
if [ "$1" = -version ]; then echo 'openjdk version "{version}" 2025-01-01' >&2; exit 0; fi
pwd; env; for word in "$@"; do echo "argument $word"; done; echo "pid $$"
"""
        )
        path.chmod(0o755)
        return path

    return make


def start(env: dict[str, str], **more: str) -> tuple[int, list[str], str]:
    process = subprocess.Popen(
        [FOLDER / "start_torchserve.sh"], cwd="/", text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={"PATH": os.environ["PATH"]} | env | more,
    )  # fmt: skip
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return process.pid, out.splitlines(), err


def test_java_replaces_the_script_with_a_minimal_environment(env, fake_java, tmp_path):
    java = fake_java("17.0.1")
    run = f"{env['STACK_STATE']}/run"
    Path(run, "models", "old").mkdir(parents=True)
    Path(run, ".ts.sock.9000").touch()
    more = {"JAVA_HOME": str(java.parents[1]), "PYTHONPATH": "/somewhere", "SECRET": "x", "OMP_NUM_THREADS": "2"}
    pid, lines, _ = start(env, **more)
    assert lines[0] == run, "a folder that holds no `handlers`"
    assert f"pid {pid}" in lines, "a signal to the script reaches Java"
    variables = {line.split("=", 1)[0] for line in lines[1:] if "=" in line and not line.startswith("argument ")}
    allowed = {"PATH", "HOME", "LANG", "TMPDIR", "TEMP", "LOG_LOCATION", "METRICS_LOCATION", "STACK_STATE"}
    allowed |= {"LOG_PREDICTIONS", "OMP_NUM_THREADS"}
    assert variables - {"PWD", "SHLVL", "_", "OLDPWD"} == allowed
    assert {"argument -Xmx1g", "argument -XX:MaxDirectMemorySize=2g"} <= set(lines)
    assert f"argument -Dpredictions={env['STACK_STATE']}/logs/predictions.jsonl" in lines
    assert not Path(run, "models").exists(), "what a killed server left"
    assert not Path(run, ".ts.sock.9000").exists()


def test_the_prediction_log_is_put_elsewhere_or_turned_off(env, fake_java):
    java = {"JAVA_HOME": str(fake_java("17.0.1").parents[1])}
    _, lines, _ = start(env, **java, PREDICTION_LOG="here.jsonl")
    assert f"argument -Dpredictions={FOLDER.parent}/here.jsonl" in lines
    _, lines, _ = start(env, **java, PREDICTION_LOG="off")
    assert not any(line.startswith("LOG_PREDICTIONS") for line in lines)


@pytest.mark.parametrize(("days", "folder"), [("", None), ("0", None), ("14", "{state}/kept_images"), ("7", "here")])
def test_pictures_are_kept_only_where_the_operator_says_so(env, fake_java, days, folder):
    java = {"JAVA_HOME": str(fake_java("17.0.1").parents[1])}
    _, lines, _ = start(env, **java, KEEP_IMAGES_DAYS=days, KEPT_IMAGES="here" if folder == "here" else "")
    place = {None: None, "here": f"{FOLDER.parent}/here"}.get(folder, f"{env['STACK_STATE']}/kept_images")
    assert [line for line in lines if line.startswith("KEPT_IMAGES=")] == ([f"KEPT_IMAGES={place}"] if place else [])


def test_an_empty_cuda_visible_devices_is_passed_on(env, fake_java):
    java = {"JAVA_HOME": str(fake_java("17.0.1").parents[1])}
    _, lines, _ = start(env, **java, CUDA_VISIBLE_DEVICES="")
    assert "CUDA_VISIBLE_DEVICES=" in lines, "dropped, it would mean all of them"


def test_an_old_java_is_skipped(env, fake_java):
    old, new = fake_java("11.0.2", "old"), fake_java("21.0.8", "new")
    _, lines, _ = start(env, JAVA_HOME=str(old.parents[1]), PATH=f"{new.parent}:{os.environ['PATH']}")
    assert "argument org.pytorch.serve.ModelServer" in lines


def test_the_start_fails_with_the_helpers_sentence(env, fake_java, tmp_path):
    java = fake_java("17.0.1")
    env |= {"JAVA_HOME": str(java.parents[1]), "TORCHSERVE_RUN_DIR": str(tmp_path / ("x" * 100))}
    command = [FOLDER / "start_torchserve.sh"]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "a folder with a shorter path" in done.stderr
    assert "Traceback" not in done.stderr


STARTERS = {
    "promoter": ([sys.executable, "-m", "mlflow_tracking.promotion.service"], "Reconcile every", "PROMOTER_[A-Z_]+"),
    "start": ([str(FOLDER / "start_torchserve.sh")], "version that served last", "TORCHSERVE_[A-Z_]+"),
    "render": (
        [sys.executable, str(FOLDER / "render_config.py")],
        "model_snapshot",
        "TORCHSERVE_(?!URL|JAVA|REPL)[A-Z_]+",
    ),
}


@pytest.mark.parametrize("starter", STARTERS)
def test_help_says_what_it_does_and_starts_nothing(env, fake_java, starter):
    command, words, variables = STARTERS[starter]
    env = os.environ | env | {"JAVA_HOME": str(fake_java("17.0.1").parents[1]), "PYTHONPATH": str(ROOT)}
    env |= {"PROMOTER_PORT": "70000"}  # with which the promoter would fail, not run
    done = subprocess.run([*command, "--help"], env=env, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert words in done.stdout
    known = set(re.findall(rf"^# ({variables}|MODEL_STORE|STACK_STATE)=", (ROOT / ".env.example").read_text(), re.M))
    known -= {"TORCHSERVE_URL", "PROMOTER_URL"}
    assert known <= set(re.findall("[A-Z_]+", done.stdout))
    assert not Path(env["MODEL_STORE"]).exists()
    assert list(Path(env["STACK_STATE"]).iterdir()) == []
    unknown = subprocess.run([*command, "--port"], env=env, capture_output=True, text=True, check=False, timeout=60)
    assert unknown.returncode == 2
    assert "--port" in unknown.stderr


def test_each_of_several_takes_the_first_free_number(env, fake_java, tmp_path):
    shared = Path(env["STACK_STATE"]) / "shared"
    shared.mkdir()
    run, log = Path(env["STACK_STATE"]) / "run", tmp_path / "log" / "predictions.jsonl"
    run.mkdir()
    for number in ("1", "2"):
        (tmp_path / "store" / number).mkdir(parents=True)  # containers/promoters.py makes them
    replica = {"TORCHSERVE_REPLICAS": str(shared), "TORCHSERVE_RUN_DIR": str(run), "PREDICTION_LOG": str(log)}
    replica |= {"JAVA_HOME": str(fake_java("17.0.1").parents[1]), "TORCHSERVE_PORT": "9999"}
    with (shared / "1.lock").open("w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        _, lines, _ = start(env, **replica)
        assert "This is replica 2." in lines
    assert properties(run / "config.properties")["model_store"] == str(tmp_path / "store" / "2")
    assert f"argument -Dpredictions={tmp_path}/log/2/predictions.jsonl" in lines
    assert re.fullmatch(r"http://[0-9.]+:9999\n", (shared / "2.url").read_text())
    assert (run / "replica.sock").readlink() == shared / "2.sock"
    assert "This is replica 1." in start(env, **replica)[1], "a lock without a process is free"
