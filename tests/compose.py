"""`docker compose` on a copy of the repository, with a project name and ports of its own, for tests/test_compose.py."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from scripts.child_processes import free_ports
from tests.conftest import ROOT
from tests.waiting import eventually

PORTS = ("STREAMLIT_PORT", "MLFLOW_PORT", "TORCHSERVE_PORT", "PROMETHEUS_PORT", "GRAFANA_PORT")
PROJECT = "skin-lesion-test"
REGISTRY = "/api/2.0/mlflow"
# Python that runs inside a container: prints which of {doors} (HOST:PORT) can be reached.
REACHED = """
import socket
from concurrent.futures import ThreadPoolExecutor

def reach(door):
    host, port = door.split(":")
    try:
        socket.create_connection((host, int(port)), 5).close()
        return door
    except OSError:
        return None

with ThreadPoolExecutor(16) as pool:  # a name that cannot be resolved takes its time
    print(*filter(None, pool.map(reach, {doors})))
"""
# What MLflow's user gets for other buckets, and a request without a signature for its own.
OTHER_BUCKETS = """
import boto3, botocore.exceptions
s3 = boto3.client("s3", endpoint_url="http://minio:9000")
s3.list_objects_v2(Bucket="mlflow")
for attempt in (lambda: s3.create_bucket(Bucket="other"), lambda: s3.put_bucket_policy(Bucket="mlflow", Policy="{}"),
                lambda: s3.delete_bucket(Bucket="mlflow")):
    try:
        attempt()
        print("allowed")
    except botocore.exceptions.ClientError as error:
        print(error.response["Error"]["Code"])
"""
UNSIGNED = """
import urllib.request, urllib.error
try:
    print(urllib.request.urlopen("http://minio:9000/mlflow", timeout=5).read())
except urllib.error.HTTPError as error:
    print(error.read().decode())
"""


def copy_of_the_repository(folder: Path) -> Path:
    """What a clone would hold: the files that git knows, and new ones that it does not ignore."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


@dataclass
class Compose:
    """A stack in containers."""

    folder: Path
    ports: dict[str, int] = field(default_factory=lambda: dict(zip(PORTS, free_ports(len(PORTS)), strict=True)))

    @property
    def env(self) -> dict[str, str]:
        own = {name: str(port) for name, port in self.ports.items()}
        return os.environ | own | {"COMPOSE_PROJECT_NAME": PROJECT, "IMAGE_TAG": "test", "COMPOSE_ANSI": "never"}

    def __call__(self, *args: str, timeout: float = 900, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`docker compose ARGS`."""
        done = subprocess.run(
            ["docker", "compose", "--progress=plain", *args],
            cwd=self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert not check or done.returncode == 0, f"docker compose {' '.join(args)}:\n{done.stdout}\n{done.stderr}"
        return done

    def up(self, *services: str) -> float:
        """Start, wait until all is healthy; seconds that it took."""
        began = time.monotonic()
        self("up", "--detach", "--wait", "--wait-timeout", "600", *services)
        return time.monotonic() - began

    def python(self, service: str, code: str) -> str:
        """What `python -c CODE` prints in a running service."""
        return self("exec", "-T", service, "python", "-c", code).stdout.strip()

    def containers(self) -> dict[str, dict[str, Any]]:
        """`docker inspect` of every container of the project, one-shots too, by service."""
        ids = self("ps", "--all", "--quiet").stdout.split()
        found = subprocess.run(["docker", "inspect", *ids], env=self.env, capture_output=True, text=True, check=True)
        return {one["Config"]["Labels"]["com.docker.compose.service"]: one for one in json.loads(found.stdout)}

    def url(self, port: str) -> str:
        return f"http://127.0.0.1:{self.ports[port]}"

    def predict(self, image: bytes, **fields: str) -> httpx.Response:
        """One picture to the published port."""
        return httpx.post(
            f"{self.url('TORCHSERVE_PORT')}/predictions/skin_vit",
            files={"data": ("lesion.jpg", image)},
            data=fields,
            timeout=90,
            trust_env=False,
        )

    def version_served(self, image: bytes) -> str:
        """The version that answers; raises httpx.HTTPError while none does."""
        return self.predict(image, gradcam="none").raise_for_status().json()["model"]["version"]

    def registry(self, method: str, path: str, **values: Any) -> dict[str, Any]:
        """One call of MLflow's REST interface."""
        given: dict[str, Any] = {"params": values} if method == "GET" else {"json": values}
        address = self.url("MLFLOW_PORT") + REGISTRY + path
        return httpx.request(method, address, timeout=30, trust_env=False, **given).raise_for_status().json()

    def wait_for(self, what: Callable[[], object], seconds: float = 120) -> float:
        """Wait until `what()` is true (tests.waiting.eventually); seconds that it took."""
        began = time.monotonic()
        eventually(what, seconds, lambda: self("ps", "--all").stdout)
        return time.monotonic() - began
