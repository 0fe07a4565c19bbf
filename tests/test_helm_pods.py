"""The chart's pods, run by a Docker Engine with their variables, volumes, users and restrictions.

All pods start, and all their probes succeed. Two serving pods, each with its own promoter and store, follow one
registry: both serve a new version after its alias moved. No request fails meanwhile, nor while one pod is killed and
started again. The monitors of both pods count every prediction once. The page renders.
"""

import json
import os
import secrets
import subprocess
import time
from collections.abc import Iterator

import httpx
import pytest

from scripts.child_processes import free_ports
from tests.conftest import ROOT
from tests.helm_chart import render
from tests.picture_clients import PictureClients
from tests.rendered_pods import Pod, Release, clean, docker, network, process_status
from tests.waiting import eventually

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1800)]
SERVING = ("demo-serving-0", "demo-serving-1")
# A second version: the shipped bundle with another evidence.
SECOND = """
import dataclasses, shutil, subprocess, sys
from pathlib import Path
from handlers.bundle import Bundle, seal
shutil.copytree("model_store/skin_vit", "/tmp/second")
bundle = Bundle.read("/tmp/second")
seal(Path("/tmp/second"), dataclasses.replace(bundle.config, evidence={**bundle.config.evidence, "copy": "2"}))
sys.exit(subprocess.run([sys.executable, "scripts/register_model.py", "--bundle", "/tmp/second"]).returncode)
"""


class Cluster:
    """The running pods, and the predictions sent to them."""

    def __init__(self) -> None:
        minio = os.environ.get("MINIO_IMAGE")
        user = docker("run", "--rm", "--entrypoint=id", "docker.io/library/postgres:17-bookworm", "-u", "postgres")
        options = ["images.tag=helm-test", f"postgres.user={user}", *([f"store.image={minio}"] if minio else [])]
        values = {name: secrets.token_hex(10) for name in ("postgres", "mlflow", "monitor")}
        keys = ("access-key", "secret-key", "root-user", "root-password")
        self.release = Release(
            render(*(word for option in options for word in ("--set", option))),
            {
                "skin-lesion-postgres": {f"{name}-password": value for name, value in values.items()},
                "skin-lesion-store": {key: secrets.token_hex(10) for key in keys},
            },
        )
        self.ports = dict(zip((8080, 5001, 8501), free_ports(3), strict=True))
        self.pods: dict[str, Pod] = {}
        self.sent = 0

    def start(self, part: str, name: str = "", port: int | None = None) -> Pod:
        publish = {port: self.ports[port]} if port else {}
        pod = self.pods[name or part] = self.release.pod(part, name, publish).start()
        return pod

    def predict(self, client: httpx.Client, image: bytes) -> httpx.Response:
        self.sent += 1
        return client.post(f"http://127.0.0.1:{self.ports[8080]}/predictions/skin_vit", content=image)

    def move_alias(self, version: str) -> None:
        address = f"http://127.0.0.1:{self.ports[5001]}/api/2.0/mlflow/registered-models/alias"
        values = {"name": "skin_vit", "alias": "champion", "version": version}
        httpx.post(address, json=values, timeout=30, trust_env=False).raise_for_status()

    def state(self, name: str, port: int, path: str) -> dict:
        """Return what a part of a serving pod answers."""
        code = f"import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:{port}{path}').read().decode())"
        return json.loads(self.pods[name].execute("monitor", "python", "-c", code))

    def serves(self, version: str) -> bool:
        """Whether all replicas serve a version and have nothing left to do."""
        states = [self.state(name, 8083, "/status") for name in SERVING]
        return all(
            state["settled"] and state["actual"]["serving"] and state["actual"]["serving"]["version"] == version
            for state in states
        )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    assert subprocess.run(["docker", "info"], capture_output=True).returncode == 0, "A Docker Engine is needed."
    environment = os.environ | {"IMAGE_TAG": "helm-test", "COMPOSE_ANSI": "never"}
    build = ["docker", "compose", "build", "--quiet"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, env=environment, timeout=1700)
    clean()
    network()
    cluster = Cluster()
    try:
        for part in ("postgres", "minio"):
            cluster.start(part).ready()
        cluster.start("mlflow", port=5001)
        cluster.start("migrations")
        cluster.pods["mlflow"].ready()
        cluster.start("register")
        for name in SERVING:
            cluster.start("serving", name)
        cluster.start("proxy", port=8080)
        cluster.start("page", port=8501)
        for name in (*SERVING, "proxy", "page"):
            cluster.pods[name].ready()
        yield cluster
    finally:
        clean()


