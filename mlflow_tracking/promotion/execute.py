"""The steps of a plan, done. Each can be repeated, and cut off anywhere: what was there before it keeps serving."""

import tempfile
import time
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from handlers.bundle import Bundle, BundleError
from mlflow_tracking.promotion import archive as archives
from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion.gates import GATES, Candidate, Gate
from mlflow_tracking.promotion.ledger import Entry, Ledger, Verifier
from mlflow_tracking.promotion.plan import Action, Actual, Loaded, Release, Step
from mlflow_tracking.promotion.torchserve_client import TorchServe, TorchServeError
from mlflow_tracking.registry import Registry

STARTUP = 120.0  # TorchServe's own default
# How long a pass waits for a worker that is starting, before it looks again whether that is still wanted.
PATIENCE = 3.0


class Refused(RuntimeError):
    """The release itself is at fault and trying again would not help; a sentence."""


class StepFailed(RuntimeError):
    """A step did not work out, but may another time; a sentence."""


class NotYet(RuntimeError):
    """A worker is starting; look again later. A sentence."""


class Executor:
    """Does steps on one TorchServe and one model store. Its caller holds the store's lock.

    Args:
        store: the model store, the same folder that TorchServe reads.
        gates: what a release must pass before it serves.
    """

    def __init__(self, store: Path, registry: Registry, torchserve: TorchServe, gates: Sequence[Gate] = GATES) -> None:
        self.store = store
        self.registry = registry
        self.torchserve = torchserve
        self.gates = gates
        self._verifier = Verifier(store)
        # Loaded versions without a ready worker: since when (monotonic seconds), and whether it was started anew.
        self._unready: dict[str, tuple[float, bool]] = {}

    def observe(self, asked: Iterable[Release] = ()) -> Actual:
        """What is there now. `asked` are releases the ledger may not know yet.

        Raises:
            TorchServeUnavailable, TorchServeError, LedgerError
        """
        served = self.torchserve.versions()
        for version in [version for version in self._unready if version not in served or served[version].ready]:
            del self._unready[version]
        default = self.torchserve.default() if served else None
        ledger = self.ledger()
        names = {name: entry.release for name, entry in ledger.archives.items()}
        names |= {release.archive: release for release in asked}
        return Actual(
            loaded={
                # Something unknown under a version number is no release that anybody asks for.
                version: Loaded(names.get(one.archive, Release(version, one.archive)), ready=one.ready > 0)
                for version, one in served.items()
            },
            default=default,
            stored=frozenset(
                entry.release for name, entry in ledger.archives.items() if self._verifier.intact(name, entry)
            ),
            approved=frozenset(release for name in ledger.loaded if (release := ledger.release(name))),
            serving=ledger.release(ledger.default),
            last_good=ledger.release(ledger.last_good),
        )

    def ledger(self) -> Ledger:
        """The store's ledger. Raises LedgerError."""
        return ledgers.read(self.store)

    def run(self, step: Step) -> str:
        """Do one step; returns a remark on it, possibly empty.

        Raises:
            Refused, StepFailed: the release is at fault, for good or this time.
            RegistryError, RegistryUnavailable, TorchServeUnavailable: so may be its surroundings.
            NotYet: nobody is at fault, and the step has not come to its end.
        """
        steps = {
            Action.STORE: self._store,
            Action.LOAD: self._load,
            Action.REVIVE: self._revive,
            Action.CHECK: self._check,
            Action.SERVE: self._serve,
            Action.RETIRE: self._retire,
        }
        try:
            return steps[step.action](step.release) or ""
        except (OSError, zipfile.BadZipFile) as error:
            if isinstance(error, ConnectionError):
                raise
            raise StepFailed(f"{step} failed: {error}") from error
        except TorchServeError as error:
            raise StepFailed(f"{step} failed: {error}") from error

    def _store(self, release: Release) -> str:
        with tempfile.TemporaryDirectory() as temporary:
            try:
                bundle = Bundle.load(self.registry.download_bundle(release.version, Path(temporary)))
            except BundleError as error:
                raise Refused(f"its bundle in the registry is damaged: {error}") from error
            if bundle.digest != release.digest:
                raise Refused(
                    f"its bundle in the registry is not the one that was registered: its digest is {bundle.digest}, "
                    f"and the version's tag says {release.digest}"
                )
            archive = archives.build(bundle.path, self.store / release.archive, version=release.version)
        entry = Entry(archive.sha256, release.version, release.digest, archive.settings)
        self._write(self.ledger().stored(release.archive, entry))
        return release.archive

    def _load(self, release: Release) -> str:
        settings = self.ledger().archives[release.archive].settings
        startup = settings.get("startupTimeout", STARTUP)
        try:
            self.torchserve.register(release.archive, settings.get("minWorkers", 1))
        except TorchServeError as error:
            if error.status != 409:  # registered already: by a call of ours that was cut off
                raise
        if not self.torchserve.wait_ready(release.version, startup):
            with suppress(TorchServeError):
                self.torchserve.unregister(release.version)
            raise StepFailed(
                f"version {release.version} could not be loaded: its worker ends while it starts, or is not ready "
                f"after {startup:g} s; see TorchServe's log"
            )
        return ""

    def _revive(self, release: Release) -> str:
        """A worker that died, or that starts with TorchServe, gets its time; after that it is started anew, once."""
        if self.torchserve.wait_ready(release.version, PATIENCE):
            return ""
        settings = self.ledger().archives[release.archive].settings
        startup = settings.get("startupTimeout", STARTUP)
        now = time.monotonic()
        since, anew = self._unready.setdefault(release.version, (now, False))
        served = self.torchserve.versions().get(release.version)
        if served is not None and served.workers and now - since < startup:
            raise NotYet(f"Version {release.version} has no ready worker yet; waiting for it.")
        if anew:
            del self._unready[release.version]
            raise StepFailed(f"version {release.version} has no ready worker after {startup:g} s; see TorchServe's log")
        # A dead worker still counts as one, so first there must be none.
        self.torchserve.scale(release.version, 0, synchronous=True)
        self.torchserve.scale(release.version, settings.get("minWorkers", 1), synchronous=False)
        self._unready[release.version] = (now, True)
        raise NotYet(f"The worker of version {release.version} was started anew; waiting for it.")

    def _check(self, release: Release) -> str:
        with tempfile.TemporaryDirectory() as temporary:
            try:
                bundle = Bundle.load(archives.extract_bundle(self.store / release.archive, Path(temporary)))
                verdicts = [gate.evaluate(Candidate(release, bundle, self.torchserve)) for gate in self.gates]
            except BundleError as error:
                raise Refused(f"the bundle in its archive is damaged: {error}") from error
        if failed := [verdict for verdict in verdicts if not verdict.passed]:
            with suppress(TorchServeError):  # it may even be the default, if it was the first
                self.torchserve.unregister(release.version)
            raise Refused("; ".join(f"{verdict.gate}: {verdict.reason}" for verdict in failed))
        self._write(self.ledger().approved(release.archive))
        return "; ".join(f"{verdict.gate}: {verdict.reason}" for verdict in verdicts)

    def _serve(self, release: Release) -> str:
        self.torchserve.set_default(release.version)
        # TorchServe first: cut off between the two, the ledger still names what served before, and a restart does so.
        self._write(self.ledger().serving(release.archive))
        return ""

    def _retire(self, release: Release) -> str:
        self.torchserve.drain(release.version)
        self.torchserve.unregister(release.version)
        self._write(self.ledger().retired(release.archive))
        return ""

    def _write(self, ledger: Ledger) -> None:
        ledgers.write(self.store, ledger)
