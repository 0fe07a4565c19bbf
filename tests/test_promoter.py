"""The promoter's loop, the commands, and their requests to TorchServe, with stand-ins for both servers.

- no error in a pass ends the loop; /healthz reports a loop that hangs;
- a worker that died gets its startup time, then one restart, then it is a failure;
- a store has one promoter: a second one, or a second `make up`, says so before it starts anything. A killed promoter
  frees the store, and commands work next to a living one;
- a version is drained before it is unloaded: any answer means that all earlier requests went into a worker;
- predictions are retried after TorchServe's own transient errors, and never after a refusal of the handler;
- `promote.py watch` goes on and prints what is new; `replay.py` waits for the store.
"""

import threading
from dataclasses import replace

import httpx
import pytest

from handlers.errors import UsageError
from mlflow_tracking import torchserve_client
from mlflow_tracking.promotion import ledger, locks, service, workers
from mlflow_tracking.promotion.locks import StoreBusy
from mlflow_tracking.promotion.plan import Action, Actual, Desired, NotYet, Release, Step, StepFailed
from mlflow_tracking.promotion.reconcile import Pass
from mlflow_tracking.promotion.rollback import plan_rollback, record_rollback
from mlflow_tracking.stack_settings import Settings
from mlflow_tracking.torchserve_client import (
    RETRY_WAITS,
    ServedVersion,
    TorchServe,
    TorchServeError,
    with_retries,
)
from scripts import promote, replay
from scripts.child_processes import free_ports
from tests import http_stub
from tests.conftest import Stack
from tests.processes import running
from tests.reconcile_world import World

CALM = Pass(Desired(), Actual())


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


@pytest.fixture
def promoter(tmp_path) -> service.Promoter:
    settings = Settings(model_store=tmp_path, promoter_port=free_ports(1)[0], promoter_poll_seconds=0.01)
    return service.Promoter(settings)


def passes(outcomes, stop: threading.Event):
    """Return a `reconcile` that returns or raises these in turn, and stops the loop at the last."""
    waiting = list(outcomes)

    def reconcile(wait=0.0):
        outcome = waiting.pop(0)
        if not waiting:
            stop.set()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    return reconcile


def test_nothing_ends_the_loop(promoter, monkeypatch):
    stop, told = threading.Event(), []
    outcomes = [
        ValueError("a fault of ours"),
        StoreBusy("busy"),
        OSError(28, "full"),
        replace(CALM, errors=("x",)),
        CALM,
    ]
    monkeypatch.setattr(promoter.reconciler, "reconcile", passes(outcomes, stop))
    once = promoter.reconcile
    monkeypatch.setattr(promoter, "reconcile", lambda: (once(), told.append(promoter.status()["errors"])))
    promoter.run(stop)
    assert [len(errors) for errors in told] == [1, 1, 1, 1, 0]
    assert told[0] == told[1] == ["The promoter's pass failed: ValueError('a fault of ours')."], "busy says nothing new"
    assert promoter.status()["settled"]


