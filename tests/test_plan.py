"""The planner, against a model of TorchServe and the ledger.

For every actual and desired state:

- TorchServe accepts each step at its moment: it drops no default while other versions are loaded, holds one model under
  one number, and serves only what is loaded;
- while something answers, something answers after every step. Two exceptions: a new registry reuses the number of the
  version that answers, and the first release of all was refused;
- no release serves unchecked, and none that a person rolled back from becomes the last good one;
- the end is what the aliases ask for, and then nothing is left to do;
- after an interruption at any step a new plan leads to the same end;
- if any step fails, what served before serves.
"""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mlflow_tracking.promotion.plan import Action, Actual, Desired, Loaded, Release, Step, plan

RELEASES = [Release(version, f"sha256:{digest * 64}") for version in "1234" for digest in "ab"]
ONE, OTHER_ONE, TWO, _, THREE, *_ = RELEASES


@dataclass
class World:
    """A model of TorchServe, store and ledger."""

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
        sets = {name: set(getattr(actual, name)) for name in ("stored", "approved", "withdrawn")}
        values = vars(actual) | sets | {"loaded": dict(actual.loaded)}
        return cls(**values, registry_up=registry_up)

    def actual(self) -> Actual:
        values = {name: getattr(self, name) for name in Actual.__dataclass_fields__}
        return Actual(**{name: frozenset(v) if isinstance(v, set) else v for name, v in values.items()})

    def answers(self) -> bool:
        return self.default is not None and self.loaded[self.default].ready

    def only_refused(self, desired: Desired) -> bool:
        """Whether all loaded releases were refused, and none has passed or served."""
        proven = self.approved | {self.serving, self.last_good}
        return all(held.release in desired.blocked - proven for held in self.loaded.values())

    def apply(self, step: Step) -> None:
        release, held = step.release, self.loaded.get(step.release.version)
        match step.action:
            case Action.STORE:
                assert self.registry_up, "the registry is away"
                assert release not in self.stored, "the archive is in the store"
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
        """Plan and apply once; then nothing may be left to do."""
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
    last_good = last_good if serving and last_good != serving else None  # only a serving release has a predecessor
    withdrawn = draw(st.frozensets(RELEASE, max_size=2)) - {last_good}
    approved = draw(SUBSET) | ({serving} if serving else set())  # what serves was approved
    actual = Actual(loaded, default, draw(SUBSET), approved, serving, last_good, withdrawn)
    known = draw(st.booleans())
    blocked = draw(st.frozensets(RELEASE, max_size=2))
    return Desired(champion if known else None, challenger if known else None, known, blocked), actual


def number_is_taken(desired: Desired, actual: Actual) -> bool:
    """Whether a release needs the version number of another registry's model."""
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
def test_after_an_interruption_the_end_is_the_same(situation, cut):
    desired, actual = situation
    whole = World.of(actual, desired.registry_up)
    whole.reach(desired)
    world = World.of(actual, desired.registry_up)
    for step in plan(desired, actual)[:cut]:
        world.apply(step)
    world.reach(desired)
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
def test_without_the_registry_nothing_proven_is_retired(situation):
    _, actual = situation
    steps = plan(Desired(registry_up=False), actual)
    retired = {step.release for step in steps if step.action is Action.RETIRE}
    if not number_is_taken(Desired(), actual):
        assert not retired & (actual.approved | {actual.serving, actual.last_good})
    assert Action.STORE not in {step.action for step in steps}


SERVING_ONE = Actual({"1": Loaded(ONE, True)}, "1", frozenset({ONE}), frozenset({ONE}), ONE)


def held(*releases: Release) -> dict[str, Loaded]:
    return {release.version: Loaded(release, True) for release in releases}


BOTH = frozenset({ONE, TWO})
ONE_BEFORE_TWO = Actual(held(ONE, TWO), "2", BOTH, BOTH, serving=TWO, last_good=ONE)
TWO_BEFORE_ONE = Actual(held(ONE, TWO), "1", BOTH, BOTH, serving=ONE, last_good=TWO)
ONE_LOADED = Actual(held(ONE), "1", frozenset({ONE}))
CASES = {
    "the first champion": (Desired(ONE), Actual(), ["store 1", "load 1", "check 1", "serve 1"]),
    "a moved alias keeps the version before and retires the one before that": (
        Desired(THREE), ONE_BEFORE_TWO, ["store 3", "load 3", "check 3", "serve 3", "retire 1"]),
    "going back is one step": (Desired(ONE), ONE_BEFORE_TWO, ["serve 1"]),
    "TorchServe came back empty without the registry": (
        Desired(registry_up=False), replace(ONE_BEFORE_TWO, loaded={}, default=None), ["load 2", "load 1"]),
    "TorchServe came back empty while the alias moved": (
        Desired(TWO), Actual({}, None, frozenset({ONE}), frozenset({ONE}), serving=ONE),
        ["load 1", "store 2", "load 2", "check 2", "serve 2"]),
    "a damaged archive of the serving version is fetched again": (
        Desired(ONE), replace(SERVING_ONE, stored=frozenset()), ["store 1"]),
    "without the registry it is not": (Desired(registry_up=False), replace(SERVING_ONE, stored=frozenset()), []),
    "a refused champion changes nothing": (Desired(TWO, blocked=frozenset({TWO})), SERVING_ONE, []),
    "a challenger is loaded": (Desired(ONE, TWO), SERVING_ONE, ["store 2", "load 2", "check 2"]),
    "a challenger without a champion is not, or it would be the default": (Desired(None, TWO), Actual(), []),
    "a challenger that becomes champion is checked again": (
        Desired(TWO), replace(TWO_BEFORE_ONE, last_good=None), ["check 2", "serve 2"]),
    "a version that a person rolled back from is retired": (
        Desired(ONE), replace(ONE_BEFORE_TWO, withdrawn=frozenset({TWO})), ["serve 1", "retire 2"]),
    "a release that was refused as the first one does not stay": (
        Desired(ONE, blocked=frozenset({ONE})), ONE_LOADED, ["retire 1"]),
    "a release that has served stays and waits for its retry": (
        Desired(ONE, blocked=frozenset({ONE})), replace(SERVING_ONE, loaded={"1": Loaded(ONE, False)}), []),
    "a new registry counts from 1 again": (
        Desired(OTHER_ONE), SERVING_ONE, ["store 1", "retire 1", "load 1", "check 1", "serve 1"]),
    "then the other versions leave first, because TorchServe keeps the default": (
        Desired(OTHER_ONE), TWO_BEFORE_ONE,
        ["store 1", "retire 2", "retire 1", "load 1", "check 1", "serve 1"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_steps(case):
    desired, actual, steps = CASES[case]
    assert [str(step).replace("version ", "") for step in plan(desired, actual)] == steps


@pytest.mark.parametrize("release", [ONE, OTHER_ONE])
def test_an_archive_is_named_after_version_and_digest(release):
    assert release.archive == f"skin_vit-1-{release.digest[7:19]}.mar"
