"""The gates in the reconcile pass (tests/reconcile_world.py).

A release that the gates refuse never answers, not even as the first one. Another try costs nothing, with any promoter,
until a person overrules the gates, which every promoter respects. A check stops when its version loses the alias.
"""

import pytest

from mlflow_tracking.promotion import observe
from mlflow_tracking.promotion.gates.identity import RegistrationGate
from mlflow_tracking.promotion.reconcile import Reconciler
from tests.reconcile_world import Golden, Killed, World

pytest_plugins = ["tests.fixtures_reconcile"]
pytestmark = pytest.mark.usefixtures("no_sync")


def test_a_release_that_is_refused_as_the_first_does_not_stay(world):
    world.torchserve.shift = {"1": 0.002}
    promoter = world.promoter()
    result = world.deploy("1", promoter)
    assert (
        "golden parity: golden/MEL.jpg: a probability differs by 0.002; the tolerance in f32 is 0.001"
        in result.errors[0]
    )
    assert world.torchserve.loaded == {}
    assert world.status("1") == "refused"
    world.events.clear()
    assert promoter.reconcile().errors == result.errors
    assert world.events == []


def refuse_second(world: World) -> Reconciler:
    """The gates refuse version 2; return another promoter than the one that did it."""
    world.torchserve.shift = {"2": 0.5}
    world.deploy("2")
    world.events.clear()
    return world.promoter()


def test_a_refusal_costs_another_promoter_nothing(first):
    promoter = refuse_second(first)
    tags = first.registry.tags["2"]
    assert tags["gates.outcome"] == "refused"
    assert tags["gates.golden_parity"].startswith("failed: golden/MEL.jpg")
    assert first.registry.reports == [("1", {"report.json", "report.html"}), ("2", {"report.json", "report.html"})]
    (first.torchserve.store / first.release("2").archive).unlink()
    result = promoter.reconcile()
    assert first.events == [], "nothing is fetched or loaded"
    assert "golden parity: golden/MEL.jpg" in result.errors[0]
    assert promoter.backoff.setbacks[result.desired.champion].final
    assert len(first.registry.reports) == 2, "the report is not written again"


def test_a_promoter_that_died_before_it_unloaded_a_refused_version(first):
    first.torchserve.shift = {"2": 0.5}

    def dies(version):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first.torchserve, "unregister", dies)
        with pytest.raises(Killed):
            first.deploy("2")
    assert set(first.torchserve.loaded) == {"1", "2"}
    promoter = first.promoter()
    promoter.reconcile()
    assert set(first.torchserve.loaded) == {"1"}
    assert first.status("2") == "refused"
    assert "golden parity" in first.registry.tags["2"]["serving.reason"], "the reason stays"
    first.events.clear()
    assert "golden parity" in promoter.reconcile().errors[0]
    assert first.events == []


@pytest.fixture
def challenged(first) -> World:
    """Version 1 serves, and version 2 is the challenger."""
    first.registry.aliases["challenger"] = "2"
    first.promoter().reconcile()
    assert first.status("2") == "challenger"
    first.events.clear()
    return first


def test_a_challenger_is_checked_again_as_champion(challenged):
    del challenged.registry.aliases["challenger"]
    challenged.deploy("2")
    assert challenged.events == ["check version 2 done", "serve version 2 done"]


def test_a_challenger_that_fails_as_champion_is_unloaded(challenged):
    challenged.torchserve.shift = {"2": 0.5}
    challenged.promoter().forget("2")
    result = challenged.deploy("2")
    assert "golden parity" in result.errors[0]
    assert set(challenged.torchserve.loaded) == {"1"}
    assert {release.version for release in result.actual.approved} == {"1"}


def test_a_person_overrules_the_gates_and_every_promoter_respects_it(first):
    service = refuse_second(first)
    service.reconcile()  # it has read the refusal
    command = first.promoter(by="ann@lab", overruled={"2": "agreed"})
    assert command.reconcile().errors == ()
    assert first.served == "2"
    assert service.reconcile().settled
    assert first.served == "2"
    assert command.audit.newest("check", version="2")["remark"].startswith(
        "overruled by ann@lab (agreed): golden parity"
    )
    command.reconcile()
    tags = first.registry.tags["2"]
    assert (tags["gates.outcome"], tags["gates.forced"]) == ("forced", "ann@lab: agreed")
    for version in "32":
        first.deploy(version)
    assert first.served == "2", "a return to it needs no other decision"


def test_a_version_without_signature_cannot_be_forced(first):
    promoter = first.promoter((RegistrationGate(),), by="ann@lab", overruled={"2": "agreed"})
    assert "has no signature" in first.deploy("2", promoter).errors[0]
    assert first.served == "1"


def test_a_check_stops_when_its_version_loses_the_alias(first, monkeypatch):
    monkeypatch.setattr(observe, "RECHECK_SECONDS", 0.0)

    class Slow(Golden):
        def evaluate(self, candidate):
            candidate.progress("half way")
            first.registry.aliases["champion"] = "1"
            candidate.progress("nearly")
            pytest.fail("the check went on")

    promoter = first.promoter((Slow(),))
    result = first.deploy("2", promoter)
    assert result.waiting
    assert result.errors == ("The step 'check version 2' was stopped, because no alias points at version 2 any more.",)
    assert first.status("2") is None, "the version is not at fault"
    promoter.reconcile()
    assert set(first.torchserve.loaded) == {"1"}
    assert promoter.reconcile().settled


def test_without_mlflow_a_check_goes_on(first, monkeypatch):
    monkeypatch.setattr(observe, "RECHECK_SECONDS", 0.0)

    class Gone(Golden):
        def evaluate(self, candidate):
            first.registry.up = False
            candidate.progress("half way")
            return super().evaluate(candidate)

    first.deploy("2", first.promoter((Gone(),)))
    assert first.served == "2"
