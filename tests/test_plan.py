"""The promotion planner, against a model of TorchServe and the ledger.

Whatever is loaded, stored, remembered, asked for or refused:

- every step is one that TorchServe accepts at that moment (it drops no default that has company, holds one model under
  one number, serves only what is loaded);
- while something answers, something keeps answering after every step; the exceptions are a new registry that gives a
  number a second time, to the very version that is alone in answering, and what was refused as the first of all;
- nothing serves that was not checked, and nothing that a person took back counts as the last good version;
- the end is what the aliases ask for, and then nothing is left to be done;
- cut off after any step, planning again leads to the same end;
- when any step fails, what served before serves, or serves again.
"""

from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlflow_tracking.promotion.plan import Action, Actual, Desired, Loaded, Release, Step, plan

RELEASES = [Release(version, f"sha256:{digest * 64}") for version in "1234" for digest in "ab"]
ONE, OTHER_ONE, TWO, _, THREE, *_ = RELEASES


@dataclass
class World:
    """TorchServe, store and ledger, as far as they are known to behave."""

    loaded: dict[str, Loaded]
    default: str | None
    stored: set[Release]
    approved: set[Release]
    serving: Release | None
    last_good: Release | None
    withdrawn: set[Release] = field(default_factory=set)
    registry_up: bool = True
    history: list[Step] = field(default_factory=list)

    @classmethod
    def of(cls, actual: Actual, registry_up: bool = True) -> "World":
        return cls(
            dict(actual.loaded),
            actual.default,
            set(actual.stored),
            set(actual.approved),
            actual.serving,
            actual.last_good,
            set(actual.withdrawn),
            registry_up,
        )

    def actual(self) -> Actual:
        return Actual(
            dict(self.loaded),
            self.default,
            frozenset(self.stored),
            frozenset(self.approved),
            self.serving,
            self.last_good,
            frozenset(self.withdrawn),
        )

    def answers(self) -> bool:
        return self.default is not None and self.loaded[self.default].ready

    def only_refused(self, desired: Desired) -> bool:
        """Whether what answers was refused as the first of all: nothing before it, and nothing that passed."""
        proven = self.approved | {self.serving, self.last_good}
        return all(held.release in desired.blocked - proven for held in self.loaded.values())

    def apply(self, step: Step) -> None:
        release, held = step.release, self.loaded.get(step.release.version)
        match step.action:
            case Action.STORE:
                assert self.registry_up, "nothing can be fetched"
                assert release not in self.stored, "fetched for nothing"
                self.stored.add(release)
            case Action.LOAD:
                assert release in self.stored
                assert held is None, "TorchServe: 409, this version is registered"
                self.default = self.default or release.version
                self.loaded[release.version] = Loaded(release, ready=True)
            case Action.REVIVE:
                assert held is not None
                assert held.release == release
                assert not held.ready
                self.loaded[release.version] = Loaded(release, ready=True)
            case Action.CHECK:
                assert held == Loaded(release, ready=True)
                self.approved.add(release)
            case Action.SERVE:
                assert held == Loaded(release, ready=True)
                assert release in self.approved | {self.serving, self.last_good}, "never checked"
                if self.serving != release:
                    self.withdrawn.discard(release)
                    kept = None if self.last_good == release else self.last_good
                    self.last_good = kept if self.serving in self.withdrawn else self.serving
                    self.serving = release
                self.default = release.version
                self.approved.add(release)
            case Action.RETIRE:
                assert held is not None
                assert held.release == release
                assert self.default != release.version or len(self.loaded) == 1, "TorchServe: 403, the default"
                del self.loaded[release.version]
                self.approved.discard(release)
                self.default = self.default if self.loaded else None
        self.history.append(step)

    def reach(self, desired: Desired) -> None:
        """Plan and apply until nothing is left to be done; one round must be enough."""
        for step in plan(desired, self.actual()):
            self.apply(step)
        assert plan(desired, self.actual()) == ()


RELEASE = st.sampled_from(RELEASES)
# For each version number: not loaded, or one of its two releases with or without a ready worker.
HELD = st.integers(0, 4)
SUBSET = st.integers(0, 2 ** len(RELEASES) - 1).map(
    lambda mask: frozenset(release for bit, release in enumerate(RELEASES) if mask >> bit & 1)
)


