"""containers/promoters.py: a promoter for each TorchServe of a machine."""

import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from mlflow_tracking.stack_settings import Settings
from tests.test_containers import script
from tests.waiting import eventually

# It writes what it got, and waits.
PROMOTER = """
import json, os, sys, time
from pathlib import Path
store = Path(os.environ["MODEL_STORE"])
(store / f"{os.getpid()}.json").write_text(json.dumps(dict(os.environ)))
time.sleep(600)
"""


class Machine:
    """A folder of numbers, a folder of stores, and TorchServes that are only sockets."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.module = script("promoters")
        self.module.COMMAND = (sys.executable, "-c", PROMOTER)
        self.folder, self.stores = folder / "replicas", folder / "stores"
        self.folder.mkdir()
        self.stores.mkdir()
        self.replicas: dict = {}
        self._stack = stack

    def add(self, number: int, host: str = "10.0.0.1") -> socket.socket:
        (self.folder / f"{number}.lock").touch()
        (self.folder / f"{number}.url").write_text(f"http://{host}:8080\n")
        server = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        (self.folder / f"{number}.sock").unlink(missing_ok=True)
        server.bind(str(self.folder / f"{number}.sock"))
        server.listen()
        return server

    def update(self) -> None:
        self.module.update(self.replicas, self.folder, self.stores)

    def started(self, number: int) -> list[dict[str, str]]:
        """The environments of the promoters that were started for a number, in any order."""
        return [json.loads(path.read_text()) for path in (self.stores / str(number)).glob("*.json")]

    def wait(self, number: int, count: int) -> None:
        eventually(lambda: len(self.started(number)) == count, 20)


@pytest.fixture
def machine(monkeypatch) -> Iterator[Machine]:
    monkeypatch.setenv("STACK_STATE", "/tmp/state")
    monkeypatch.setenv("PROMOTER_HOST", "0.0.0.0")
    with tempfile.TemporaryDirectory(prefix="pr-", dir="/tmp") as folder, ExitStack() as stack:
        machine = Machine(Path(folder), stack)
        yield machine
        for replica in machine.replicas.values():
            replica.stop()


def test_each_torchserve_gets_a_promoter(machine, monkeypatch):
    machine.update()
    assert (machine.stores / "1").is_dir(), "TorchServe waits for its store"
    machine.add(1)
    machine.add(2, "10.0.0.2")
    machine.update()
    for number in (1, 2):
        machine.wait(number, 1)
    [first], [second] = machine.started(1), machine.started(2)
    assert (first["PROMOTER_REPLICA"], first["PROMOTER_HOST"]) == ("1", "0.0.0.0")
    assert (second["PROMOTER_HOST"], second["PROMOTER_PORT"]) == ("127.0.0.1", "9002")
    assert second["MODEL_STORE"] == str(machine.stores / "2")
    for name, value in second.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert (settings.inference_url, settings.management) == ("http://10.0.0.2:8080", f"unix:{machine.folder}/2.sock")
    machine.update()
    assert len(machine.started(2)) == 1


@pytest.mark.parametrize("change", ["address", "death"])
def test_a_promoter_is_started_again(machine, change):
    machine.add(1)
    machine.update()
    machine.wait(1, 1)
    if change == "address":
        machine.add(1, "10.0.0.9")
    else:
        os.kill(machine.replicas[1].promoter.pid, 9)
        machine.replicas[1].promoter.wait()
    machine.update()
    machine.wait(1, 2)


def test_a_removed_torchserve_loses_its_promoter_except_the_first(machine, monkeypatch):
    servers = [machine.add(number) for number in (1, 2)]
    machine.update()
    for server in servers:
        server.close()
    machine.update()
    assert set(machine.replicas) == {1, 2}, "it may only restart"
    late = machine.module.time.monotonic() + machine.module.GONE_SECONDS + 1
    monkeypatch.setattr(machine.module.time, "monotonic", lambda: late)
    machine.update()
    assert set(machine.replicas) == {1}
    machine.add(2)
    machine.update()
    assert set(machine.replicas) == {1, 2}
