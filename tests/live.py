"""Helpers for tests with real servers: start scripts, the commands, variants of a bundle."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from handlers.bundle import CONFIG, GRAPH, Bundle, BundleConfig, seal
from handlers.files import write_json
from mlflow_tracking.promotion.reconcile import Pass, Reconciler, create_reconciler
from mlflow_tracking.registration import register
from mlflow_tracking.registry import Registry
from mlflow_tracking.stack_settings import Settings
from scripts import child_processes
from scripts.child_processes import free_ports
from tests.conftest import ROOT
from tests.picture_clients import PictureClients

START_SECONDS = 120  # two busy cores
NOWHERE = "http://127.0.0.1:9"
# No proxy, and no certificates, which take longer to read than the server takes to answer.
PLAIN: dict[str, Any] = {"trust_env": False, "verify": False}


@dataclass
class Server:
    """A start script in a process group of its own, so that nothing survives the test."""

    script: Path
    env: dict[str, str]
    log: Path
    health: str
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> "Server":
        self.process = child_processes.start([self.script], os.environ | self.env, self.log, cwd="/")
        end = time.monotonic() + START_SECONDS
        try:
            while not self.healthy():
                assert self.process.poll() is None, f"{self.script} ended:\n{self.text()}"
                assert time.monotonic() < end, f"{self.script} does not answer:\n{self.text()}"
                time.sleep(0.1)
        except BaseException:  # Ctrl-C too
            self.stop_group()
            raise
        return self

    def healthy(self) -> bool:
        try:
            return httpx.get(self.health, timeout=2, **PLAIN).is_success
        except httpx.HTTPError:
            return False

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop_group(self) -> None:
        """End what a killed server has left behind, and wait for it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End the server as its supervisor would, then whatever it left behind."""
        self.process.send_signal(number)
        try:
            self.process.wait(20)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(5)


def mlflow_server(folder: Path) -> Server:
    """MLflow as it starts by itself, on a free port, with all it keeps in `folder`."""
    [port] = free_ports(1)
    # Empty: whatever the caller's environment has, this server keeps to its folder.
    own = ("MLFLOW_BACKEND_STORE_URI", "MLFLOW_ARTIFACTS_DESTINATION", "MLFLOW_SERVER_ALLOWED_HOSTS")
    env = {"STACK_STATE": str(folder), "MLFLOW_PORT": str(port), **dict.fromkeys(own, "")}
    script = ROOT / "mlflow_tracking" / "mlflow_server.sh"
    return Server(script, env, folder / "mlflow.log", f"http://127.0.0.1:{port}/health")


def torchserve_server(folder: Path, store: Path, root: Path = ROOT, **env: str) -> Server:
    """TorchServe as the tree `root` starts it, on free ports; `folder` must have a short path."""
    port, metrics = free_ports(2)
    env |= {
        "STACK_STATE": str(folder),
        "MODEL_STORE": str(store),
        "TORCHSERVE_PORT": str(port),
        "TORCHSERVE_METRICS_PORT": str(metrics),
        "TORCHSERVE_RUN_DIR": str(folder / "run"),
        "OMP_NUM_THREADS": "1",
        "PROMOTER_GATES": "tests/gates.yaml",
    }
    script = root / "torchserve" / "start_torchserve.sh"
    return Server(script, env, folder / "torchserve.log", f"http://127.0.0.1:{port}/ping")


def run_script(name: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`python scripts/NAME ARGS`."""
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / name, *args],
        env=os.environ | {"COLUMNS": "200"} | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def variant(bundle: Bundle, folder: Path, golden_shift: float = 0.0, starts: bool = True) -> Bundle:
    """Another bundle of the same model, as a training run of its own would give.

    All its hashes are right, but with `golden_shift` its golden answers are wrong by that much, and without `starts`
    its graph cannot be loaded.
    """
    out = folder / uuid.uuid4().hex
    shutil.copytree(bundle.path, out)
    (out / CONFIG).unlink()
    if golden_shift:
        cases: list[dict[str, Any]] = [vars(case) for case in bundle.golden()]
        for case in cases:
            del case["image"]
            case["probabilities"] = {code: p + golden_shift for code, p in case["probabilities"].items()}
        write_json(out / "golden.json", cases)
    if not starts:
        (out / GRAPH).write_text("no graph")
    config: BundleConfig = replace(bundle.config, evidence={**bundle.config.evidence, "variant": out.name})
    return seal(out, config)