@pytest.fixture(scope="module")
def image(sample_images) -> bytes:
    return sample_images[0]


def test_both_replicas_serve_the_registered_model(cluster, image):
    eventually(lambda: cluster.serves("1"), 120, lambda: cluster.state(SERVING[0], 8083, "/status"))
    assert [cluster.state(name, 8083, "/status")["errors"] for name in SERVING] == [[], []]
    with httpx.Client(timeout=60, trust_env=False) as client:
        answer = cluster.predict(client, image).raise_for_status().json()
        assert answer["model"]["version"] == "1"
        assert client.get(f"http://127.0.0.1:{cluster.ports[8501]}/_stcore/script-health-check").text == "ok"


def test_the_restrictions_hold_inside(cluster):
    for pod in cluster.pods.values():
        for container in pod.spec["containers"]:
            if pod.name in ("migrations", "register"):
                continue
            status = process_status(pod, container["name"])
            for line in ("CapEff:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"):
                assert line in status, (container["name"], line)
            assert "Uid:\t0" not in status
            assert pod.execute(container["name"], "sh", "-c", "touch /app/x /etc/x || echo refused", check=False) == (
                "refused"
            )


def test_no_request_fails_while_versions_change_and_a_pod_is_killed(cluster, image):
    register = cluster.pods["register"].spec["containers"][0]
    spec = {**cluster.pods["register"].spec, "containers": [{**register, "command": ["python", "-c", SECOND]}]}
    second = Pod("second", spec, [], cluster.release.secrets).start()
    eventually(lambda: "version 2 is registered" in second.log("register"), 180, lambda: second.log("register"))

    with PictureClients(f"http://127.0.0.1:{cluster.ports[8080]}", image, count=4) as clients:
        for version in ("2", "1", "2"):
            cluster.move_alias(version)
            began = time.monotonic()
            eventually(
                lambda wanted=version: cluster.serves(wanted), 240, lambda: cluster.state(SERVING[1], 8083, "/status")
            )
            print(f"\nboth replicas serve version {version} {time.monotonic() - began:.1f} s after the alias moved")
        cluster.pods[SERVING[0]].kill()
        time.sleep(10)
        cluster.pods[SERVING[0]].start().ready()
        eventually(lambda: cluster.serves("2"), 120)
        rate = clients.stop()
    cluster.sent += clients.requests
    print(f"{clients.requests} requests, {rate:.1f} a second")
    assert set(clients.statuses) == {200}, clients.statuses
    assert clients.versions == [["1", "2", "1", "2"]] * 4, "no older version after a newer one"
    assert cluster.state(SERVING[0], 8083, "/status")["errors"] == []


def test_the_monitors_count_every_prediction_once(cluster):
    """Both read the log of their own pod and write to one database; a killed one goes on after its restart."""

    def counted(name: str) -> int:
        total = cluster.state(name, 8084, "/summary")["total"]
        return total["predictions"] + total["refusals"] + total["errors"]

    def logged() -> int:
        return sum(
            int(cluster.pods[name].execute("monitor", "sh", "-c", "cat /var/log/predictions/* | wc -l"))
            for name in SERVING
        )

    assert logged() >= cluster.sent > 50, "the gates ask, too"
    eventually(
        lambda: [counted(name) for name in SERVING] == [logged()] * 2, 60, lambda: (counted(SERVING[0]), logged())
    )
