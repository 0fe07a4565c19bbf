"""Several replicas, each a TorchServe with a promoter, that share one registry and switch one after the other.

Each promoter publishes its state as a tag of the registered model, `replica.NAME`. A replica whose tag has not changed
for SILENT_SECONDS counts as gone; each promoter measures this with its own clock, so the clocks need not agree.
The replicas switch in the order of their names.
"""

import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pydantic import TypeAdapter, ValidationError

from mlflow_tracking.promotion.plan import Action, Actual, Loaded, NotYet, Release, Step
from mlflow_tracking.registry import Registry

TAG = "replica."
BEAT_SECONDS = 5.0  # between two changes of a tag whose state stays the same
SILENT_SECONDS = 60.0  # longer than any part of a step


@dataclass(frozen=True)
class PublishedReplica:
    """What one replica does.

    `url` is the address of its prediction API. `up` means that a worker answers. `serving` is the release that answers,
    and `approved` are those that passed their gates. `beat` changes with every publication.
    """

    url: str
    up: bool = False
    serving: Release | None = None
    approved: tuple[Release, ...] = ()
    beat: int = 0


class SharedReplicas:
    """The replicas of a registry, seen by the promoter `name`. A promoter without a name is alone."""

    def __init__(self, registry: Registry, name: str = "", url: str = "") -> None:
        self.name = name
        self.champion: Release | None = None
        self._registry = registry
        self._own = PublishedReplica(url)
        self._published_at = -BEAT_SECONDS
        self._tags: dict[str, tuple[str, float]] = {}  # the last tag of each replica, and when it changed

    def publish(self, actual: Actual | None, champion: Release | None) -> None:
        """Write the state into the registry, if it has changed or BEAT_SECONDS are over. Raises RegistryUnavailable."""
        self.champion = champion
        if not self.name:
            return
        before, self._own = self._own, replace(state_of(actual, self._own.url), beat=self._own.beat)
        if self._own == before:
            self.beat()
        else:
            self._write()

    def beat(self) -> None:
        """Publish the last state again if BEAT_SECONDS are over. Raises RegistryUnavailable."""
        if self.name and time.monotonic() - self._published_at >= BEAT_SECONDS:
            self._write()

    def _write(self) -> None:
        self._own = replace(self._own, beat=self._own.beat + 1)
        self._registry.set_model_tag(TAG + self.name, TypeAdapter(PublishedReplica).dump_json(self._own).decode())
        self._published_at = time.monotonic()

    def read(self) -> None:
        """Read the states of all replicas from the registry. Raises RegistryUnavailable."""
        if not self.name:
            return
        now = time.monotonic()
        for tag, value in self._registry.model_tags().items():
            if tag.startswith(TAG) and self._tags.get(tag, ("", 0.0))[0] != value:
                self._tags[tag] = (value, now)

    def living(self) -> dict[str, PublishedReplica]:
        """Return the states of the replicas that publish, by name, in the order in which they switch."""
        now = time.monotonic()
        states = {
            tag.removeprefix(TAG): state
            for tag, (value, changed_at) in self._tags.items()
            if now - changed_at < SILENT_SECONDS and (state := _parsed(value))
        }
        return dict(sorted(states.items(), key=lambda item: _order(item[0])))

    def await_turn(self, step: Step, actual: Actual, is_judged: Callable[[Release, Actual], bool]) -> None:
        """Raise NotYet if a replica before this one has to run the step first.

        The first replica asks the gates, and the others take its judgement (`is_judged`). A replica that answers
        switches after all replicas before it; one that does not answer never waits. `actual` is its state.
        """
        if step.action not in (Action.CHECK, Action.SERVE) or actual.default not in actual.loaded:
            return
        for name, state in self.living().items():
            if _order(name) >= _order(self.name):
                return
            if not state.up:
                continue
            is_checked = step.action is Action.SERVE or step.release in actual.approved
            if is_checked and state.serving != step.release:
                raise NotYet(f"Version {step.release.version} waits until replica {name} serves it.")
            is_checked |= step.release in (*state.approved, state.serving)
            if not is_checked and not is_judged(step.release, actual):
                raise NotYet(f"Version {step.release.version} waits until replica {name} has checked it.")

    def report(self) -> list[dict[str, Any]]:
        """Return name, url, version (None: it does not answer) and `current` of each living replica.

        A replica is current if it serves the champion, or if none does. A proxy sends nothing to a replica that
        returns before it is current: its clients may have seen a newer version.
        """
        living = self.living()
        served = {name: state.serving for name, state in living.items() if state.up}
        champion = self.champion if self.champion in served.values() else None
        return [
            {
                "name": name,
                "url": state.url,
                "version": release.version if (release := served.get(name)) else None,
                "current": name in served and (champion is None or release == champion),
            }
            for name, state in living.items()
        ]


def state_of(actual: Actual | None, url: str) -> PublishedReplica:
    """Return the state to publish; `actual` is None if TorchServe does not answer."""
    if actual is None or actual.serving is None:
        return PublishedReplica(url)
    up = actual.default == actual.serving.version and Loaded(actual.serving, ready=True) in actual.loaded.values()
    return PublishedReplica(url, up, actual.serving, tuple(sorted(actual.approved)))


def serving_counts(report: list[dict[str, Any]]) -> Mapping[str, int]:
    """Return how many replicas serve each version."""
    versions = [replica["version"] for replica in report if replica["version"]]
    return {version: versions.count(version) for version in sorted(set(versions), key=int)}


def _parsed(value: str) -> PublishedReplica | None:
    """Return a published state; None for another text, because everyone who reaches the registry can write a tag."""
    try:
        return TypeAdapter(PublishedReplica).validate_python(json.loads(value))
    except (ValueError, ValidationError):
        return None


def _order(name: str) -> list[tuple[int, str]]:
    """Return the key that sorts serving-2 before serving-10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]
