"""TorchServe with one archive: this project's, or the stock handler's. Both run with the same Java options."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

import yaml

from handlers.bundle import Bundle
from handlers.errors import UserError
from mlflow_tracking.promotion import model_archive
from mlflow_tracking.stack_settings import MODEL_NAME, ROOT
from mlflow_tracking.torchserve_client import TorchServe, TorchServeError, TorchServeUnavailable
from scripts import child_processes

PATH = f"/predictions/{MODEL_NAME}"
START_SECONDS = 180
KEEP_DAYS = 1  # of pictures, if they are kept
VERSION = "1"
STOCK_HANDLER = Path(__file__).parent / "stock_handler.py"


class BenchServerError(UserError):
    """A server that does not start."""


class Server(NamedTuple):
    """A running TorchServe, and its folder of pictures kept for review."""

    port: int
    pid: int
    kept: Path


@contextmanager
def ours(bundle: Bundle, precision: str, keep: bool = False) -> Iterator[Server]:
    """Run this project's archive with the settings of torchserve/model-config.yaml. `keep` keeps pictures."""
    config = yaml.safe_load(model_archive.MODEL_CONFIG.read_text())
    config["handler"]["precision"] = precision
    with _folder(config) as folder:
        store = folder / "store"
        model_archive.build(
            bundle.path, store / "model.mar", version=VERSION, model_config=folder / model_archive.MODEL_CONFIG.name
        )
        with _torchserve(folder, "model.mar", KEEP_DAYS if keep else 0) as server:
            yield server


@contextmanager
def stock(bundle: Bundle) -> Iterator[Server]:
    """Run the stock handler with the bundle's network: one worker, one request at a time."""
    config = {
        "minWorkers": 1,
        "maxWorkers": 1,
        "responseTimeout": 120,
        "handler": {"bundle": str(bundle.path.resolve())},
    }
    with _folder(config) as folder:
        command: list[str | Path] = [Path(sys.executable).parent / "torch-model-archiver", "--model-name", MODEL_NAME]
        command += ["--version", VERSION, "--handler", STOCK_HANDLER, "--export-path", folder / "store"]
        command += ["--config-file", folder / model_archive.MODEL_CONFIG.name]
        environment = os.environ | {"TMPDIR": str(folder)}  # it works in $TMPDIR/MODEL_NAME, which may be in use
        archiver = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if archiver.returncode:
            raise BenchServerError(f"torch-model-archiver failed: {archiver.stderr.strip()}.")
        with _torchserve(folder, f"{MODEL_NAME}.mar") as server:
            yield server


@contextmanager
def _folder(config: dict[str, object]) -> Iterator[Path]:
    """A folder with a model store and a model-config.yaml. It lies in /tmp, because sockets need a short path."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as temporary:
        (Path(temporary) / "store").mkdir()
        (Path(temporary) / model_archive.MODEL_CONFIG.name).write_text(yaml.safe_dump(config))
        yield Path(temporary)


@contextmanager
def _torchserve(folder: Path, archive_name: str, keep_days: int = 0) -> Iterator[Server]:
    """Run TorchServe with one archive of `folder`/store, and end it with the block."""
    port, metrics = child_processes.free_ports(2)
    # Only the archive's configuration sets the threads.
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "PYTHONPATH"))}
    env |= {"STACK_STATE": str(folder), "MODEL_STORE": str(folder / "store"), "TORCHSERVE_RUN_DIR": str(folder / "run")}
    env |= {"TORCHSERVE_PORT": str(port), "TORCHSERVE_METRICS_PORT": str(metrics), "TORCHSERVE_HOST": "127.0.0.1"}
    env |= {"TORCHSERVE_MANAGEMENT": "", "KEEP_IMAGES_DAYS": str(keep_days), "KEPT_IMAGES": str(folder / "kept")}
    log = folder / "torchserve.log"
    process = child_processes.start([ROOT / "torchserve" / "start_torchserve.sh"], env, log)
    try:
        with closing(TorchServe(f"http://127.0.0.1:{port}", f"unix:{folder}/run/management.sock")) as client:
            end = time.monotonic() + START_SECONDS
            while not _ready(client, archive_name):
                if process.poll() is not None or time.monotonic() > end:
                    lines = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
                    raise BenchServerError(f"TorchServe did not start. The end of its log:\n{lines}")
                time.sleep(0.1)
        yield Server(port, process.pid, folder / "kept")
    finally:
        child_processes.end(process, 5)


def _ready(client: TorchServe, archive_name: str) -> bool:
    """Return True once the archive has a worker. Registers it when TorchServe answers."""
    try:
        versions = client.versions()
        if VERSION not in versions:
            client.register(archive_name, 1)
        return VERSION in versions and bool(versions[VERSION].ready)
    except (TorchServeUnavailable, TorchServeError):
        return False
