"""The reconcile pass, with stand-ins for MLflow and TorchServe that fail on demand; store and ledger are real.

- a promoter that is killed at any call to a server finishes after its restart; what served before serves until then;
- a failed release is retried at once, then less and less often; a moved alias counts at once;
- a server that is away is no fault of a version, and the registry gets its statuses later;
- the audit log has every step and every move of an alias, once;
- a release that a person rolled back from does not become the last good one;
- archives that are not needed are pruned, except the youngest.
"""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.bundle import WEIGHTS, Bundle
from mlflow_tracking.promotion import backoff, model_archive, workers
from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion.answers import AnswerBook
from mlflow_tracking.promotion.audit import AuditLog, Head
from mlflow_tracking.promotion.gates.base import Candidate
from mlflow_tracking.promotion.gates.identity import GoldenParityGate
from mlflow_tracking.promotion.plan import Action, NotYet, Step, StepFailed
from mlflow_tracking.promotion.rollback import plan_rollback, record_rollback
from mlflow_tracking.torchserve_client import TorchServeError
from tests.reconcile_world import Golden, Killed, World, full_disk

pytest_plugins = ["tests.fixtures_reconcile"]
pytestmark = pytest.mark.usefixtures("no_sync")


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [1000.0]
    monkeypatch.setattr(backoff.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(workers, "REVIVE_SECONDS", 0.0)
    return now


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
def test_killed_at_any_call_a_promoter_finishes_after_its_restart(tmp_path, second, after):
    number = 0
    while True:
        number += 1
        world = second.copy(tmp_path / f"{number}")
        world.doors.calls, world.doors.kill_at, world.doors.after = 0, number, after
        try:
            world.deploy("3")
        except Killed:
            assert world.served in "23"
            assert world.ledger.release(world.ledger.default).version in "23", "TorchServe would restart with it"
        else:
            break
        world.doors.kill_at = float("inf")
        promoter = world.promoter()
        promoter.reconcile()
        assert promoter.reconcile().settled
        assert (world.served, set(world.torchserve.loaded), world.status("3")) == ("3", {"2", "3"}, "serving")
        assert promoter.audit.verify(Head.parse(world.registry.notes["audit.head"])) == []
        assert promoter.audit.newest("alias seen")["version"] == "3"
        assert promoter.audit.newest("serve")["version"] == "3"
        assert not [path for path in world.torchserve.store.rglob("*") if "tmp" in path.name]
    assert number > 15, "there were calls to be killed at"


def test_a_failure_is_retried_less_and_less_often(first, clock):
    world, promoter, tries = first, first.promoter(), []
    world.torchserve.broken = {"2"}
    for _ in range(200):
        world.events.clear()
        result = world.deploy("2", promoter)
        if "load version 2 failed" in world.events:
            tries.append(clock[0] - 1000)
        assert "could not be loaded" in result.errors[0]
        assert (set(world.torchserve.loaded), world.served) == ({"1"}, "1")
        clock[0] += 2
    assert tries[:6] == [0, 2, 6, 14, 30, 62], "at once, then after 4, 8, 16, 32 s"
    assert world.status("2") == "failed"
    assert world.registry.fetched.count("2") == 1, "the archive is in the store"
    assert [row["event"] for row in promoter.audit.rows()].count("load failed") == 1, "one record"

    world.torchserve.broken = set()
    for version in "32":  # another alias does not wait; moving the alias back is a new try
        world.deploy(version, promoter)
        assert world.served == version


def test_the_longest_wait_is_five_minutes(world, clock):
    back = backoff.Backoff()
    for _ in range(5000):
        back.add(world.release("2"), "the worker died", final=False, approved=False)
    assert back.setbacks[world.release("2")].retry_at == clock[0] + 300


def lose_worker_of_first(world: World, monkeypatch, for_good: bool) -> None:
    """Version 1 loses its worker while version 2 is loaded."""
    wait_ready = world.torchserve.wait_ready

    def lose(version, *args):
        ready = wait_ready(version, *args)
        if version == "2":
            world.torchserve.resting.add("1")
            world.torchserve.broken |= {"1"} if for_good else set()
        return ready

    monkeypatch.setattr(world.torchserve, "wait_ready", lose)


def test_a_candidate_is_compared_with_a_champion_that_lost_its_worker(first, monkeypatch):
    champions = []

    class Compares(Golden):
        def evaluate(self, candidate):
            champions.append(candidate.champion and candidate.champion.version)
            return super().evaluate(candidate)

    lose_worker_of_first(first, monkeypatch, for_good=False)
    first.deploy("2", first.promoter((Compares(),)))
    assert first.served == "2"
    assert champions == ["1"], "otherwise version 2 would pass as the first version"


def test_a_champion_without_memory_next_to_the_candidate_keeps_serving(first, monkeypatch):
    lose_worker_of_first(first, monkeypatch, for_good=True)
    [error] = first.deploy("2").errors
    assert "The champion, version 1, lost its worker" in error
    assert (set(first.torchserve.loaded), first.served) == ({"1"}, "1")


def test_a_champion_whose_restart_failed_is_not_awaited(first, monkeypatch):
    first.torchserve.broken.add("1")
    first.torchserve.resting.add("1")
    first.torchserve.scale = lambda *args, **options: None
    monkeypatch.setattr(workers.time, "monotonic", iter(range(0, 100_000, 1000)).__next__)
    executor = first.promoter().executor
    for end in NotYet, NotYet, StepFailed:
        with pytest.raises(end):
            executor.run(Step(Action.REVIVE, first.release("1")))
    for action in Action.STORE, Action.LOAD, Action.CHECK:
        executor.run(Step(action, first.release("2")))
    assert first.release("2") in executor.observe().approved


@pytest.mark.parametrize(("precision", "shift", "passed"), [("f32", 9e-4, True), ("f32", 2e-3, False),
                                                            ("bf16", 9e-3, True), ("bf16", 2e-2, False),
                                                            ("f32", float("nan"), False)])  # fmt: skip
def test_the_tolerance_of_golden_answers(world, precision, shift, passed):
    world.torchserve.precision, world.torchserve.shift = precision, {"1": shift}
    bundle = Bundle.load(world.registry.bundles["1"])
    candidate = Candidate(world.release("1"), bundle, world.torchserve, AnswerBook(world.folder))
    assert Golden().evaluate(candidate).passed is passed
    assert not GoldenParityGate().evaluate(candidate).passed, "the bundle has no golden images"


def test_a_changed_bundle_is_refused(first):
    (first.registry.bundles["2"] / WEIGHTS).write_bytes(b"forged")
    assert "damaged" in first.deploy("2").errors[0]
    assert (first.status("2"), first.served, first.status("1")) == ("refused", "1", "serving")


def test_a_full_disk_is_a_failure_with_its_reason(first, monkeypatch):
    promoter = first.promoter()
    with monkeypatch.context() as patch:
        patch.setattr(model_archive, "build", full_disk)
        assert "No space left on device" in first.deploy("2", promoter).errors[0]
    assert "No space left" in first.registry.tags["2"]["serving.reason"]
    promoter.reconcile()
    assert first.served == "2"
    assert first.registry.tags["2"]["serving.reason"] == ""


def test_without_mlflow_it_keeps_serving_and_reports_later(first):
    def set_default(version):
        first.registry.up, first.torchserve.default_version = False, version

    first.torchserve.set_default = set_default  # MLflow dies during the last step
    promoter = first.promoter()
    result = first.deploy("2", promoter)
    assert (result.errors, result.registry_up) == (("MLflow is away.",), False)
    assert first.served == "2"
    assert promoter.reconcile().done == ()
    first.registry.up = True
    assert promoter.reconcile().settled
    assert (first.status("1"), first.status("2")) == ("standby", "serving")


def test_without_torchserve_no_version_is_at_fault(first):
    first.torchserve.up = False
    promoter = first.promoter()
    result = first.deploy("2", promoter)
    assert (result.errors, result.torchserve_up) == (("TorchServe is away.",), False)
    assert first.status("2") is None
    first.torchserve.up, first.torchserve.loaded, first.torchserve.default_version = True, {}, None
    promoter.reconcile()
    assert first.events[0] == "load version 1 done", "first what is in the store"
    assert first.served == "2"


def test_a_registry_that_counts_from_one_again(first):
    old = first.release("1")
    first.registry.bundles["1"], first.registry.tags["1"] = first.registry.bundles["3"], first.registry.tags["3"]
    first.serve("1")
    assert first.torchserve.loaded["1"] == first.release("1").archive != old.archive
    assert first.status("1") == "serving", "the old model's retirement is not a status of the new one"


def withdraw(world: World, version: str) -> None:
    ledgers.write(world.torchserve.store, world.ledger.rolled_back(world.release(version).archive))


def test_a_withdrawn_release_is_not_the_last_good_one(second):
    withdraw(second, "2")
    second.deploy("1")
    assert second.events == ["serve version 1 done", "retire version 2 done"]
    assert second.status("2") == "rolled back"
    assert (second.ledger.release(second.ledger.default).version, second.ledger.last_good) == ("1", None)
    second.serve("3", "2")
    assert second.ledger.withdrawn == (), "once deployed again, it is like any other"
    assert second.ledger.release(second.ledger.last_good).version == "3"


def test_a_busy_torchserve_is_asked_again_to_unload(second, monkeypatch):
    monkeypatch.setattr("mlflow_tracking.torchserve_client.RETRY_WAITS", (0,))
    unregister, busy = second.torchserve.unregister, [TorchServeError(500, "Interrupted", transient=True)]

    def unload(version):
        if busy:
            raise busy.pop()
        unregister(version)

    monkeypatch.setattr(second.torchserve, "unregister", unload)
    withdraw(second, "2")
    second.deploy("1")
    assert second.events == ["serve version 1 done", "retire version 2 done"]


def test_a_cancelled_roll_back_does_not_withdraw(second):
    """The target of the roll-back cannot be loaded, and a person moves the alias back."""
    withdraw(second, "2")
    assert second.deploy("2").settled
    assert second.ledger.withdrawn == ()
    second.serve("3")
    assert second.ledger.release(second.ledger.last_good).version == "2"


def test_a_roll_back_also_withdraws_what_was_deployed_while_it_waited(second):
    """The roll-back is planned without the lock, so that a promoter may stop its step; until then it goes on."""
    second.registry.aliases["champion"] = "3"
    command = second.promoter()
    rollback = plan_rollback(second.registry, second.ledger)
    assert (rollback.target.version, rollback.left) == ("2", None), "version 3 has never served"
    second.serve("3")
    record_rollback(rollback, command.store, command.audit, "ann@lab", "misses melanomas")
    second.deploy("2", command)
    assert second.served == "2"
    assert second.status("3") == "rolled back"
    assert second.ledger.last_good is None
    row = command.audit.newest("rollback")
    assert (row["version"], row["previous"], row["reason"]) == ("2", "3", "misses melanomas")


def test_the_audit_log_has_each_move_of_an_alias_once(second):
    del second.registry.aliases["champion"]
    promoter = second.promoter()
    promoter.reconcile()
    promoter.reconcile()
    moves = [(row["previous"], row["version"]) for row in promoter.audit.rows() if row["event"] == "alias seen"]
    assert moves == [("", "1"), ("1", "2"), ("2", "")]
    serve = promoter.audit.newest("serve")
    assert (serve["version"], serve["previous"], serve["by"]) == ("2", "1", "promoter")
    assert second.registry.notes["audit.head"] == str(promoter.audit.head())


@pytest.mark.parametrize("end", [b"", b"hello\n", b'{"seq": 3}\n'])
def test_the_registry_remembers_the_end_of_the_audit_log(first, end):
    promoter = first.promoter()
    path, remembered = promoter.audit.path, first.registry.notes["audit.head"]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]) + end)
    for _ in range(2):
        [error] = first.deploy("2", promoter).errors
        assert "is damaged" in error
    assert first.served == "2", "promotion goes on"
    assert first.registry.notes["audit.head"] == remembered
    assert promoter.audit.verify(Head.parse(remembered))
    path.unlink()
    del first.registry.notes["audit.head"]
    assert promoter.reconcile().settled, "a new log begins"
    assert first.registry.notes["audit.head"] == str(promoter.audit.head())


