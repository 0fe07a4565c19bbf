"""The reconcile pass with stand-ins for MLflow and TorchServe, which fail at will; store and ledger are real.

- killed at any call to a server and started again, a promoter finishes; what served before serves until then;
- a failure is tried again at once, then ever more rarely; another alias counts at once;
- a server that is away is nobody's fault, and what could not be told to the registry is told later;
- what a gate refuses never answers, not even when it is the first; asked for again, by whichever promoter, it costs
  nothing, until a person overrules the gates, which every promoter keeps to;
- a check that nobody wants any more stops;
- the audit log tells every step, and every move of an alias that was seen, once;
- what a person rolled back from is no last good version; archives that nobody needs go, the youngest last.
"""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.bundle import WEIGHTS, Bundle
from mlflow_tracking.promotion import archive, backoff, execute, ledger, observe, workers
from mlflow_tracking.promotion.answers import AnswerBook
from mlflow_tracking.promotion.audit import AuditLog, Head
from mlflow_tracking.promotion.gates.base import Candidate
from mlflow_tracking.promotion.gates.identity import DigestAndSignature, GoldenParity
from mlflow_tracking.promotion.plan import Action, Release, Step
from mlflow_tracking.promotion.reconcile import Reconciler
from mlflow_tracking.promotion.rollback import plan_rollback, record_rollback
from mlflow_tracking.promotion.step_errors import NotYet, StepFailed
from tests.reconcile_world import Golden, Killed, World, full_disk


@pytest.fixture
def world(tmp_path) -> World:
    return World(tmp_path)


@pytest.fixture(autouse=True)
def no_sync(monkeypatch):
    """A crash of the machine is no subject here, and syncing takes most of the time."""
    monkeypatch.setattr("os.fsync", lambda descriptor: None)


