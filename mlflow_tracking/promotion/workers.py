"""Workers of loaded versions: wait for them, and restart a worker that died."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from mlflow_tracking.promotion.ledger import Entry
from mlflow_tracking.promotion.plan import Loaded, NotYet, StepFailed
from mlflow_tracking.torchserve_client import TorchServe, TorchServeError

STARTUP_SECONDS = 120.0  # TorchServe's default for startupTimeout
# How long a pass waits for a starting worker before it reads the aliases again.
REVIVE_SECONDS = 3.0


@dataclass
class Outage:
    """When a version was first seen without a ready worker (monotonic seconds), and whether it was restarted."""

    since: float
    restarted: bool = False


class Workers:
    """The workers of one TorchServe, and the outages of its versions."""

    def __init__(self, torchserve: TorchServe) -> None:
        self._torchserve = torchserve
        self._outages: dict[str, Outage] = {}
        self._given_up: set[str] = set()

    def note(self, loaded: Mapping[str, Loaded]) -> None:
        """Forget the outages of versions that are ready again or unloaded."""
        lost = {version for version, held in loaded.items() if not held.ready}
        self._outages = {version: outage for version, outage in self._outages.items() if version in lost}
        self._given_up -= loaded.keys() - lost

    def is_given_up(self, version: str) -> bool:
        """Whether a restart did not bring the version's worker back."""
        return version in self._given_up

    def load(self, archive: str, entry: Entry, progress: Callable[[str], None]) -> None:
        """Register an archive and wait until a worker is ready; unload it and raise StepFailed if none gets ready."""
        startup = entry.settings.get("startupTimeout", STARTUP_SECONDS)
        try:
            self._torchserve.register(archive, entry.settings.get("minWorkers", 1))
        except TorchServeError as error:
            if error.status != 409:  # registered already, by an interrupted step
                raise
        if not self._torchserve.wait_ready(entry.version, startup, lambda: progress("the worker is starting")):
            with suppress(TorchServeError):
                self._torchserve.unregister(entry.version)
            raise StepFailed(
                f"Version {entry.version} could not be loaded: its worker died or was not ready after {startup:g} s. "
                "See TorchServe's log."
            )

    def revive(self, entry: Entry) -> None:
        """Wait for a starting worker; restart it once after the startup time. Raises NotYet or StepFailed."""
        version, workers = entry.version, entry.settings.get("minWorkers", 1)
        if self._torchserve.wait_ready(version, REVIVE_SECONDS):
            return
        startup = entry.settings.get("startupTimeout", STARTUP_SECONDS)
        now = time.monotonic()
        outage = self._outages.setdefault(version, Outage(now))
        served = self._torchserve.versions().get(version)
        if served is not None and served.workers and now - outage.since < startup:
            raise NotYet(f"Version {version} has no ready worker yet. The promoter is waiting for it.")
        if outage.restarted:
            del self._outages[version]
            self._given_up.add(version)
            raise StepFailed(f"Version {version} has no ready worker after {startup:g} s. See TorchServe's log.")
        # A dead worker counts as a worker, so the number goes to 0 first.
        self._torchserve.scale(version, 0, synchronous=True)
        self._torchserve.scale(version, workers, synchronous=False)
        self._outages[version] = Outage(now, restarted=True)
        raise NotYet(f"The worker of version {version} was restarted. The promoter is waiting for it.")