@dataclass
class Promotion:
    """One TorchServe, its store, and promoters for it."""

    folder: Path
    server: Server
    registry: Registry
    bundle: Bundle
    promoters: list[Reconciler] = field(default_factory=list)

    @classmethod
    @contextmanager
    def started(cls, folder: Path, registry: Registry, bundle: Bundle, **env: str) -> Iterator["Promotion"]:
        """A TorchServe in a new folder with a short path; all promoters end with it."""
        folder.mkdir(exist_ok=True)
        server = torchserve_server(folder, folder / "store", **env)
        server.env |= env
        promotion = cls(folder, server.start(), registry, bundle)
        try:
            yield promotion
            for promoter in promotion.promoters:
                promoter.close()
        finally:
            server.stop()

    @property
    def store(self) -> Path:
        return self.folder / "store"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.env['TORCHSERVE_PORT']}"

    @property
    def env(self) -> dict[str, str]:
        return {**self.server.env, "MLFLOW_TRACKING_URI": self.registry.uri, "TORCHSERVE_URL": self.url}

    def reconciler(self, registry_uri: str | None = None, **options: Any) -> Reconciler:
        """A new promoter, without any memory; `options` are settings."""
        names = ("MODEL_STORE", "STACK_STATE", "TORCHSERVE_RUN_DIR", "PROMOTER_GATES")
        settings = Settings(
            mlflow_tracking_uri=registry_uri or self.registry.uri,
            torchserve_url=self.url,
            **{name.lower(): self.server.env[name] for name in names},
            **options,
        )
        self.promoters.append(create_reconciler(settings))
        return self.promoters[-1]

    def settle(self, reconciler: Reconciler | None = None) -> tuple[list[str], Pass]:
        """Passes until nothing is left to be done or something stands in the way: the steps done, and the last pass."""
        reconciler, steps = reconciler or self.reconciler(), []
        while True:
            result = reconciler.reconcile(wait=60)
            steps += [str(step) for step in result.done]
            if not result.waiting and (result.settled or result.errors):
                return steps, result

    def register(self, folder: Path, golden_shift: float = 0.0) -> str:
        return register(self.registry, variant(self.bundle, folder, golden_shift).path).version.version

    def champion(self, version: str) -> tuple[list[str], Pass]:
        self.registry.set_alias("champion", version)
        return self.settle()

    def predict(self, path: str = "") -> httpx.Response:
        image = self.bundle.golden()[0].image
        return httpx.post(
            f"{self.url}/predictions/skin_vit{path}",
            content=image,
            headers={"Content-Type": "image/jpeg"},
            timeout=60,
            **PLAIN,
        )

    def clients(self, count: int = 4) -> PictureClients:
        """Clients that send requests while the block lasts, with pauses so that the tested programs get the cores."""
        return PictureClients(self.url, self.bundle.golden()[0].image, count, pause=0.02)

    def tell(self, path: str, image: bytes, **fields: str) -> httpx.Response:
        """A form with an image and further fields."""
        url = f"{self.url}/predictions/skin_vit{path}"
        return httpx.post(url, data=fields, files={"data": image}, timeout=60, **PLAIN)

    def served(self) -> str | None:
        """The version that answers."""
        answer = self.predict()
        return answer.json()["model"]["version"] if answer.is_success else None

    def tag(self, version: str, name: str) -> str | None:
        found = self.registry.version(version)
        assert found is not None
        return found.tags.get(f"serving.{name}")

    def kill(self) -> None:
        os.kill(self.server.process.pid, signal.SIGKILL)
        self.server.process.wait()
