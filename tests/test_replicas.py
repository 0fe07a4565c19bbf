"""Several replicas, each a TorchServe with a promoter, on one registry.

- each has a store, an audit log and its own end of that log in the registry;
- they switch in the order of their names, also back; one that is gone or does not answer holds up no other;
- with a key in common, the gates judge once, and a refusal counts for all; a forged or foreign judgement for none;
- a replica that returns with an older version is not current, so the proxy leaves it out.
"""

import json
from dataclasses import replace

import pytest
from pydantic import TypeAdapter

from mlflow_tracking.promotion import rolling_update
from mlflow_tracking.promotion.reconcile import Reconciler
from mlflow_tracking.promotion.rolling_update import serving_counts
from mlflow_tracking.promotion.shared_judgements import SIGNATURE
from tests.reconcile_world import Golden, World

pytest_plugins = ["tests.fixtures_reconcile"]
KEY = b"the key of all promoters"
NAMES = ("1", "2", "10")


class Fleet:
    """Replicas with a world each and one registry; `asked` counts the questions to the gates."""

    def __init__(self, folder, clock: list[float], key: bytes = KEY, names: tuple[str, ...] = NAMES) -> None:
        self.asked: list[str] = []
        self.clock, self.key, fleet = clock, key, self

        class Counted(Golden):
            def evaluate(self, candidate):
                fleet.asked.append(candidate.release.version)
                return super().evaluate(candidate)

        self.gate = Counted()
        self.worlds = {name: World(folder / name) for name in names}
        self.registry = self.worlds[names[0]].registry
        self.promoters = {name: self.start(name) for name in names}

    def start(self, name: str) -> Reconciler:
        world = self.worlds[name]
        world.registry = self.registry
        shared = rolling_update.SharedReplicas(self.registry, name, f"http://{name}:8080")
        return world.promoter([self.gate], key=self.key, replicas=shared)

    def passes(self, count: int = 1, seconds: float = 1.0) -> list[list[str | None]]:
        """Run passes of all promoters, the last name first, so that each sees what was before."""
        history = []
        for _ in range(count):
            for name in reversed(self.promoters):
                self.promoters[name].reconcile()
            self.clock[0] += seconds
            history.append(self.served)
        return history

    def deploy(self, version: str, passes: int = 8) -> list[list[str | None]]:
        self.registry.aliases["champion"] = version
        return self.passes(passes)

    @property
    def served(self) -> list[str | None]:
        return [world.served for world in self.worlds.values()]


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(rolling_update.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def fleet(tmp_path, clock, no_sync) -> Fleet:
    fleet = Fleet(tmp_path, clock)
    assert fleet.deploy("1")[-1] == ["1"] * 3
    fleet.asked.clear()
    return fleet


def test_replicas_switch_in_order_and_ask_the_gates_once(fleet):
    for version, before in (("2", "1"), ("3", "2"), ("2", "3")):
        history = fleet.deploy(version)
        expected = [[version] * done + [before] * (3 - done) for done in range(4)]
        assert [served for served in expected if served in history or served == [before] * 3] == expected
        assert all(served in expected for served in history)
    assert fleet.asked == ["2", "3"], "the last good version needs no gates"
    checks = [world.events.count("check version 3 done") for world in fleet.worlds.values()]
    assert max(checks) <= 2, "a replica that waits does not check again and again"
    assert all(promoter.reconcile().settled for promoter in fleet.promoters.values())
    assert {f"audit.head.{name}" for name in NAMES} <= fleet.registry.notes.keys()


def test_a_replica_that_asks_the_gates_for_long_is_not_gone(fleet, monkeypatch):
    first, second = fleet.promoters["1"], fleet.promoters["2"]
    run = first.executor.check.run

    def long(release, progress, forced):
        for _ in range(int(2 * rolling_update.SILENT_SECONDS / 10)):
            fleet.clock[0] += 10
            progress("a gate")
            second.reconcile()
        return run(release, progress, forced)

    monkeypatch.setattr(first.executor.check, "run", long)
    fleet.registry.aliases["champion"] = "2"
    first.reconcile()
    assert fleet.asked == ["2"]
    assert fleet.served == ["2", "1", "1"]


def test_without_a_key_each_asks_for_itself_in_its_turn(tmp_path, clock, no_sync):
    fleet = Fleet(tmp_path, clock, key=b"")
    fleet.deploy("1")
    assert fleet.deploy("2")[-1] == ["2"] * 3
    assert fleet.asked == ["1"] * 3 + ["2"] * 3
    assert not any(SIGNATURE in tags for tags in fleet.registry.tags.values())
    reports = len(fleet.registry.reports)
    fleet.passes(3)
    assert len(fleet.registry.reports) == reports, "they do not replace each other's report in turn"


def forge(fleet: Fleet) -> None:
    """Claim in the registry that version 2 passed."""
    passed = json.loads(fleet.registry.report_files["1"])
    passed["version"], passed["question"]["bundle"] = "2", fleet.registry.tags["2"]["digest"]
    fleet.registry.report_files["2"] = json.dumps(passed).encode()
    fleet.registry.tags["2"][SIGNATURE] = fleet.registry.tags["1"][SIGNATURE]


@pytest.mark.parametrize("forged", [False, True])
def test_a_refusal_counts_for_all_and_a_forged_judgement_for_none(fleet, forged):
    for world in fleet.worlds.values():
        world.torchserve.shift["2"] = 0.3
    if forged:
        forge(fleet)
    assert fleet.deploy("2")[-1] == ["1"] * 3
    assert fleet.asked == ["2"]
    assert all(promoter.backoff.setbacks for promoter in fleet.promoters.values())


def test_a_new_replica_takes_the_judgement_on_what_serves(fleet):
    fleet.deploy("2")
    fleet.asked.clear()
    newcomer = World(fleet.worlds["1"].folder / "new")
    fleet.worlds["3"] = newcomer
    fleet.promoters["3"] = fleet.start("3")
    fleet.passes(4)
    assert newcomer.served == "2"
    assert fleet.asked == []


@pytest.mark.parametrize("gone", ["torchserve", "promoter"])
def test_a_replica_that_is_gone_holds_up_no_other(fleet, gone):
    if gone == "torchserve":
        fleet.worlds["1"].torchserve.up = False
    else:
        lost = fleet.promoters.pop("1")
    fleet.deploy("2", passes=5 + int(rolling_update.SILENT_SECONDS))
    assert fleet.served == ["1", "2", "2"]
    report = {replica["name"]: replica for replica in fleet.promoters["2"].replicas.report()}
    assert [report[name]["version"] for name in ("2", "10")] == ["2", "2"]
    assert "1" not in report or not report["1"]["current"]

    fleet.worlds["1"].torchserve.up = True
    if gone == "promoter":
        fleet.promoters["1"] = lost
    fleet.promoters["1"].replicas.read()
    fleet.passes(4)
    assert fleet.served == ["2"] * 3


def test_a_replica_that_returns_with_an_older_version_is_not_current(fleet):
    fleet.worlds["1"].torchserve.up = False
    fleet.deploy("2")
    watcher = fleet.promoters["2"].replicas
    state = rolling_update.state_of(fleet.promoters["2"].executor.observe(), "http://1:8080")
    older = replace(state, serving=fleet.worlds["1"].release("1"), beat=99)
    fleet.registry.notes["replica.1"] = TypeAdapter(rolling_update.PublishedReplica).dump_json(older).decode()
    watcher.read()
    assert [replica["current"] for replica in watcher.report()] == [False, True, True]
    assert serving_counts(watcher.report()) == {"1": 1, "2": 2}


def test_a_tag_that_cannot_be_read_is_no_replica(fleet):
    fleet.registry.notes["replica.0"] = '{"url": 7}'
    assert fleet.deploy("2")[-1] == ["2"] * 3
    assert [replica["name"] for replica in fleet.promoters["2"].replicas.report()] == list(NAMES)
