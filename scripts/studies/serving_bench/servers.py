"""The servers that are measured: started one at a time, each on ports and in a folder of its own, and ended whole.

TorchServe is started for all by this project's script, so that Java has the same heap and the same settings.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from handlers.bundle import Bundle
from handlers.errors import UserError
from mlflow_tracking.promotion import archive
from mlflow_tracking.promotion.torchserve_client import TorchServe, TorchServeError, TorchServeUnavailable
from mlflow_tracking.settings import MODEL_NAME, ROOT
from scripts.free_ports import free_ports
from scripts.studies.serving_bench import fastapi_app
from scripts.studies.serving_bench.load import LoadError

PATH = f"/predictions/{MODEL_NAME}"
START_SECONDS = 180.0  # two workers that share two busy cores
VERSION = "1"
STOCK_HANDLER = Path(__file__).parent / "stock_handler.py"


class ServerError(UserError):
    """A server that does not start; says why."""


@dataclass(frozen=True)
class Settings:
    """How a server runs: `threads` of one inference (0: the runtime's own choice), `delay` in ms for a batch.

    As text "2×1, 8, 10 ms": two workers of one thread each, batches of eight, for which the first waits 10 ms.
    """

    workers: int = 1
    threads: int = 0
    batch: int = 1
    delay: int = 0

    def __str__(self) -> str:
        words = [f"{self.workers}×{self.threads or 'auto'}", f"{self.batch}"]
        return ", ".join(words + ([f"{self.delay} ms"] if self.batch > 1 else []))


@dataclass
class Server:
    """A running server: its port, its first process, and how long it took until all its workers were ready (s)."""

    port: int
    process: subprocess.Popen[bytes]
    ready_seconds: float

    def memory(self) -> dict[str, float]:
        """Resident memory in MB: Java's, and that of all other processes of the server together."""
        sums = {"java": 0.0, "python": 0.0}
        root = psutil.Process(self.process.pid)
        for process in [root, *root.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                sums["java" if "java" in process.name() else "python"] += process.memory_info().rss / 1e6
        return sums


def shipped() -> Settings:
    """The settings of torchserve/model-config.yaml."""
    config = yaml.safe_load(archive.MODEL_CONFIG.read_text())
    return Settings(
        config["minWorkers"], config["handler"]["threads"] or 0, config["batchSize"], config["maxBatchDelay"]
    )


@contextmanager
def ours(bundle: Bundle, precision: str, settings: Settings) -> Iterator[Server]:
    """This project's handler, as promotion archives it, but for these settings."""
    config = yaml.safe_load(archive.MODEL_CONFIG.read_text()) | _torchserve_numbers(settings)
    config["handler"] |= {"precision": precision, "threads": settings.threads or None}
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as temporary:  # sockets need a short path
        store = Path(temporary) / "store"
        store.mkdir()
        described = Path(temporary) / "model-config.yaml"
        described.write_text(yaml.safe_dump(config))
        archive.build(bundle.path, store / "ours.mar", version=VERSION, model_config=described)
        with _torchserve(Path(temporary), "ours.mar", settings.workers) as server:
            yield server


@contextmanager
def stock(model: Path, runtime: str, settings: Settings) -> Iterator[Server]:
    """The stock handler with the naive model in the folder `model`, archived by torch-model-archiver."""
    config = _torchserve_numbers(settings) | {
        "responseTimeout": 120,
        "handler": {"folder": str(model), "threads": settings.threads, "runtime": runtime},
    }
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as temporary:
        store = Path(temporary) / "store"
        store.mkdir()
        described = Path(temporary) / "model-config.yaml"
        described.write_text(yaml.safe_dump(config))
        command = [str(Path(sys.executable).parent / "torch-model-archiver"), "--model-name", MODEL_NAME]
        command += ["--version", VERSION, "--handler", str(STOCK_HANDLER), "--config-file", str(described)]
        # It works in $TMPDIR/<model's name>, which another one may be using.
        made = subprocess.run(
            [*command, "--export-path", str(store)],
            env=os.environ | {"TMPDIR": temporary},
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            raise ServerError(f"torch-model-archiver failed: {made.stderr.strip()}")
        with _torchserve(Path(temporary), f"{MODEL_NAME}.mar", settings.workers) as server:
            yield server


@contextmanager
def fastapi(model: Path, settings: Settings) -> Iterator[Server]:
    """FastAPI under uvicorn with the naive model in the folder `model`."""
    port = free_ports(1)[0]
    (model / fastapi_app.SETTINGS).write_text(json.dumps({"threads": settings.threads}))
    command = [sys.executable, "-m", "uvicorn", "--factory", f"{fastapi_app.__name__}:create", "--port", str(port)]
    command += ["--workers", str(settings.workers), "--log-level", "warning"]
    seen: set[bytes] = set()

    def ready() -> bool:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5) as answer:
            seen.add(answer.read())
        return len(seen) == settings.workers

    with _running(command, model, {}, model / "uvicorn.log") as process:
        yield Server(port, process, _wait(ready, process, model / "uvicorn.log"))


def _torchserve_numbers(settings: Settings) -> dict[str, Any]:
    return {
        "minWorkers": settings.workers,
        "maxWorkers": settings.workers,
        "batchSize": settings.batch,
        "maxBatchDelay": settings.delay,
    }


@contextmanager
def _torchserve(folder: Path, archive_name: str, workers: int) -> Iterator[Server]:
    """TorchServe with one archive of `folder`/store."""
    port, metrics = free_ports(2)
    run = folder / "run"
    env = {
        "STACK_STATE": str(folder),
        "MODEL_STORE": str(folder / "store"),
        "TORCHSERVE_HOST": "127.0.0.1",
        "TORCHSERVE_PORT": str(port),
        "TORCHSERVE_METRICS_PORT": str(metrics),
        "TORCHSERVE_RUN_DIR": str(run),
        # Whatever the caller's environment has for a stack of its own.
        "TORCHSERVE_MANAGEMENT": "",
    }
    log = folder / "torchserve.log"
    with _running([str(ROOT / "torchserve" / "start_torchserve.sh")], folder, env, log) as process:
        client = TorchServe(f"http://127.0.0.1:{port}", f"unix:{run / 'management.sock'}")
        started: set[int] = set()

        def ready() -> bool:
            version = client.versions()[VERSION]
            started.update(version.starting)
            if len(started) > 2 * workers:
                raise ServerError(f"TorchServe's worker dies at its start; the end of the log:\n{_end(log)}")
            return version.ready == workers

        try:
            _wait(lambda: client.default() is None, process, log)
            began = time.monotonic()
            client.register(archive_name, workers)
            _wait(ready, process, log)
        finally:
            client.close()
        yield Server(port, process, time.monotonic() - began)


@contextmanager
def _running(command: list[str], cwd: Path, env: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a process group of its own, ended whole when the block ends, however it ends."""
    # Threads are set by each server's settings alone.
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "PYTHONPATH"))}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env=inherited | env,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    try:
        yield process
    except LoadError as error:
        raise ServerError(f"{error}\nThe end of the server's log:\n{_end(log)}") from error
    finally:
        for number, seconds in ((signal.SIGTERM, 5), (signal.SIGKILL, 20)):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(seconds)
        _wait_for_group(process.pid)


def _wait_for_group(group: int) -> None:
    """Until the last process of the killed group is gone: the next server must have the machine to itself."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)


def _wait(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> float:
    """Seconds until `ready`; connections that fail count as not yet. Raises ServerError with the log's end."""
    began = time.monotonic()
    while True:
        try:
            if ready():
                return time.monotonic() - began
        except (OSError, KeyError, TorchServeError, TorchServeUnavailable):
            pass
        if process.poll() is not None or time.monotonic() - began > START_SECONDS:
            state = "ended" if process.poll() is not None else f"is not ready after {START_SECONDS:.0f} s"
            raise ServerError(f"The server {state}; the end of its log:\n{_end(log)}")
        time.sleep(0.05)


def _end(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])