@pytest.fixture
def clock(monkeypatch):
    """Time that moves when it is told to."""
    now = [1000.0]
    monkeypatch.setattr(backoff.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(workers, "REVIVE_SECONDS", 0.0)
    return now


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
def test_killed_at_any_call_it_finishes_when_started_again(tmp_path, after):
    number = 0
    while True:
        number += 1
        world = World(tmp_path / f"{number}")
        world.serve("1")
        world.serve("2")
        world.registry.aliases["champion"] = "3"
        world.doors.calls, world.doors.kill_at, world.doors.after = 0, number, after
        try:
            world.promoter().reconcile()
        except Killed:
            assert world.torchserve.default_version in "23"
            book = ledger.read(world.torchserve.store)
            assert book.release(book.default).version in "23", "a restart of TorchServe serves the one or the other"
        else:
            break
        world.doors.kill_at = float("inf")
        promoter = world.promoter()
        promoter.reconcile()
        assert promoter.reconcile().settled
        assert world.torchserve.default_version == "3"
        assert set(world.torchserve.loaded) == {"2", "3"}
        assert world.status("3") == "serving"
        assert promoter.audit.verify(Head.parse(world.registry.notes["audit.head"])) == []
        assert promoter.audit.newest("alias seen")["version"] == "3"
        assert promoter.audit.newest("serve")["version"] == "3"
        assert not [path for path in world.torchserve.store.rglob("*") if "tmp" in path.name]
    assert number > 15, "there were calls to be killed at"


def test_a_failure_is_tried_again_ever_more_rarely(world, clock):
    world.serve("1")
    world.torchserve.broken = {"2"}
    world.registry.aliases["champion"] = "2"
    promoter = world.promoter()
    tries = []
    for _ in range(200):
        world.events.clear()
        result = promoter.reconcile()
        if "load version 2 failed" in world.events:
            tries.append(clock[0] - 1000)
        assert "could not be loaded" in result.errors[0]
        assert set(world.torchserve.loaded) == {"1"}
        assert world.torchserve.default_version == "1"
        clock[0] += 2
    assert tries[:6] == [0, 2, 6, 14, 30, 62], "at once, then after 4, 8, 16, 32 s"
    assert world.status("2") == "failed"
    assert world.registry.fetched.count("2") == 1, "the archive is there"

    world.torchserve.broken = set()
    world.registry.aliases["champion"] = "3"
    promoter.reconcile()
    assert world.torchserve.default_version == "3", "another alias does not wait"
    world.registry.aliases["champion"] = "2"
    promoter.reconcile()
    assert world.torchserve.default_version == "2", "and setting it again is trying again"


def test_a_failure_may_last_for_weeks(world, clock):
    back = backoff.Backoff()
    for _ in range(5000):
        back.add(world.release("2"), "the worker died", final=False, approved=False)
    assert back.setbacks[world.release("2")].retry_at == clock[0] + 300


def test_a_champion_that_has_just_lost_its_worker_is_compared_with_all_the_same(world, monkeypatch):
    compared = []

    class Compares(Golden):
        def evaluate(self, candidate):
            compared.append(candidate.champion and candidate.champion.version)
            return super().evaluate(candidate)

    world.serve("1")
    promoter = world.promoter((Compares(),))
    real = world.torchserve.wait_ready
    monkeypatch.setattr(
        world.torchserve,
        "wait_ready",
        lambda *args: (real(*args), args[0] == "2" and world.torchserve.resting.add("1"))[0],
    )
    world.registry.aliases["champion"] = "2"
    promoter.reconcile()
    assert world.torchserve.default_version == "2"
    assert compared == ["1"], "or version 2 would pass as the very first one"


def test_a_champion_that_finds_no_place_beside_the_candidate_keeps_serving(world, monkeypatch):
    world.serve("1")
    promoter = world.promoter()
    real = world.torchserve.wait_ready

    def wait_ready(version, *args):
        if version == "2":
            world.torchserve.broken.add("1")
            world.torchserve.resting.add("1")
        return real(version, *args)

    monkeypatch.setattr(world.torchserve, "wait_ready", wait_ready)
    world.registry.aliases["champion"] = "2"
    [error] = promoter.reconcile().errors
    assert "The champion, version 1, lost its worker" in error
    assert set(world.torchserve.loaded) == {"1"}
    assert world.torchserve.default_version == "1"


def test_a_champion_whose_restart_failed_is_not_awaited(world, monkeypatch):
    monkeypatch.setattr(workers, "STARTUP_SECONDS", 0.0)
    world.serve("1")
    promoter = world.promoter()
    world.torchserve.broken.add("1")
    world.torchserve.resting.add("1")
    world.torchserve.scale = lambda *args, **options: None
    monkeypatch.setattr(workers.time, "monotonic", iter(range(0, 100_000, 1000)).__next__)
    for end in NotYet, NotYet, StepFailed:
        with pytest.raises(end):
            promoter.executor.run(Step(Action.REVIVE, world.release("1")))
    promoter.executor.run(Step(Action.STORE, world.release("2")))
    promoter.executor.run(Step(Action.LOAD, world.release("2")))
    promoter.executor.run(Step(Action.CHECK, world.release("2")))
    assert world.release("2") in promoter.executor.observe().approved


def test_what_is_refused_first_never_stays(world):
    world.torchserve.shift = {"1": 0.002}
    world.registry.aliases["champion"] = "1"
    promoter = world.promoter()
    result = promoter.reconcile()
    assert "golden parity: golden/MEL.jpg: a probability is off by 0.002; f32 may differ by 0.001" in result.errors[0]
    assert world.torchserve.loaded == {}
    assert world.status("1") == "refused"
    world.events.clear()
    assert promoter.reconcile().errors == result.errors
    assert world.events == []


@pytest.mark.parametrize(("precision", "shift", "passed"), [("f32", 9e-4, True), ("f32", 2e-3, False),
                                                            ("bf16", 9e-3, True), ("bf16", 2e-2, False),
                                                            ("f32", float("nan"), False)])  # fmt: skip
def test_the_tolerance_of_golden_answers(world, precision, shift, passed):
    world.torchserve.precision, world.torchserve.shift = precision, {"1": shift}
    release = Release("1", world.registry.tags["1"]["digest"])
    bundle = Bundle.load(world.registry.bundles["1"])
    candidate = Candidate(release, bundle, world.torchserve, AnswerBook(world.folder))
    assert Golden().evaluate(candidate).passed is passed
    assert not GoldenParity().evaluate(candidate).passed, "no golden images at all"


def test_a_changed_bundle_is_refused(world):
    world.serve("1")
    world.registry.aliases["champion"] = "2"
    (world.registry.bundles["2"] / WEIGHTS).write_bytes(b"forged")
    result = world.promoter().reconcile()
    assert "damaged" in result.errors[0]
    assert world.status("2") == "refused"
    assert (world.torchserve.default_version, world.status("1")) == ("1", "serving")


def test_a_full_disk_is_a_failure_with_its_reason(world, monkeypatch):
    world.serve("1")
    world.registry.aliases["champion"] = "2"

    with monkeypatch.context() as patch:
        patch.setattr(execute.archives, "build", full_disk)
        promoter = world.promoter()
        assert "No space left on device" in promoter.reconcile().errors[0]
    assert "No space left" in world.registry.tags["2"]["serving.reason"]
    promoter.reconcile()
    assert world.torchserve.default_version == "2"
    assert world.registry.tags["2"]["serving.reason"] == ""


def test_with_mlflow_away_it_keeps_serving_and_tells_later(world):
    world.serve("1")
    world.registry.aliases["champion"] = "2"
    promoter = world.promoter()
    world.torchserve.set_default = lambda version: (  # MLflow dies at the last step
        setattr(world.registry, "up", False), setattr(world.torchserve, "default_version", version)
    )  # fmt: skip
    result = promoter.reconcile()
    assert result.errors == ("MLflow is away.",)
    assert not result.registry_up
    assert world.torchserve.default_version == "2"
    assert promoter.reconcile().done == ()
    world.registry.up = True
    assert promoter.reconcile().settled
    assert (world.status("1"), world.status("2")) == ("standby", "serving")


def test_with_torchserve_away_nothing_is_blamed_on_a_version(world):
    world.serve("1")
    world.torchserve.up = False
    world.registry.aliases["champion"] = "2"
    promoter = world.promoter()
    result = promoter.reconcile()
    assert (result.errors, result.torchserve_up) == (("TorchServe is away.",), False)
    assert world.status("2") is None
    world.torchserve.up, world.torchserve.loaded, world.torchserve.default_version = True, {}, None
    promoter.reconcile()
    assert world.events[0] == "load version 1 done", "first what is at hand"
    assert world.torchserve.default_version == "2"


def test_a_registry_that_counts_from_one_again(world):
    world.serve("1")
    old = world.registry.tags["1"]["digest"]
    world.registry.bundles["1"], world.registry.tags["1"] = world.registry.bundles["3"], world.registry.tags["3"]
    world.serve("1")
    assert world.torchserve.loaded["1"] == Release("1", world.registry.tags["3"]["digest"]).archive
    assert old != world.registry.tags["1"]["digest"]
    assert world.status("1") == "serving", "the old model's retirement is not told of the new one"


def refuse_second(world: World) -> Reconciler:
    """Version 1 serves, version 2 was refused by its golden answers; another promoter than the one that did it."""
    world.serve("1")
    world.torchserve.shift = {"2": 0.5}
    world.registry.aliases["champion"] = "2"
    world.promoter().reconcile()
    world.events.clear()
    return world.promoter()


def test_what_was_refused_costs_another_promoter_nothing(world):
    promoter = refuse_second(world)
    assert world.registry.tags["2"]["gates.outcome"] == "refused"
    assert world.registry.tags["2"]["gates.golden_parity"].startswith("failed: golden/MEL.jpg")
    assert world.registry.reports == [("1", {"report.json", "report.html"}), ("2", {"report.json", "report.html"})]
    (world.torchserve.store / Release("2", world.registry.tags["2"]["digest"]).archive).unlink()
    result = promoter.reconcile()
    assert world.events == [], "nothing was fetched or loaded"
    assert "golden parity: golden/MEL.jpg" in result.errors[0]
    assert promoter.backoff.setbacks[result.desired.champion].final
    assert len(world.registry.reports) == 2, "and the report is not written again"


def test_a_promoter_that_died_before_it_took_a_refused_version_out(world):
    world.serve("1")
    world.torchserve.shift = {"2": 0.5}
    world.registry.aliases["champion"] = "2"

    def dies(version):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world.torchserve, "unregister", dies)
        with pytest.raises(Killed):
            world.promoter().reconcile()
    assert set(world.torchserve.loaded) == {"1", "2"}
    promoter = world.promoter()
    promoter.reconcile()
    assert set(world.torchserve.loaded) == {"1"}
    assert world.status("2") == "refused"
    assert "golden parity" in world.registry.tags["2"]["serving.reason"], "the reason stays"
    world.events.clear()
    assert "golden parity" in promoter.reconcile().errors[0]
    assert world.events == []


