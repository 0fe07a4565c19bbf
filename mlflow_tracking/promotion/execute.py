"""Execute the steps of a plan. Each step can be repeated and interrupted; what served before it keeps serving."""

import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from handlers.bundle import Bundle, BundleError
from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion import model_archive
from mlflow_tracking.promotion.answers import AnswerBook
from mlflow_tracking.promotion.check import GateCheck
from mlflow_tracking.promotion.evaluation_set import CurrentSet
from mlflow_tracking.promotion.gates.base import Gate
from mlflow_tracking.promotion.gates.judge import Judge
from mlflow_tracking.promotion.ledger import Entry
from mlflow_tracking.promotion.observe import Observer
from mlflow_tracking.promotion.plan import Action, Actual, Refused, Release, Step, StepFailed
from mlflow_tracking.promotion.shared_judgements import SharedJudgements
from mlflow_tracking.promotion.workers import Workers
from mlflow_tracking.registry import Registry
from mlflow_tracking.torchserve_client import TorchServe, TorchServeError, with_retries

JUDGEMENTS = "judgements"  # folder in the model store: judgements, and the answers behind them


class Executor:
    """Executes steps on one TorchServe and the model store that it reads. The caller holds the store's lock.

    A release must pass `gates` before it serves. `cache` is a folder for the frozen evaluation set. `key` signs
    judgements for other promoters of the same registry.
    """

    def __init__(
        self,
        store: Path,
        registry: Registry,
        torchserve: TorchServe,
        gates: Sequence[Gate],
        cache: Path,
        key: bytes = b"",
    ) -> None:
        self.store = store
        self.torchserve = torchserve
        self.judge = Judge(gates, store / JUDGEMENTS)
        self.shared = SharedJudgements(registry, key)
        self._registry = registry
        self._observer = Observer(store, torchserve)
        self._workers = Workers(torchserve)
        book, evaluation = AnswerBook(store / JUDGEMENTS), CurrentSet(registry, cache)
        self.check = GateCheck(
            store, registry, torchserve, self.judge, self.shared, book, evaluation, self._observer, self._workers
        )

    def observe(self, expected: Iterable[Release] = ()) -> Actual:
        """Return the actual state (Observer.actual_state)."""
        actual = self._observer.actual_state(expected)
        self._workers.note(actual.loaded)
        return actual

    def run(
        self,
        step: Step,
        progress: Callable[[str], None] = lambda remark: None,
        forced: dict[str, str] | None = None,
    ) -> str:
        """Execute one step; return a remark on it, possibly empty. Raises one of reconcile.STEP_ERRORS.

        Args:
            progress: receives a remark now and then during a long step, and may raise NotYet to stop it.
            forced: {by, reason} of a person who overrules the gates.
        """
        release = step.release
        try:
            match step.action:
                case Action.STORE:
                    return self._store(release)
                case Action.LOAD:
                    self._workers.load(release.archive, self._entry(release), progress)
                case Action.REVIVE:
                    self._workers.revive(self._entry(release))
                case Action.CHECK:
                    return self.check.run(release, progress, forced)
                case Action.SERVE:
                    self._serve(release)
                case Action.RETIRE:
                    self._retire(release)
        except ConnectionError:  # a server is away, which is also an OSError
            raise
        except TorchServeError as error:
            raise StepFailed(f"The step '{step}' failed. {error}") from error
        except (OSError, zipfile.BadZipFile) as error:
            raise StepFailed(f"The step '{step}' failed: {error}.") from error
        return ""

    def prune(self, actual: Actual, desired: Iterable[Release], keep: int) -> list[str]:
        """Delete the archives that are not needed, except the `keep` youngest; return their names.

        Needed are the loaded, the approved, the serving, the last good and the desired ones.
        """
        ledger = ledgers.read(self.store)
        needed = {*ledger.loaded, ledger.default, ledger.last_good, *(release.archive for release in desired)}
        for held in actual.loaded.values():
            needed |= {held.release.archive, held.release.digest}  # Observer puts the name of an unknown archive there
        surplus = [path.name for path in model_archive.surplus(self.store, needed, keep)]
        for name in surplus:
            # The ledger comes first: a file that the ledger lacks is pruned later.
            ledgers.write(self.store, ledgers.read(self.store).pruned(name))
            (self.store / name).unlink(missing_ok=True)
        return surplus

    def _entry(self, release: Release) -> Entry:
        return ledgers.read(self.store).archives[release.archive]

    def _store(self, release: Release) -> str:
        with tempfile.TemporaryDirectory() as temporary:
            try:
                bundle = Bundle.load(self._registry.download_bundle(release.version, Path(temporary)))
            except BundleError as error:
                raise Refused(
                    f"Version {release.version} was refused because its bundle in the registry is damaged. {error}"
                ) from error
            if bundle.digest != release.digest:
                raise Refused(
                    f"Version {release.version} was refused because its bundle is not the one that was registered. "
                    f"Its digest is {bundle.digest}, but the version's tag says {release.digest}."
                )
            archive = model_archive.build(bundle.path, self.store / release.archive, version=release.version)
        entry = Entry(archive.sha256, release.version, release.digest, archive.settings)
        ledgers.write(self.store, ledgers.read(self.store).stored(release.archive, entry))
        return release.archive

    def _serve(self, release: Release) -> None:
        self.torchserve.set_default(release.version)
        # The ledger comes second: after an interruption a restart of TorchServe still serves the earlier version.
        ledgers.write(self.store, ledgers.read(self.store).serving(release.archive))

    def _retire(self, release: Release) -> None:
        self.torchserve.drain(release.version)
        with_retries(lambda: self.torchserve.unregister(release.version))  # a busy TorchServe may answer 500
        ledgers.write(self.store, ledgers.read(self.store).retired(release.archive))