def test_a_damaged_ledger_is_replaced_from_the_registry(first):
    store = first.torchserve.store
    (store / ledgers.LEDGER).write_text("{")
    result = first.deploy("2")
    assert "cannot be read" in result.errors[0]
    assert first.promoter().reconcile().settled
    assert (store / "ledger.json.damaged").read_text() == "{"
    assert (first.ledger.release(first.ledger.default), first.served) == (result.desired.champion, "2")
    rows = [row for row in first.promoter().audit.rows() if row["event"] == "serve"]
    assert [(row.get("previous"), row["version"]) for row in rows] == [(None, "1"), ("1", "2")]


def test_unneeded_archives_are_pruned_except_the_youngest(world):
    for number in range(4, 9):
        world.add(str(number))
    world.registry.aliases["challenger"] = "3"
    world.serve(*"12345678")
    stored = {path.name.split("-")[1] for path in world.torchserve.store.glob("*.mar")}
    assert stored == {"8", "7", "3"} | {"4", "5", "6"}, "champion, last good, challenger, and three more"
    assert {entry.version for entry in world.ledger.archives.values()} == stored
    rows = [row for row in world.promoter().audit.rows() if row["event"] == "prune"]
    assert [row["archive"].split("-")[1] for row in rows] == ["1", "2"]


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_pruning_keeps_what_is_needed(tmp_path_factory, data):
    names = [f"skin_vit-{number}-{'0123456789ab'}.mar" for number in range(8)]
    foreign = ["skin_vit-x.mar", "other.mar", "skin_vit-1-0123456789ab.mar.tmp"]
    needed = data.draw(st.sets(st.sampled_from(names)))
    keep = data.draw(st.integers(0, 4))
    store = tmp_path_factory.mktemp("store")
    for age, name in enumerate(data.draw(st.permutations(names + foreign))):
        (store / name).touch()
        os.utime(store / name, (age, age))
    surplus = model_archive.surplus(store, needed, keep)
    assert not {path.name for path in surplus} & (needed | set(foreign))
    kept = [path for path in store.iterdir() if path.name in set(names) - needed and path not in surplus]
    assert len(kept) == min(keep, len(set(names) - needed))
    assert all(old.stat().st_mtime < young.stat().st_mtime for old in surplus for young in kept), "the youngest stay"


def test_an_unwritable_store_is_reported_and_nothing_is_removed(first, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(AuditLog, "append", full_disk)
        [error] = first.deploy("2").errors
    assert "cannot be kept" in error
    assert "No space left on device" in error
    assert first.served == "1"
    first.promoter().reconcile()
    assert first.served == "2"


def test_the_next_promoter_records_what_a_dead_one_did(first, monkeypatch):
    append = AuditLog.append

    def dies(self, event, by, **fields):
        if event == "serve":
            raise Killed
        append(self, event, by, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(AuditLog, "append", dies)
        with pytest.raises(Killed):
            first.deploy("2")
    assert first.served == "2"
    promoter = first.promoter()
    for _ in range(2):
        promoter.reconcile()
    rows = [row for row in promoter.audit.rows() if row["event"] == "serve" and row["version"] == "2"]
    remarks = [(row["remark"], row["previous"]) for row in rows]
    assert remarks == [("noticed afterwards: a promoter has died", "1")], "once"