def test_a_challenger_is_not_refused_for_a_champion_it_was_not_compared_with(world):
    world.serve("1")
    world.registry.aliases["challenger"] = "2"
    world.promoter().reconcile()
    assert world.status("2") == "challenger"
    world.events.clear()
    world.registry.aliases = {"champion": "2"}
    world.promoter().reconcile()
    assert world.events == ["check version 2 done", "serve version 2 done"]


def test_a_challenger_that_fails_as_champion_is_taken_out(world):
    world.serve("1")
    world.registry.aliases["challenger"] = "2"
    world.promoter().reconcile()
    world.torchserve.shift = {"2": 0.5}
    world.promoter().forget("2")
    world.registry.aliases["champion"] = "2"
    result = world.promoter().reconcile()
    assert "golden parity" in result.errors[0]
    assert set(world.torchserve.loaded) == {"1"}
    assert {release.version for release in result.actual.approved} == {"1"}


def test_a_person_may_overrule_the_gates_and_every_promoter_keeps_to_it(world):
    service = refuse_second(world)
    service.reconcile()  # it knows the refusal
    hand = world.promoter(by="ann@lab", overruled={"2": "agreed"})
    assert hand.reconcile().errors == ()
    assert world.torchserve.default_version == "2"
    assert service.reconcile().settled
    assert world.torchserve.default_version == "2"
    row = hand.audit.newest("check", version="2")
    assert row["remark"].startswith("overruled by ann@lab (agreed): golden parity")
    hand.reconcile()
    assert world.registry.tags["2"]["gates.outcome"] == "forced"
    assert world.registry.tags["2"]["gates.forced"] == "ann@lab: agreed"

    for version in "3", "2":
        world.registry.aliases["champion"] = version
        world.promoter().reconcile()
    assert world.torchserve.default_version == "2", "going back to it needs no other word"


