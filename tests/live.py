"""Helpers for tests with real servers: start scripts, the commands, variants of a bundle."""

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from handlers.bundle import CONFIG, GRAPH, Bundle, BundleConfig, seal, write_json
from tests.conftest import ROOT, free_ports

START_SECONDS = 120  # two busy cores


@dataclass
class Server:
    """A start script in a process group of its own, so that nothing survives the test."""

    script: Path
    env: dict[str, str]
    log: Path
    health: str
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> "Server":
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [self.script],
                cwd="/",
                env=os.environ | self.env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        end = time.monotonic() + START_SECONDS
        while not self.healthy():
            assert self.process.poll() is None, f"{self.script} ended:\n{self.text()}"
            assert time.monotonic() < end, f"{self.script} does not answer:\n{self.text()}"
            time.sleep(0.1)
        return self

    def healthy(self) -> bool:
        try:
            return httpx.get(self.health, timeout=2, trust_env=False).is_success
        except httpx.HTTPError:
            return False

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End the server as its supervisor would, then whatever it left behind."""
        self.process.send_signal(number)
        try:
            self.process.wait(20)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(5)


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
