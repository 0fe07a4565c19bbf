"""Death at every boundary of a step, with a real MLflow server and a real TorchServe.

Promotion goes from version 2 to version 3 while version 1 is the last good one, so that every kind of step is in the
plan. At one boundary the promoter, TorchServe or MLflow is killed with SIGKILL. Then:

- while TorchServe lives, a good version answers every request; after its death it answers from the store alone;
- no partial file is left, ledger and audit log can be read, and the log's chain is complete;
- another promoter finishes: version 3 serves.

`make test` runs one death of the promoter; `make test-all` runs them all.
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
from tests.live import Promotion
from tests.waiting import eventually

pytest_plugins = ["tests.fixtures_registry"]
pytestmark = [pytest.mark.live, pytest.mark.timeout(600)]

# A promoter that kills a process, perhaps itself, when one of its steps begins or is done.
PROMOTER = """
import os, signal, sys
from contextlib import suppress
from mlflow_tracking.promotion.reconcile import create_reconciler
from mlflow_tracking.stack_settings import Settings

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
def doomed(registry: Registry, first_registration, full_bundle: Bundle, short_folder: Path):
    """A TorchServe that may be killed, as may the MLflow server."""
    with Promotion.started(short_folder / "k", registry, full_bundle) as promotion:
        yield promotion


@pytest.fixture(scope="module")
def versions(doomed: Promotion, tmp_path_factory) -> list[str]:
    """Three good versions."""
    return [doomed.register(tmp_path_factory.mktemp("version")) for _ in range(3)]


def second_serves_and_third_is_new(promotion: Promotion, first: str, second: str, third: str) -> None:
    """The second version serves, the first is the last good one, and the store has nothing of the third."""
    for version in (first, second):
        promotion.champion(version)
    reconciler = promotion.reconciler()
    reconciler.forget(third)
    for archive in promotion.store.glob(f"skin_vit-{third}-*.mar"):
        ledgers.write(promotion.store, ledgers.read(promotion.store).pruned(archive.name))
        archive.unlink()
    actual = reconciler.reconcile(wait=60).actual
    assert (actual.serving.version, actual.last_good.version, set(actual.loaded)) == (second, first, {first, second})


@pytest.mark.parametrize(("victim", "action", "state"), CASES)
def test_killed_at_a_boundary(doomed, versions, mlflow, victim, action, state):
    promotion, (_, second, third) = doomed, versions
    second_serves_and_third_is_new(promotion, *versions)
    promotion.registry.set_alias("champion", third)
    process = {"promoter": 0, "torchserve": promotion.server.process.pid, "mlflow": mlflow.process.pid}[victim]
    with promotion.clients(1) as clients:
        done = subprocess.run(
            [sys.executable, "-c", PROMOTER, action, state, str(process)],
            cwd=ROOT, env=os.environ | promotion.env, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        assert done.stdout == "reached\n", done.stderr
        assert done.returncode == (-signal.SIGKILL if victim == "promoter" else 0), done.stderr
    if victim != "torchserve":
        clients.stop()
        assert set(clients.statuses) == {200}, clients.statuses
    else:
        promotion.server.stop_group()
        promotion.server.start()
        eventually(lambda: promotion.served() in (second, third))
    if victim == "mlflow":
        assert promotion.served() in (second, third)
        mlflow.stop_group()
        mlflow.start()

    left = [path.name for path in promotion.store.rglob("*.tmp")]
    assert not left or victim == "promoter", "only a dead promoter may leave one, hidden, for the next to remove"
    assert ledgers.read(promotion.store).release(ledgers.read(promotion.store).default).version in (second, third)
    _, result = promotion.settle()
    assert promotion.settle()[1].settled, result.errors
    assert promotion.served() == third
    assert not [path.name for path in promotion.store.rglob("*.tmp")]
    assert AuditLog(promotion.store).verify() == []
    assert promotion.tag(third, "status") == "serving"