def test_nobody_overrules_what_is_not_what_was_registered(world):
    world.serve("1")
    promoter = world.promoter((DigestAndSignature(),), by="ann@lab", overruled={"2": "agreed"})
    world.registry.aliases["champion"] = "2"
    assert "has no signature" in promoter.reconcile().errors[0]
    assert world.torchserve.default_version == "1"


def test_a_version_that_is_not_asked_for_any_more_is_not_checked_to_the_end(world, monkeypatch):
    world.serve("1")
    world.registry.aliases["champion"] = "2"
    monkeypatch.setattr(observe, "RECHECK_SECONDS", 0.0)

    class Slow(Golden):
        def evaluate(self, candidate):
            candidate.progress("half way")
            world.registry.aliases["champion"] = "1"
            candidate.progress("nearly")
            pytest.fail("it went on")

    promoter = world.promoter((Slow(),))
    result = promoter.reconcile()
    assert result.waiting
    assert result.errors == ("The step 'check version 2' was stopped, because no alias points at version 2 any more.",)
    assert world.status("2") is None, "nobody is at fault"
    promoter.reconcile()
    assert set(world.torchserve.loaded) == {"1"}
    assert promoter.reconcile().settled


def test_with_mlflow_away_a_check_goes_on(world, monkeypatch):
    monkeypatch.setattr(observe, "RECHECK_SECONDS", 0.0)
    world.serve("1")
    world.registry.aliases["champion"] = "2"

    class Gone(Golden):
        def evaluate(self, candidate):
            world.registry.up = False
            candidate.progress("half way")
            return super().evaluate(candidate)

    world.promoter((Gone(),)).reconcile()
    assert world.torchserve.default_version == "2"


