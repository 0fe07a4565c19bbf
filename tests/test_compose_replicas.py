"""`docker compose up --scale torchserve=3` with a real Docker Engine.

Each TorchServe has a promoter and a store. 16 clients send pictures, each on a connection that stays, while versions
change five times and a person rolls back, one TorchServe is killed and started again, and one is paused. No request
fails, no client gets an older version after a newer one, the gates judge a version once, and the monitor counts
every prediction once.
"""

import json
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.compose import PROJECT, Compose, copy_of_the_repository
from tests.picture_clients import PictureClients
from tests.waiting import eventually

pytestmark = [pytest.mark.containers, pytest.mark.timeout(1800)]
MOVES = ("2", "3", "1", "2", "3")
# The shipped bundle with another evidence, as a version of its own.
REGISTER = """
import dataclasses, shutil, subprocess, sys
from pathlib import Path
from handlers.bundle import Bundle, seal
for copy in ("2", "3"):
    folder = Path("/tmp", copy)
    shutil.copytree("model_store/skin_vit", folder)
    bundle = Bundle.read(folder)
    seal(folder, dataclasses.replace(bundle.config, evidence={**bundle.config.evidence, "copy": copy}))
    subprocess.run([sys.executable, "scripts/register_model.py", "--bundle", folder], check=True)
"""
STATUS = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8083/status').read().decode())"
SUMMARY = "import urllib.request; print(urllib.request.urlopen('http://127.0.0.1:8084/summary').read().decode())"


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Iterator[Compose]:
    assert subprocess.run(["docker", "info"], capture_output=True).returncode == 0, "A Docker Engine is needed."
    stack = Compose(copy_of_the_repository(tmp_path_factory.mktemp("clone")))
    stack("--profile", "*", "down", "--volumes", "--remove-orphans")  # of a run that was killed
    stack("build", timeout=1800)
    try:
        print(f"\nready in {stack.up():.0f} s")
        yield stack
    finally:
        stack("--profile", "*", "down", "--volumes", "--remove-orphans")


@pytest.fixture(scope="module")
def image(sample_images) -> bytes:
    return sample_images[0]


def replicas(stack: Compose) -> dict[str, str | None]:
    """The version of each replica, as the first promoter knows it."""
    return {replica["name"]: replica["version"] for replica in json.loads(stack.python("promoter", STATUS))["replicas"]}


def wait_for_all(stack: Compose, version: str, names: str = "123") -> float:
    began = time.monotonic()
    expected = dict.fromkeys(names, version)
    eventually(lambda: replicas(stack) == expected, 240, lambda: stack.python("promoter", STATUS))
    return time.monotonic() - began


def docker(command: str, replica: int) -> None:
    subprocess.run(["docker", command, f"{PROJECT}-torchserve-{replica}"], check=True, capture_output=True)


def move(stack: Compose, version: str) -> None:
    stack.registry("POST", "/registered-models/alias", name="skin_vit", alias="champion", version=version)


def predictions_counted(stack: Compose) -> int:
    total = json.loads(stack.python("monitor", SUMMARY))["total"]
    return total["predictions"] + total["refusals"] + total["errors"]


def full_load(stack: Compose, image: bytes) -> float:
    """Requests per second of 16 clients."""
    with PictureClients(stack.url("TORCHSERVE_PORT"), image) as clients:
        time.sleep(10)
        return clients.stop()


def test_no_request_fails_while_replicas_and_versions_change(stack, image):
    stack.wait_for(lambda: stack.version_served(image) == "1")
    stack("run", "--rm", "-T", "register", "python", "-c", REGISTER)
    rate_alone = full_load(stack, image)

    began = time.monotonic()
    stack("up", "--detach", "--scale", "torchserve=3", "--no-recreate")
    wait_for_all(stack, "1")
    print(f"\nthree replicas {time.monotonic() - began:.0f} s after --scale; one: {rate_alone:.1f} requests a second")
    print(f"three: {full_load(stack, image):.1f} requests a second on the same processor")

    # They pause, because the gate of latency needs answers, too.
    with PictureClients(stack.url("TORCHSERVE_PORT"), image, pause=0.5) as clients:
        for number, version in enumerate(MOVES):
            if number == 2:
                docker("kill", 1)
            if number == 4:
                docker("pause", 2)
            move(stack, version)
            if number == 2:
                stack.wait_for(lambda: stack.version_served(image) == "1")
                docker("start", 1)
            if number == 4:
                stack.wait_for(lambda wanted=version: list(replicas(stack).values()).count(wanted) == 2, 240)
                docker("unpause", 2)
            print(f"version {version} serves on all after {wait_for_all(stack, version):.1f} s")
        stack("exec", "-T", "promoter", "python", "scripts/promote.py", "rollback", "--reason", "a test")
        print(f"version 2 serves on all {wait_for_all(stack, '2'):.1f} s after the roll-back")
        time.sleep(3)
        rate = clients.stop()

    print(f"{clients.requests} requests, {rate:.1f} a second, the slowest {clients.slowest:.1f} s")
    assert set(clients.statuses) == {200}, clients.statuses
    expected = ["1", *MOVES, "2"]
    for versions in clients.versions:
        remaining = iter(expected)
        assert all(version in remaining for version in versions), f"{versions} is not in the order of {expected}"
        assert versions[-1] == "2"


def test_the_gates_judged_each_version_once(stack):
    logs = [
        json.loads(line[line.index("{") :]) for line in stack("logs", "promoter").stdout.splitlines() if "{" in line
    ]
    checks = [line for line in logs if line.get("action") == "check" and line["state"] == "done"]
    durations = {version: [line["seconds"] for line in checks if line["version"] == version] for version in ("2", "3")}
    print(f"\nseconds of the checks: {durations}")
    for version in ("2", "3"):
        report = stack.registry("GET", "/model-versions/get", name="skin_vit", version=version)["model_version"]
        tags = {tag["key"]: tag["value"] for tag in report["tags"]}
        assert tags["gates.outcome"] == "passed"
        remarks = {line["remark"] for line in checks if line["version"] == version}
        assert len(remarks) == 1, "all replicas have the same judgement, with its duration"


def test_the_monitor_counts_every_prediction_of_all_replicas_once(stack):
    def logged() -> int:
        command = "cat /var/log/predictions/*/predictions.jsonl* | wc -l"
        return int(stack("exec", "-T", "monitor", "sh", "-c", command).stdout)

    assert logged() > 200
    stack.wait_for(lambda: predictions_counted(stack) == logged())