@st.composite
def situations(draw):
    held = draw(st.tuples(HELD, HELD, HELD, HELD))
    loaded = {
        str(number): Loaded(RELEASES[2 * (number - 1) + (state - 1) // 2], ready=bool(state % 2))
        for number, state in enumerate(held, 1)
        if state
    }
    serving, last_good, champion, challenger = draw(st.tuples(*[st.none() | RELEASE] * 4))
    default = sorted(loaded)[draw(st.integers(0, 3)) % len(loaded)] if loaded else None
    last_good = last_good if serving and last_good != serving else None  # nothing served before nothing
    withdrawn = draw(st.frozensets(RELEASE, max_size=2)) - {last_good}
    approved = draw(SUBSET) | ({serving} if serving else set())  # what serves was approved
    actual = Actual(loaded, default, draw(SUBSET), approved, serving, last_good, withdrawn)
    known = draw(st.booleans())
    blocked = draw(st.frozensets(RELEASE, max_size=2))
    return Desired(champion if known else None, challenger if known else None, known, blocked), actual


def number_is_taken(desired: Desired, actual: Actual) -> bool:
    """Whether a version number is in use by another registry's model than the one that is to come."""
    coming = [desired.champion, desired.challenger, actual.serving, actual.last_good]
    return any(r and r.version in actual.loaded and actual.loaded[r.version].release != r for r in coming)


@settings(max_examples=500, deadline=None)
@given(situations())
@example((Desired(ONE), Actual()))
@example((Desired(TWO), Actual({"1": Loaded(ONE, True)}, "1", frozenset({ONE}), frozenset({ONE}), ONE)))
@example((Desired(OTHER_ONE), Actual({"1": Loaded(ONE, True)}, "1", frozenset({ONE}), frozenset({ONE}), ONE)))
def test_every_plan_is_legal_and_reaches_its_end(situation):
    desired, actual = situation
    world = World.of(actual, desired.registry_up)
    answered = world.answers() and not world.only_refused(desired)
    for step in plan(desired, actual):
        world.apply(step)
        if answered and not number_is_taken(desired, actual):
            assert world.answers(), f"a gap after {step}"
    assert plan(desired, world.actual()) == ()

    assert world.last_good is None or world.last_good not in world.withdrawn
    champion = desired.unblocked(desired.champion)
    if champion:
        assert world.serving == champion
        assert world.default == champion.version
        assert world.loaded[champion.version] == Loaded(champion, ready=True)
        assert champion in world.stored
        challenger = desired.unblocked(desired.challenger)
        if challenger and challenger.version != champion.version:
            assert world.loaded[challenger.version] == Loaded(challenger, ready=True)
        belong = {champion, challenger, world.last_good}
        assert {held.release for held in world.loaded.values()} <= belong
        moved = actual.serving and actual.serving != champion and not number_is_taken(desired, actual)
        if moved and actual.serving not in actual.withdrawn:
            assert world.last_good is not None


@settings(max_examples=200, deadline=None)
@given(situations(), st.integers(0, 12))
def test_cut_off_after_any_step_it_comes_to_the_same_end(situation, cut):
    desired, actual = situation
    whole = World.of(actual, desired.registry_up)
    whole.reach(desired)
    world = World.of(actual, desired.registry_up)
    for step in plan(desired, actual)[:cut]:
        world.apply(step)
    world.reach(desired)
    if number_is_taken(desired, actual) and not desired.unblocked(desired.champion):
        # Nobody says what shall serve, so the stand-in of a moment may stay.
        assert world.answers() == whole.answers()
        return
    assert (world.serving, world.default) == (whole.serving, whole.default)


@settings(max_examples=200, deadline=None)
@given(situations(), st.integers(0, 12))
def test_when_a_step_fails_what_served_before_serves(situation, failing):
    desired, actual = situation
    before = desired.unblocked(actual.serving)
    at_hand = before and (before in actual.stored or Loaded(before, True) in actual.loaded.values())
    world = World.of(actual, desired.registry_up)
    steps = plan(desired, actual)
    if failing >= len(steps) or not at_hand or number_is_taken(desired, actual):
        return
    for step in steps[:failing]:
        world.apply(step)
    failed = steps[failing].release
    if failed == before:
        return
    blocked = Desired(desired.champion, desired.challenger, desired.registry_up, desired.blocked | {failed})
    world.reach(blocked)
    assert world.answers()
    if failed == desired.champion:
        assert world.default == before.version


@settings(max_examples=200, deadline=None)
@given(situations())
def test_with_the_registry_away_nothing_proven_is_taken_away(situation):
    _, actual = situation
    steps = plan(Desired(registry_up=False), actual)
    retired = {step.release for step in steps if step.action is Action.RETIRE}
    if not number_is_taken(Desired(), actual):
        assert not retired & (actual.approved | {actual.serving, actual.last_good})
    assert Action.STORE not in {step.action for step in steps}


def steps(desired: Desired, actual: Actual) -> list[str]:
    return [str(step) for step in plan(desired, actual)]


SERVING_ONE = Actual({"1": Loaded(ONE, True)}, "1", frozenset({ONE}), frozenset({ONE}), ONE)


def test_the_first_champion():
    expected = ["store version 1", "load version 1", "check version 1", "serve version 1"]
    assert steps(Desired(ONE), Actual()) == expected


def test_a_moved_alias_keeps_the_version_before_and_retires_the_one_before_that():
    loaded = {"1": Loaded(ONE, True), "2": Loaded(TWO, True)}
    actual = Actual(loaded, "2", frozenset({ONE, TWO}), frozenset({ONE, TWO}), serving=TWO, last_good=ONE)
    assert steps(Desired(THREE), actual) == [
        "store version 3",
        "load version 3",
        "check version 3",
        "serve version 3",
        "retire version 1",
    ]
    assert steps(Desired(ONE), actual) == ["serve version 1"], "going back is one step"


def test_torchserve_came_back_empty_with_the_registry_away():
    empty = Actual({}, None, frozenset({ONE, TWO}), frozenset({ONE, TWO}), serving=TWO, last_good=ONE)
    assert steps(Desired(registry_up=False), empty) == ["load version 2", "load version 1"]


def test_torchserve_came_back_empty_while_the_alias_moved():
    empty = Actual({}, None, frozenset({ONE}), frozenset({ONE}), serving=ONE)
    first, *rest = steps(Desired(TWO), empty)
    assert first == "load version 1", "what is at hand answers while the new one is fetched"
    assert rest[-1] == "serve version 2"


def test_a_damaged_archive_of_what_serves_is_fetched_again():
    actual = Actual({"1": Loaded(ONE, True)}, "1", frozenset(), frozenset({ONE}), ONE)
    assert steps(Desired(ONE), actual) == ["store version 1"]
    assert steps(Desired(registry_up=False), actual) == []


def test_a_refused_champion_changes_nothing():
    assert steps(Desired(TWO, blocked=frozenset({TWO})), SERVING_ONE) == []


def test_a_challenger_stands_by_and_never_answers_alone():
    assert steps(Desired(ONE, TWO), SERVING_ONE) == ["store version 2", "load version 2", "check version 2"]
    assert steps(Desired(None, TWO), Actual()) == [], "TorchServe would make the first version the default"


def test_a_challenger_is_checked_anew_when_it_becomes_champion():
    loaded = {"1": Loaded(ONE, True), "2": Loaded(TWO, True)}
    actual = Actual(loaded, "1", frozenset({ONE, TWO}), frozenset({ONE, TWO}), serving=ONE)
    assert steps(Desired(TWO), actual) == ["check version 2", "serve version 2"], (
        "it was compared with another champion"
    )


def test_what_was_rolled_back_from_is_retired():
    loaded = {"1": Loaded(ONE, True), "2": Loaded(TWO, True)}
    both = frozenset({ONE, TWO})
    actual = Actual(loaded, "2", both, both, serving=TWO, last_good=ONE, withdrawn=frozenset({TWO}))
    assert steps(Desired(ONE), actual) == ["serve version 1", "retire version 2"]


def test_what_was_refused_as_the_first_of_all_does_not_stay():
    actual = Actual({"1": Loaded(ONE, True)}, "1", frozenset({ONE}))
    assert steps(Desired(ONE, blocked=frozenset({ONE})), actual) == ["retire version 1"]
    served = Actual({"1": Loaded(ONE, False)}, "1", frozenset({ONE}), frozenset({ONE}), ONE)
    assert steps(Desired(ONE, blocked=frozenset({ONE})), served) == [], "what has served only waits for another try"


def test_a_new_registry_counts_from_one_again():
    assert steps(Desired(OTHER_ONE), SERVING_ONE) == [
        "store version 1",
        "retire version 1",
        "load version 1",
        "check version 1",
        "serve version 1",
    ]
    loaded = {"1": Loaded(ONE, True), "2": Loaded(TWO, True)}
    two = Actual(loaded, "1", frozenset({ONE, TWO}), frozenset({ONE, TWO}), serving=ONE, last_good=TWO)
    assert steps(Desired(OTHER_ONE), two)[1:3] == ["serve version 2", "retire version 1"], "no gap if it can be helped"


@pytest.mark.parametrize("release", [ONE, OTHER_ONE])
def test_an_archive_is_named_after_version_and_digest(release):
    assert release.archive == f"skin_vit-1-{release.digest[7:19]}.mar"
