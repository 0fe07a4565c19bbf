"""Fixtures shared by all tests: drawn images, and the whole stack running on ports and folders of its own.

`TEST_IMAGES=DIR make test` runs the same tests on real images instead of drawn ones.
"""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from scripts import child_processes
from scripts.child_processes import free_ports

ROOT = Path(__file__).parent.parent
PORTS = ["MLFLOW_PORT", "TORCHSERVE_PORT", "TORCHSERVE_METRICS_PORT", "PROMOTER_PORT", "STREAMLIT_PORT", "MONITOR_PORT"]
START_SECONDS = 540  # a first start takes one minute on two idle cores


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Quick tests first, those of servers after them, and last those that kill parts of the shared stack."""
    items.sort(key=lambda item: (bool(item.get_closest_marker("live")), item.path.name == "test_stack.py"))


@pytest.fixture(autouse=True, scope="module")
def own_environment() -> Iterator[None]:
    """What a test, or MLflow for it (`set_experiment`), leaves in the environment ends with the test's file.

    So does the program that Streamlit puts in the place of `__main__`: new processes would run it.
    """
    before, program = dict(os.environ), sys.modules["__main__"]
    yield
    sys.modules["__main__"] = program
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)
    if fluent := sys.modules.get("mlflow.tracking.fluent"):
        fluent._active_experiment_id = None


@pytest.fixture(scope="session")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database without any run, to be copied: MLflow takes seconds to make one."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow's own, of SQLAlchemy and Alembic
        import mlflow

        mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def mlflow_store(new_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The address of an MLflow store without any run, which the environment names."""
    uri = f"sqlite:///{shutil.copy(new_database, tmp_path / 'mlflow.db')}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


@pytest.fixture(scope="session")
def drawn_image() -> Callable[[str, int], bytes]:
    """`drawn_image(code, seed)`: the JPEG bytes of a drawn lesion of that class."""
    from training.data.synthetic import draw_lesion

    def draw(code: str = "NV", seed: int = 0) -> bytes:
        buffer = io.BytesIO()
        draw_lesion(seed, code).save(buffer, "JPEG", quality=92)
        return buffer.getvalue()

    return draw


@pytest.fixture(scope="session")
def sample_images(drawn_image) -> list[bytes]:
    """Eight images, as files' bytes: drawn, or the first of the folder that TEST_IMAGES names."""
    if folder := os.environ.get("TEST_IMAGES"):
        paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
        assert paths, f"TEST_IMAGES={folder} holds no .jpg or .png"
        step = max(1, len(paths) // 8)  # spread over the folder: its start may be one class
        return [path.read_bytes() for path in paths[::step][:8]]
    return [drawn_image(code, seed) for seed, code in enumerate(["MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC"])]


@dataclass
class Stack:
    """A stack of its own: `make up` with every port and folder changed."""

    folder: Path
    env: dict[str, str]
    process: subprocess.Popen | None = None
    started_in: float = 0.0

    def __post_init__(self) -> None:
        self.mlflow, self.torchserve, _, self.promoter, self.streamlit, self.monitor = (
            f"http://127.0.0.1:{self.env[name]}" for name in PORTS
        )

    @classmethod
    def create(cls, folder: Path) -> "Stack":
        own = {name: str(port) for name, port in zip(PORTS, free_ports(len(PORTS)), strict=True)}
        own |= {"STACK_STATE": str(folder / "state"), "MODEL_STORE": str(folder / "model_store")}
        stack = cls(folder, os.environ | own)
        # As the children of `make up` have them: a test can call the scripts and the packages with this environment.
        stack.env |= {
            "MLFLOW_TRACKING_URI": stack.mlflow,
            "TORCHSERVE_URL": stack.torchserve,
            "PROMOTER_URL": stack.promoter,
            "MONITOR_URL": stack.monitor,
            "MLFLOW_PUBLIC_URL": stack.mlflow,
            "TORCHSERVE_RUN_DIR": str(folder / "state" / "run"),
        }
        return stack

    @property
    def output(self) -> str:
        """All that `up` has printed."""
        return (self.folder / "up.log").read_text()

    def run(self, *args: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """`python ARGS` (a script of the repository) in this stack's environment."""
        command = [sys.executable, *args]
        return subprocess.run(command, cwd=ROOT, env=self.env, text=True, capture_output=True, timeout=timeout)

    def start(self) -> None:
        """`python scripts/stack.py up`; back when it says that a prediction was answered."""
        began = time.monotonic()
        log = self.folder / "up.log"
        log.unlink(missing_ok=True)
        self.process = child_processes.start([sys.executable, "scripts/stack.py", "up"], self.env, log, cwd=ROOT)
        while "is ready" not in self.output:
            assert self.process.poll() is None, f"the stack did not start:\n{self.output}"
            assert time.monotonic() - began < START_SECONDS, f"no start in {START_SECONDS} s:\n{self.output}"
            time.sleep(0.2)
        self.started_in = time.monotonic() - began

    def processes(self) -> dict[psutil.Process, str]:
        """Every process that carries this state folder in its environment or command, with the command."""
        found = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # it is gone, or nearly
                command = " ".join(process.cmdline())
                words = f"{command} {' '.join(process.environ().values())}"
                if re.search(rf"{re.escape(self.env['STACK_STATE'])}(?![\w.-])", words) and process.pid != os.getpid():
                    found[process] = command
        return found

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Stop as Ctrl-C does, and see that nothing is left."""
        assert self.process is not None
        self.process.send_signal(number)
        assert self.process.wait(60) == 0, self.output
        self.assert_gone()

    def assert_gone(self) -> None:
        left = self.processes()
        assert not left, f"left behind: {left}\n{self.output}"
        for name in PORTS:
            with socket.socket() as probe:
                assert probe.connect_ex(("127.0.0.1", int(self.env[name]))), f"{name} still answers"


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The whole real stack, started once for all tests that need it, and seen to leave nothing behind."""
    running = Stack.create(tmp_path_factory.mktemp("stack"))
    try:
        running.start()
        yield running
        if running.process is not None and running.process.poll() is None:
            running.stop()
    finally:
        for process in running.processes():  # only after a failure
            process.kill()
        if running.process is not None:
            running.process.wait()
