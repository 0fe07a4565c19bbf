"""What is wanted and what is there in, the steps from one to the other out. Pure: no clock, no network, no file.

A plan never takes away what answers before something proven answers in its place, and it may be cut off after any
step: planning again from what is then there leads to the same end.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from mlflow_tracking.digests import short
from mlflow_tracking.settings import MODEL_NAME


@dataclass(frozen=True, order=True)
class Release:
    """One bundle under one version number of the registry.

    Both are needed: a new registry counts from 1 again, and its version 1 is another model than the old one's.
    """

    version: str
    digest: str

    @property
    def archive(self) -> str:
        """The name of its archive in the model store."""
        return f"{MODEL_NAME}-{self.version}-{short(self.digest)}.mar"


class Action(StrEnum):
    """What a step does with its release."""

    STORE = "store"  # fetch the bundle, verify it, put the archive into the model store
    LOAD = "load"  # register the archive in TorchServe and wait for a ready worker
    REVIVE = "revive"  # it is loaded, but no worker is ready
    CHECK = "check"  # hold its answers against the gates
    SERVE = "serve"  # make it the one that answers /predictions/skin_vit
    RETIRE = "retire"  # drain it and take it out of TorchServe


@dataclass(frozen=True)
class Step:
    """One idempotent step."""

    action: Action
    release: Release

    def __str__(self) -> str:
        return f"{self.action} version {self.release.version}"


@dataclass(frozen=True)
class Desired:
    """What the registry's aliases ask for.

    `known` is False when the registry is out of reach: then nothing is asked for, and nothing proven is taken away.
    `blocked` are releases that were refused, or failed and wait for another try.
    """

    champion: Release | None = None
    challenger: Release | None = None
    known: bool = True
    blocked: frozenset[Release] = frozenset()

    def wanted(self, release: Release | None) -> Release | None:
        """The release, unless it is blocked."""
        return None if release in self.blocked else release


@dataclass(frozen=True)
class Loaded:
    """A version in TorchServe. `ready` means that a worker is ready to answer."""

    release: Release
    ready: bool


@dataclass(frozen=True)
class Actual:
    """What TorchServe holds (by version, and its default version), the model store, and the ledger.

    `stored` are the archives that are what the ledger says; `approved` the releases that passed their gates and
    belong in TorchServe; `serving` and `last_good` the ones that answered last and before; `withdrawn` those that a
    person has rolled back from.
    """

    loaded: Mapping[str, Loaded] = field(default_factory=dict)
    default: str | None = None
    stored: frozenset[Release] = frozenset()
    approved: frozenset[Release] = frozenset()
    serving: Release | None = None
    last_good: Release | None = None
    withdrawn: frozenset[Release] = frozenset()


def plan(desired: Desired, actual: Actual) -> tuple[Step, ...]:
    """The steps that make TorchServe agree with the registry; none when it does.

    The champion serves; the release that served before it stays loaded, so that going back is instant; the challenger
    is loaded beside them; everything else is retired. With the registry away, or its champion refused, the aim is
    what served last.
    """
    draft = _Draft(actual)
    before = (desired.wanted(actual.serving), desired.wanted(actual.last_good))
    proven = [release for release in before if release and draft.at_hand(release)]
    asked, challenger = desired.wanted(desired.champion), desired.wanted(desired.challenger)
    champion = asked or (proven[0] if proven else None)
    if champion is None:
        # TorchServe makes the first version it gets the default: one that was refused must not stay there.
        refused = desired.blocked - actual.approved - {actual.serving, actual.last_good}
        if all(held.release in refused for held in draft.loaded.values()):
            for held in sorted(draft.loaded.values(), key=lambda held: held.release.version == draft.default):
                draft.retire(held.release)
        return tuple(draft.steps)
    if not draft.answers() and proven and champion not in proven[:1]:
        # Fetching and loading something new takes its time and may fail: first let something proven answer.
        draft.bring(proven[0])
        draft.serve(proven[0])
    draft.bring(champion, fetch=asked is not None)
    # Who passed as challenger was compared with the champion of that day; who has served is not asked again.
    draft.check(champion, again=champion not in (actual.serving, actual.last_good))
    draft.serve(champion)
    keep = {release for release in (champion, draft.last_good, challenger) if release}
    if not desired.known:
        keep |= draft.approved
    for held in list(draft.loaded.values()):
        if held.release not in keep:
            draft.retire(held.release)
    if challenger is not None and challenger.version != champion.version:
        draft.bring(challenger, fetch=True)
        draft.check(challenger)
    # TorchServe starts with what serves alone, to answer soon; the others that belong there follow.
    for release in sorted(keep & draft.approved & draft.stored):
        if release.version not in draft.loaded and desired.wanted(release):
            draft.bring(release)
    return tuple(draft.steps)


class _Draft:
    """The steps so far, and what will be there after them."""

    def __init__(self, actual: Actual) -> None:
        self.steps: list[Step] = []
        self.loaded = dict(actual.loaded)
        self.default = actual.default
        self.stored = set(actual.stored)
        self.approved = set(actual.approved)
        self.serving = actual.serving
        self.last_good = actual.last_good
        self.withdrawn = set(actual.withdrawn)

    def answers(self) -> bool:
        return self.default in self.loaded and self.loaded[self.default].ready

    def at_hand(self, release: Release) -> bool:
        """Whether it can be brought without the registry."""
        held = self.loaded.get(release.version)
        return release in self.stored or (held is not None and held.release == release)

    def bring(self, release: Release, fetch: bool = False) -> None:
        """Have the release in TorchServe with a ready worker, and in the store if it can be fetched."""
        if fetch and release not in self.stored:
            self._add(Action.STORE, release)
            self.stored.add(release)
        held = self.loaded.get(release.version)
        if held and held.release != release:
            self._make_way(held.release)
            held = None
        if held is None:
            self._add(Action.LOAD, release)
            # TorchServe makes the first version it gets the default.
            self.default = self.default if self.loaded else release.version
        elif not held.ready:
            self._add(Action.REVIVE, release)
        self.loaded[release.version] = Loaded(release, ready=True)

    def _make_way(self, old: Release) -> None:
        """Retire a release of another registry whose version number is needed.

        If it is the default, another approved release answers meanwhile; if there is none, there is a gap of seconds:
        TorchServe holds one model under one number.
        """
        if self.default == old.version:
            others = [held for version, held in self.loaded.items() if version != old.version]
            stand_in = next((held.release for held in others if held.ready and held.release in self.approved), None)
            if stand_in is not None:
                self.serve(stand_in)
            else:
                for held in others:  # TorchServe does not drop a default that has company
                    self.retire(held.release)
        self.retire(old)

    def check(self, release: Release, again: bool = False) -> None:
        if again or release not in self.approved:
            self._add(Action.CHECK, release)
            self.approved.add(release)

    def serve(self, release: Release) -> None:
        if self.serving == release and self.default == release.version:
            return
        self._add(Action.SERVE, release)
        self.approved.add(release)
        self.default = release.version
        if self.serving != release:
            self.withdrawn.discard(release)
            self.last_good = None if self.last_good == release else self.last_good
            if self.serving not in self.withdrawn:
                self.last_good = self.serving
            self.serving = release

    def retire(self, release: Release) -> None:
        self._add(Action.RETIRE, release)
        self.approved.discard(release)
        del self.loaded[release.version]

    def _add(self, action: Action, release: Release) -> None:
        self.steps.append(Step(action, release))