def test_rolled_back_from_is_nobodys_last_good_version(world):
    for version in "12":
        world.serve(version)
    promoter = world.promoter()
    ledger.write(promoter.store, world.ledger.rolled_back(world.release("2").archive))
    world.registry.aliases["champion"] = "1"
    promoter.reconcile()
    assert world.events == ["serve version 1 done", "retire version 2 done"]
    assert world.status("2") == "rolled back"
    book = ledger.read(world.torchserve.store)
    assert (book.release(book.default).version, book.last_good) == ("1", None)
    world.serve("3")
    world.serve("2")
    book = ledger.read(world.torchserve.store)
    assert book.withdrawn == (), "promoted again, it is as good as any"
    assert book.release(book.last_good).version == "3"


def test_asked_for_again_before_it_left_it_is_not_withdrawn(world):
    """A roll-back whose target cannot be loaded, given up by a person."""
    for version in "12":
        world.serve(version)
    promoter = world.promoter()
    world.registry.aliases["champion"] = "1"
    ledger.write(promoter.store, world.ledger.rolled_back(world.release("2").archive))
    world.registry.aliases["champion"] = "2"
    assert promoter.reconcile().settled
    assert ledger.read(world.torchserve.store).withdrawn == ()
    world.serve("3")
    book = ledger.read(world.torchserve.store)
    assert book.release(book.last_good).version == "2"


def test_a_roll_back_takes_back_what_came_to_serve_while_it_waited(world):
    """It plans before it has the lock, so that the promoter may stop what it does; until then that goes on."""
    for version in "12":
        world.serve(version)
    world.registry.aliases["champion"] = "3"
    hand = world.promoter()
    back = plan_rollback(world.registry, ledger.read(world.torchserve.store))
    assert (back.target.version, back.left) == ("2", None), "3 never served"
    world.serve("3")
    world.registry.aliases["champion"] = "2"
    record_rollback(back, hand.store, hand.audit, "ann@lab", "misses melanomas")
    hand.reconcile()
    assert world.torchserve.default_version == "2"
    assert world.status("3") == "rolled back"
    assert ledger.read(world.torchserve.store).last_good is None
    row = hand.audit.newest("rollback")
    assert (row["version"], row["previous"]) == ("2", "3")


def test_the_audit_log_tells_when_an_alias_moved(world):
    for version in "12":
        world.serve(version)
    del world.registry.aliases["champion"]
    promoter = world.promoter()
    promoter.reconcile()
    promoter.reconcile()
    seen = [(row["previous"], row["version"]) for row in promoter.audit.rows() if row["event"] == "alias seen"]
    assert seen == [("", "1"), ("1", "2"), ("2", "")], "each move once"
    serve = promoter.audit.newest("serve")
    assert (serve["version"], serve["previous"], serve["by"]) == ("2", "1", "promoter")
    assert world.registry.notes["audit.head"] == str(promoter.audit.head())


@pytest.mark.parametrize("end", [b"", b"hello\n", b'{"seq": 3}\n'])
def test_what_is_missing_in_the_audit_log_the_registry_remembers(world, end):
    world.serve("1")
    promoter = world.promoter()
    path, remembered = promoter.audit.path, world.registry.notes["audit.head"]
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]) + end)
    world.registry.aliases["champion"] = "2"
    for _ in range(2):
        [error] = promoter.reconcile().errors
        assert "is damaged" in error
    assert world.torchserve.default_version == "2", "promotion goes on"
    assert world.registry.notes["audit.head"] == remembered
    assert promoter.audit.verify(Head.parse(remembered))

    path.unlink()
    del world.registry.notes["audit.head"]
    assert promoter.reconcile().settled, "a new log was begun"
    assert world.registry.notes["audit.head"] == str(promoter.audit.head())


