"""The planner: compute the steps that turn the actual state into the desired state. Pure: no clock, network or files.

Two promises hold for every plan. What answers now stays until a proven release answers in its place. A plan may stop
after any step, and planning again from there reaches the same end.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from handlers.errors import UserError
from mlflow_tracking.digests import short
from mlflow_tracking.stack_settings import MODEL_NAME

Name = TypeVar("Name")


@dataclass(frozen=True, order=True)
class Release:
    """One bundle under one version number of the registry.

    A new registry counts from 1 again, so the number alone does not identify a model.
    """

    version: str
    digest: str

    @property
    def archive(self) -> str:
        """The file name of its archive in the model store."""
        return f"{MODEL_NAME}-{self.version}-{short(self.digest)}.mar"


class Action(StrEnum):
    """What a step does with its release."""

    STORE = "store"  # fetch the bundle, verify it, put the archive into the model store
    LOAD = "load"  # register the archive in TorchServe and wait for a ready worker
    REVIVE = "revive"  # get a ready worker for a loaded version that has none
    CHECK = "check"  # judge its answers by the gates
    SERVE = "serve"  # make it the default, which answers /predictions/skin_vit
    RETIRE = "retire"  # drain it and take it out of TorchServe


@dataclass(frozen=True)
class Step:
    """One idempotent step."""

    action: Action
    release: Release

    def __str__(self) -> str:
        return f"{self.action} version {self.release.version}"


class Refused(UserError):
    """The release of a step is at fault; a retry would not help."""


class StepFailed(UserError):
    """The step failed, but a retry may succeed."""


class NotYet(UserError):
    """The step needs more time, or its release has lost its alias. Nothing is at fault."""


@dataclass(frozen=True)
class Desired:
    """The desired state: the releases that the registry's aliases point at.

    Without the registry (`registry_up` is False) both are None, and the plan removes nothing proven. `blocked` are
    releases that were refused, or that failed and wait for their next try.
    """

    champion: Release | None = None
    challenger: Release | None = None
    registry_up: bool = True
    blocked: frozenset[Release] = frozenset()

    @property
    def releases(self) -> list[Release]:
        """The releases that have an alias."""
        return [release for release in (self.champion, self.challenger) if release]

    def unblocked(self, release: Release | None) -> Release | None:
        """Return the release, or None if it is blocked."""
        return None if release in self.blocked else release


@dataclass(frozen=True)
class Loaded:
    """A version in TorchServe; `ready` means that a worker can answer."""

    release: Release
    ready: bool


@dataclass(frozen=True)
class Actual:
    """The actual state of TorchServe, the model store and the ledger."""

    loaded: Mapping[str, Loaded] = field(default_factory=dict)  # in TorchServe, by version
    default: str | None = None  # the version that answers if a request names none
    stored: frozenset[Release] = frozenset()  # their archives are intact
    approved: frozenset[Release] = frozenset()  # they passed their gates and belong in TorchServe
    serving: Release | None = None
    last_good: Release | None = None  # served before `serving`
    withdrawn: frozenset[Release] = frozenset()  # a person rolled back from them


def take_over(
    new: Name, serving: Name | None, last_good: Name | None, withdrawn: Collection[Name]
) -> tuple[Name | None, frozenset[Name]]:
    """Return (last good, withdrawn) after `new` takes over from `serving`.

    A release that a person rolled back from does not become the last good one. If `new` serves already, nothing
    changes: otherwise the last good release would be lost.
    """
    if new == serving:
        return last_good, frozenset(withdrawn)
    remaining = frozenset(withdrawn) - {new}
    if serving not in remaining:
        return serving, remaining
    return None if last_good == new else last_good, remaining


def plan(desired: Desired, actual: Actual) -> tuple[Step, ...]:
    """Return the steps that make TorchServe agree with the registry; none if it agrees.

    The champion serves, its predecessor stays loaded for an instant roll-back, and the challenger is loaded. All other
    versions are retired. If the registry is away or its champion is blocked, the release that served last serves.
    """
    draft = _Draft(actual)
    earlier = (desired.unblocked(actual.serving), desired.unblocked(actual.last_good))
    proven = [release for release in earlier if release and draft.at_hand(release)]
    requested, challenger = desired.unblocked(desired.champion), desired.unblocked(desired.challenger)
    champion = requested or (proven[0] if proven else None)
    if champion is None:
        # TorchServe makes the first version that it loads the default: a refused one must not stay there.
        refused = desired.blocked - actual.approved - {actual.serving, actual.last_good}
        if all(held.release in refused for held in draft.loaded.values()):
            for held in sorted(draft.loaded.values(), key=lambda held: held.release.version == draft.default):
                draft.retire(held.release)
        return tuple(draft.steps)
    if not draft.answers() and proven and champion not in proven[:1]:
        # Loading something new takes time and may fail: first a proven release answers.
        draft.bring(proven[0])
        draft.serve(proven[0])
    draft.bring(champion, fetch=requested is not None)
    # A challenger was compared with an earlier champion, so it is checked again. A release that served is not.
    draft.check(champion, again=champion not in (actual.serving, actual.last_good))
    draft.serve(champion)
    keep = {release for release in (champion, draft.last_good, challenger) if release}
    if not desired.registry_up:
        keep |= draft.approved
    for held in list(draft.loaded.values()):
        if held.release not in keep:
            draft.retire(held.release)
    if challenger is not None and challenger.version != champion.version:
        draft.bring(challenger, fetch=True)
        draft.check(challenger)
    # TorchServe starts with the serving version alone, to answer soon. The other approved versions follow.
    for release in sorted(keep & draft.approved & draft.stored):
        if release.version not in draft.loaded and desired.unblocked(release):
            draft.bring(release)
    return tuple(draft.steps)


class _Draft:
    """The steps so far, and the state that they lead to."""

    def __init__(self, actual: Actual) -> None:
        self.steps: list[Step] = []
        self.loaded = dict(actual.loaded)
        self.default = actual.default
        self.stored = set(actual.stored)
        self.approved = set(actual.approved)
        self.serving = actual.serving
        self.last_good = actual.last_good
        self.withdrawn = actual.withdrawn

    def answers(self) -> bool:
        return self.default in self.loaded and self.loaded[self.default].ready

    def at_hand(self, release: Release) -> bool:
        """Whether the release can be loaded without the registry."""
        held = self.loaded.get(release.version)
        return release in self.stored or (held is not None and held.release == release)

    def bring(self, release: Release, fetch: bool = False) -> None:
        """Get a ready worker for the release; with `fetch` also get its archive into the store."""
        if fetch and release not in self.stored:
            self._add(Action.STORE, release)
            self.stored.add(release)
        held = self.loaded.get(release.version)
        if held and held.release != release:
            self._free_number(held.release)
            held = None
        if held is None:
            self._add(Action.LOAD, release)
            self.default = self.default if self.loaded else release.version  # TorchServe's rule for the first version
        elif not held.ready:
            self._add(Action.REVIVE, release)
        self.loaded[release.version] = Loaded(release, ready=True)

    def _free_number(self, old: Release) -> None:
        """Retire a release of another registry, because TorchServe holds one model under one version number.

        If it is the default, nothing answers until the new release is loaded.
        """
        if self.default == old.version:  # TorchServe refuses to drop the default while other versions are loaded
            for held in [held for held in self.loaded.values() if held.release != old]:
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
        self.last_good, self.withdrawn = take_over(release, self.serving, self.last_good, self.withdrawn)
        self.serving = release

    def retire(self, release: Release) -> None:
        self._add(Action.RETIRE, release)
        self.approved.discard(release)
        del self.loaded[release.version]

    def _add(self, action: Action, release: Release) -> None:
        self.steps.append(Step(action, release))