def test_a_loop_that_is_silent_hangs(promoter, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(service.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(promoter.reconciler, "reconcile", lambda: CALM)
    promoter.reconcile()

    def healthz() -> tuple[int, str]:
        answer = httpx.get(f"http://127.0.0.1:{promoter.settings.promoter_port}/healthz", trust_env=False)
        return answer.status_code, answer.json()["status"]

    with http_stub.running(service.http_server(promoter)):
        now[0] += service.ALIVE_SECONDS - 1
        assert healthz() == (200, "ok")
        now[0] += 1
        assert healthz() == (503, "the loop hangs")
        assert promoter.status()["seconds_silent"] == service.ALIVE_SECONDS
        promoter.reconcile()
        assert healthz() == (200, "ok")


PROMOTER = """
import sys, time
from pathlib import Path
from mlflow_tracking.promotion.locks import owned
with owned(Path(sys.argv[1]), "the promoter of /first"):
    print("owned", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path):
    """A process that is the promoter of `tmp_path/model_store`."""
    with running(PROMOTER, tmp_path / "model_store", says="owned") as process:
        yield process


@pytest.mark.parametrize("command", [("-m", "mlflow_tracking.promotion.service"), ("scripts/stack.py", "up")])
def test_a_used_store_is_named(tmp_path, tmp_path_factory, owner, command):
    second = Stack.create(tmp_path)
    second.env["TORCHSERVE_RUN_DIR"] = str(tmp_path_factory.mktemp("run"))  # a short path
    done = second.run(*command)
    store = tmp_path / "model_store"
    assert done.returncode == 1
    [sentence] = (done.stdout + done.stderr).splitlines()
    assert sentence.startswith(f"The model store {store} is in use by the promoter of /first (pid {owner.pid} on ")
    assert sentence.endswith("). Stop that promoter, or set MODEL_STORE to another folder.")
    assert not list((tmp_path / "state" / "logs").glob("*")), "nothing was started"


def test_a_killed_promoter_leaves_the_store_free(tmp_path, owner):
    store = tmp_path / "model_store"
    with pytest.raises(StoreBusy, match="the promoter of /first"):
        locks.check_free(store)
    with locks.lock(store):
        pass  # promote.py takes turns with a living one
    owner.kill()
    owner.wait()
    locks.check_free(store)
    with locks.owned(store, "the promoter of /second"), pytest.raises(StoreBusy, match="the promoter of /second"):
        locks.check_free(store)


@pytest.fixture
def dead_worker(world, monkeypatch):
    """Version 1 serves without a worker: (executor, a clock, the calls of scale)."""
    world.serve("1")
    now, calls = [1000.0], []
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    world.torchserve.broken = {"1"}
    world.torchserve.versions = lambda: {"1": ServedVersion("1", world.torchserve.loaded["1"], 0, workers=1)}
    world.torchserve.scale = lambda version, workers, synchronous: calls.append((version, workers, synchronous))
    return world.promoter().executor, now, calls


def test_a_dead_worker_is_restarted_once(world, dead_worker):
    executor, now, calls = dead_worker
    release = Release("1", world.registry.tags["1"]["digest"])
    startup = world.ledger.archives[release.archive].settings["startupTimeout"]
    revive = Step(Action.REVIVE, release)
    for seconds in (0, startup - 1):
        now[0] = 1000.0 + seconds
        with pytest.raises(NotYet, match="no ready worker yet"):
            executor.run(revive)
    assert calls == [], "it may still be starting"
    now[0] = 1000.0 + startup
    with pytest.raises(NotYet, match="was restarted"):
        executor.run(revive)
    assert calls == [("1", 0, True), ("1", 1, False)], "to 0 first, because a dead worker counts"
    now[0] += startup - 1
    with pytest.raises(NotYet, match="no ready worker yet"):
        executor.run(revive)
    now[0] += 1
    with pytest.raises(StepFailed, match=f"no ready worker after {startup:g} s"):
        executor.run(revive)
    assert len(calls) == 2
    with pytest.raises(NotYet, match="no ready worker yet"):
        executor.run(revive)  # a retry gets the startup time again
    world.torchserve.broken = set()
    assert executor.run(revive) == "", "the worker came back"
    assert len(calls) == 2


def test_a_version_without_any_worker_is_restarted_at_once(world, dead_worker):
    executor, _, calls = dead_worker
    world.torchserve.versions = lambda: {"1": ServedVersion("1", world.torchserve.loaded["1"], 0, workers=0)}
    with pytest.raises(NotYet, match="was restarted"):
        executor.run(Step(Action.REVIVE, Release("1", world.registry.tags["1"]["digest"])))
    assert len(calls) == 2


def test_a_version_is_drained_before_it_is_unloaded(world, monkeypatch):
    for version in "12":
        world.serve(version)
    seen = []
    for name in ("set_default", "drain", "unregister"):
        effect = getattr(world.torchserve, name)
        monkeypatch.setattr(
            world.torchserve,
            name,
            lambda version, name=name, effect=effect: (seen.append((name, version)), effect(version)),
        )
    hand = world.promoter()
    back = plan_rollback(world.registry, ledger.read(world.torchserve.store))
    world.registry.aliases["champion"] = back.target.version
    record_rollback(back, hand.store, hand.audit, "ann@lab", "")
    hand.reconcile()
    assert seen == [("set_default", "1"), ("drain", "2"), ("unregister", "2")]


@pytest.fixture
def torchserve(monkeypatch):
    """The client over a stand-in for the network: (client, log of predictions and sleeps, readiness, response)."""
    log, ready, answer = [], [True], [httpx.Response(400, json={"message": "no image"})]

    def network(request: httpx.Request) -> httpx.Response:
        if request.method == "GET":
            workers = [{"status": "READY", "pid": 1}] if ready[0] else []
            return httpx.Response(200, json=[{"modelVersion": "2", "modelUrl": "2.mar", "workers": workers}])
        log.append(request.url.path)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    client = TorchServe("http://inference", "http://management")
    client._management = httpx.Client(transport=httpx.MockTransport(network), base_url="http://management")
    client._inference = httpx.Client(transport=httpx.MockTransport(network), base_url="http://inference")
    monkeypatch.setattr(torchserve_client.time, "sleep", log.append)
    return client, log, ready, answer


def test_draining_waits_for_an_answer_and_then_a_little(torchserve):
    client, log, ready, answer = torchserve
    client.drain("2")
    assert log == ["/predictions/skin_vit/2", 2.0], "a refusal is an answer"
    log.clear()
    client.drain("7")
    ready[0] = False
    client.drain("2")
    assert log == [], "no wait for a version without a worker"
    ready[0], answer[0] = True, httpx.ReadTimeout("nothing came")
    client.drain("2")
    assert log == ["/predictions/skin_vit/2"], "no more waiting after a minute without an answer"


@pytest.mark.parametrize(
    ("response", "tries"),
    [
        (httpx.Response(503, json={"code": 503, "type": "ServiceUnavailableException", "message": "busy"}), 3),
        (httpx.Response(500, json={"error": {"code": "internal_error", "message": "The model failed."}}), 1),
        (httpx.Response(413, content=b""), 1),
        (httpx.Response(200, json={"other": "service"}), 1),
    ],
    ids=["TorchServe is busy", "the handler failed", "too large", "no prediction"],
)
def test_only_transient_errors_are_retried(torchserve, response, tries):
    client, log, _, answer = torchserve
    answer[0] = response
    with pytest.raises(TorchServeError):
        with_retries(lambda: client.predict(b"image", "2"))
    assert log.count("/predictions/skin_vit/2") == tries
    assert [entry for entry in log if not isinstance(entry, str)] == list(RETRY_WAITS)[: tries - 1]


def test_watch_goes_on_and_prints_what_is_new(world, monkeypatch, capsys):
    world.registry.aliases["champion"] = "1"
    reconciler = world.promoter()
    monkeypatch.setattr(promote, "create_reconciler", lambda *_: reconciler)
    monkeypatch.setenv("MODEL_STORE", str(world.torchserve.store))
    turns = []

    def turn(seconds):
        turns.append(seconds)
        if len(turns) == 2:
            world.registry.aliases["champion"] = "2"
        if len(turns) == 4:
            world.torchserve.up = False
        if len(turns) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(promote.time, "sleep", turn)
    with pytest.raises(KeyboardInterrupt):
        promote.watch()
    shown = capsys.readouterr()
    assert shown.out.splitlines() == ["Version 1 serves.", "Version 2 serves."]
    assert shown.err.splitlines() == ["TorchServe is away."], "once"


def test_a_replay_waits_for_the_store(world, monkeypatch):
    release = Release("1", "sha256:" + "1" * 64)
    monkeypatch.setenv("MODEL_STORE", str(world.torchserve.store))
    monkeypatch.setattr(replay, "Registry", lambda uri: world.registry)
    monkeypatch.setattr(replay, "loaded_pair", lambda registry, observer: (release, release))
    monkeypatch.setattr(replay, "LOCK_SECONDS", 0.0)
    with locks.lock(world.torchserve.store), pytest.raises(StoreBusy):
        replay.replay(samples=[], as_json=True)
    with pytest.raises(UsageError, match="There are no pictures"):
        replay.replay(samples=[], as_json=True)