def test_a_line_on_what_serves_names_what_served_before(world):
    world.serve("1")
    (world.torchserve.store / ledger.LEDGER).write_text("{")
    world.registry.aliases["champion"] = "2"
    world.promoter().reconcile()
    rows = [row for row in world.promoter().audit.rows() if row["event"] == "serve"]
    assert [(row.get("previous"), row["version"]) for row in rows] == [(None, "1"), ("1", "2")]


def test_a_failure_is_written_down_once(world, clock):
    world.serve("1")
    world.torchserve.broken = {"2"}
    world.registry.aliases["champion"] = "2"
    promoter = world.promoter()
    for _ in range(50):
        promoter.reconcile()
        clock[0] += 2
    assert [row["event"] for row in promoter.audit.rows()].count("load failed") == 1


def test_archives_that_nobody_needs_are_pruned_but_for_the_youngest(world):
    for number in range(4, 9):
        world.add(str(number))
    world.registry.aliases["challenger"] = "3"
    for version in "12345678":
        world.serve(version)
    stored = {path.name.split("-")[1] for path in world.torchserve.store.glob("*.mar")}
    assert stored == {"8", "7", "3"} | {"4", "5", "6"}, "champion, last good, challenger, and three more"
    assert {entry.version for entry in ledger.read(world.torchserve.store).archives.values()} == stored
    assert [row["archive"].split("-")[1] for row in world.promoter().audit.rows() if row["event"] == "prune"] == [
        "1",
        "2",
    ]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_pruning_takes_nothing_that_is_needed(tmp_path_factory, data):
    names = [f"skin_vit-{number}-{'0123456789ab'}.mar" for number in range(8)]
    foreign = ["skin_vit-x.mar", "other.mar", "skin_vit-1-0123456789ab.mar.tmp"]
    needed = data.draw(st.sets(st.sampled_from(names)))
    keep = data.draw(st.integers(0, 4))
    store = tmp_path_factory.mktemp("store")
    for age, name in enumerate(data.draw(st.permutations(names + foreign))):
        (store / name).touch()
        os.utime(store / name, (age, age))
    gone = archive.surplus(store, needed, keep)
    assert not {path.name for path in gone} & (needed | set(foreign))
    kept = [path for path in store.iterdir() if path.name in set(names) - needed and path not in gone]
    assert len(kept) == min(keep, len(set(names) - needed))
    assert all(old.stat().st_mtime < young.stat().st_mtime for old in gone for young in kept), "the youngest stay"


def test_a_store_that_cannot_be_written_is_told_and_nothing_is_taken_away(world, monkeypatch):
    world.serve("1")
    world.registry.aliases["champion"] = "2"

    with monkeypatch.context() as patch:
        patch.setattr(AuditLog, "append", full_disk)
        result = world.promoter().reconcile()
    assert "cannot be kept" in result.errors[0]
    assert "No space left on device" in result.errors[0]
    assert world.torchserve.default_version == "1"
    world.promoter().reconcile()
    assert world.torchserve.default_version == "2"


def test_what_a_promoter_died_before_writing_down_is_written_by_the_next(world, monkeypatch):
    world.serve("1")
    world.registry.aliases["champion"] = "2"
    append = AuditLog.append

    def dies(self, event, by, **fields):
        if event == "serve":
            raise Killed
        append(self, event, by, **fields)

    with monkeypatch.context() as patch:
        patch.setattr(AuditLog, "append", dies)
        with pytest.raises(Killed):
            world.promoter().reconcile()
    assert world.torchserve.default_version == "2"
    promoter = world.promoter()
    for _ in range(2):
        promoter.reconcile()
    rows = [row for row in promoter.audit.rows() if row["event"] == "serve" and row["version"] == "2"]
    told = [(row["remark"], row["previous"]) for row in rows]
    assert told == [("noticed afterwards: a promoter has died", "1")], "once"
