"""Read the desired state from the registry, and the actual state from TorchServe and the model store."""

import time
from collections.abc import Iterable
from pathlib import Path

from mlflow_tracking.digests import DIGEST
from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion.ledger import Verifier
from mlflow_tracking.promotion.plan import Actual, Desired, Loaded, NotYet, Release, Step
from mlflow_tracking.registry import ALIASES, RegisteredVersion, Registry, RegistryUnavailable
from mlflow_tracking.torchserve_client import TorchServe

RECHECK_SECONDS = 1.0  # between two looks at the aliases during a long step


def release_of(version: RegisteredVersion | None) -> Release | None:
    """Return the release of a registered version; None without a valid digest tag.

    The digest becomes part of a file name, and everyone who reaches the registry can write a tag.
    """
    if version is None or not DIGEST.fullmatch(version.digest or ""):
        return None
    return Release(version.version, version.digest or "")


def desired_state(registry: Registry) -> tuple[Desired, dict[str, RegisteredVersion | None]]:
    """Return the desired state, and the version of each alias. Raises RegistryUnavailable."""
    versions = {alias: registry.resolve(alias) for alias in ALIASES}
    return Desired(release_of(versions["champion"]), release_of(versions["challenger"])), versions


class Observer:
    """Reads the actual state of one TorchServe and one model store."""

    def __init__(self, store: Path, torchserve: TorchServe) -> None:
        self._store = store
        self._torchserve = torchserve
        self._verifier = Verifier(store)

    def actual_state(self, expected: Iterable[Release] = ()) -> Actual:
        """Return the actual state; the ledger may lack `expected`. Raises TorchServe's errors and LedgerError."""
        served = self._torchserve.versions()
        default = self._torchserve.default() if served else None
        ledger = ledgers.read(self._store)
        releases = {name: entry.release for name, entry in ledger.archives.items()}
        releases |= {release.archive: release for release in expected}
        return Actual(
            loaded={
                # An archive that is not in the ledger gives a release that no alias can point at.
                version: Loaded(releases.get(model.archive, Release(version, model.archive)), ready=model.ready > 0)
                for version, model in served.items()
            },
            default=default,
            stored=frozenset(
                entry.release for name, entry in ledger.archives.items() if self._verifier.intact(name, entry)
            ),
            approved=frozenset(release for name in ledger.loaded if (release := ledger.release(name))),
            serving=ledger.release(ledger.default),
            last_good=ledger.release(ledger.last_good),
            withdrawn=frozenset(release for name in ledger.withdrawn if (release := ledger.release(name))),
        )


class AliasWatch:
    """Stops a long step of a release that has lost its alias in the meantime."""

    def __init__(self, registry: Registry, desired: Desired) -> None:
        self._registry = registry
        self._releases = desired.releases
        self._checked_at = 0.0

    def check(self, step: Step) -> None:
        """Raise NotYet if no alias points at the step's release any more. Without the registry the step goes on."""
        now = time.monotonic()
        if step.release not in self._releases or now - self._checked_at < RECHECK_SECONDS:
            return
        self._checked_at = now
        try:
            desired, _ = desired_state(self._registry)
        except RegistryUnavailable:
            return
        if step.release not in desired.releases:
            raise NotYet(
                f"The step '{step}' was stopped, because no alias points at version {step.release.version} any more."
            )
