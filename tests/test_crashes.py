"""Death at every boundary of a step, with a real MLflow server and a real TorchServe.

Promotion goes from version 2 to version 3 while version 1 is the last good one, so that every kind of step is in the
plan. At one boundary the promoter, TorchServe or MLflow is killed with SIGKILL. Then:

- while TorchServe lives, a good version answers every request; after its death it answers from the store alone;
- no partial file is left, ledger and audit log can be read, and the log's chain is complete;
- another promoter finishes: version 3 serves.

`make test` runs a death of the promoter and one of MLflow; `make test-all` runs them all.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from handlers.bundle import Bundle
from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion.audit import AuditLog
from mlflow_tracking.registry import Registry
from tests.conftest import ROOT
from tests.live import Promotion, clients, mlflow_server, torchserve_server
from tests.waiting import eventually

pytest_plugins = ["tests.fixtures_registry"]
pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]

# A promoter that kills a process, perhaps itself, when one of its steps begins or is done.
PROMOTER = """
import os, signal, sys
from contextlib import suppress
from mlflow_tracking.promotion.reconcile import create_reconciler
from mlflow_tracking.settings import Settings

action, state, victim = sys.argv[1], sys.argv[2], int(sys.argv[3])

def tell(event):
    if (event.step.action, event.state) == (action, state):
        print("reached", flush=True)
        with suppress(ProcessLookupError):
            os.kill(victim or os.getpid(), signal.SIGKILL)

promoter = create_reconciler(Settings(), tell)
for _ in range(6):
    promoter.reconcile(wait=60)
"""
ACTIONS = ("store", "load", "check", "serve", "retire")
QUICK = {("promoter", "serve", "begun")}  # TorchServe and MLflow die in tests/test_promotion.py and test_stack.py too
CASES = [
    pytest.param(
        victim, action, state, marks=[] if (victim, action, state) in QUICK else [pytest.mark.slow],
        id=f"{victim}, {action} {state}",
    )
    for victim in ("promoter", "torchserve", "mlflow")
    for action in ACTIONS
    for state in ("begun", "done")
]  # fmt: skip


@pytest.fixture(scope="module")
def doomed(quiet_mlflow: None, full_bundle: Bundle, short_folder: Path, tmp_path_factory):
    """An MLflow server and a TorchServe that may be killed; three good versions are registered."""
    folder = short_folder / "k"
    (folder / "mlflow").mkdir(parents=True)
    mlflow = mlflow_server(folder / "mlflow").start()
    server = torchserve_server(folder, folder / "store").start()
    try:
        promotion = Promotion(folder, server, Registry(mlflow.health.removesuffix("/health")), full_bundle)
        for _ in range(3):
            promotion.register(tmp_path_factory.mktemp("version"))
        yield promotion, mlflow
        for promoter in promotion.promoters:
            promoter.close()
    finally:
        server.stop()
        mlflow.stop()


def second_serves_and_third_is_new(promotion: Promotion) -> None:
    """Version 2 serves, 1 is the last good one, and the store has nothing of 3."""
    for version in "12":
        promotion.champion(version)
    reconciler = promotion.reconciler()
    reconciler.forget("3")
    for archive in promotion.store.glob("skin_vit-3-*.mar"):
        ledgers.write(promotion.store, ledgers.read(promotion.store).pruned(archive.name))
        archive.unlink()
    actual = reconciler.reconcile(wait=60).actual
    assert (actual.serving.version, actual.last_good.version, set(actual.loaded)) == ("2", "1", {"1", "2"})


@pytest.mark.parametrize(("victim", "action", "state"), CASES)
def test_killed_at_a_boundary(doomed, victim, action, state):
    promotion, mlflow = doomed
    second_serves_and_third_is_new(promotion)
    promotion.registry.set_alias("champion", "3")
    process = {"promoter": 0, "torchserve": promotion.server.process.pid, "mlflow": mlflow.process.pid}[victim]
    with clients(promotion, 1) as [responses]:
        done = subprocess.run(
            [sys.executable, "-c", PROMOTER, action, state, str(process)],
            cwd=ROOT, env=os.environ | promotion.env, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.stdout == "reached\n", done.stderr
        assert done.returncode == (-signal.SIGKILL if victim == "promoter" else 0), done.stderr
    if victim != "torchserve":
        assert {status for status, _ in responses} == {200}, responses
    else:
        promotion.server.stop_group()
        promotion.server.start()
        eventually(lambda: promotion.served() in ("2", "3"))
    if victim == "mlflow":
        assert promotion.served() in ("2", "3")
        mlflow.stop_group()
        mlflow.start()

    left = [path.name for path in promotion.store.rglob("*.tmp")]
    assert not left or victim == "promoter", "only a dead promoter may leave one, hidden, for the next to remove"
    assert ledgers.read(promotion.store).release(ledgers.read(promotion.store).default).version in "23"
    _, result = promotion.settle()
    assert promotion.settle()[1].settled, result.errors
    assert promotion.served() == "3"
    assert not [path.name for path in promotion.store.rglob("*.tmp")]
    assert AuditLog(promotion.store).verify() == []
    assert promotion.tag("3", "status") == "serving"
