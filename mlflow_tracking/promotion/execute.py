"""The steps of a plan, done. Each can be repeated, and cut off anywhere: what was there before it keeps serving."""

import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from handlers.bundle import Bundle, BundleError
from mlflow_tracking.promotion import archive as archives
from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion.answers import AnswerBook
from mlflow_tracking.promotion.evaluation_set import CurrentSet, EvaluationSetError
from mlflow_tracking.promotion.gates.base import Candidate, Gate, Outcome
from mlflow_tracking.promotion.gates.judge import Judge, Judgement
from mlflow_tracking.promotion.ledger import Entry, Ledger, Verifier
from mlflow_tracking.promotion.plan import Action, Actual, Loaded, Release, Step
from mlflow_tracking.promotion.torchserve_client import TorchServe, TorchServeError
from mlflow_tracking.registry import Registry

STARTUP = 120.0  # TorchServe's own default
# How long a pass waits for a worker that is starting, before it looks again whether that is still wanted.
PATIENCE = 3.0
# How long the champion's worker may take to come back, if it has just died, before a candidate's check is given up.
RECOVERY = 30.0
JUDGEMENTS = "judgements"  # in the model store: what was asked of whom, and the answers


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
        cache: a folder for the frozen evaluation set; what is in it can be fetched again.
    """

    def __init__(
        self, store: Path, registry: Registry, torchserve: TorchServe, gates: Sequence[Gate], cache: Path
    ) -> None:
        self.store = store
        self.registry = registry
        self.torchserve = torchserve
        self.judge = Judge(gates, store / JUDGEMENTS)
        self.book = AnswerBook(store / JUDGEMENTS)
        self.evaluation = CurrentSet(registry, cache)
        self._verifier = Verifier(store)
        # Loaded versions without a ready worker: since when (monotonic seconds), and whether it was started anew.
        self._unready: dict[str, tuple[float, bool]] = {}
        self._given_up: set[str] = set()  # versions whose worker did not come back though it was started anew

    def observe(self, asked: Iterable[Release] = ()) -> Actual:
        """What is there now. `asked` are releases the ledger may not know yet.

        Raises:
            TorchServeUnavailable, TorchServeError, LedgerError
        """
        served = self.torchserve.versions()
        for version in [version for version in self._unready if version not in served or served[version].ready]:
            del self._unready[version]
        self._given_up -= {version for version, one in served.items() if one.ready}
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
            withdrawn=frozenset(release for name in ledger.withdrawn if (release := ledger.release(name))),
        )

    def ledger(self) -> Ledger:
        """The store's ledger. Raises LedgerError."""
        return ledgers.read(self.store)

    def refusal(self, release: Release, actual: Actual) -> Judgement | None:
        """The judgement that keeps a release from serving, if what would be asked now was asked before.

        Raises:
            RegistryUnavailable
        """
        found = self.registry.evaluation_set()
        champion = _champion(actual, release)
        question = self.judge.question(release, found, champion)
        kept = self.judge.kept(question)
        return kept if kept and not kept.passed else None

    def withdraw(self, release: Release) -> None:
        """Note that a person has rolled back from a release."""
        self._write(self.ledger().rolled_back(release.archive))

    def reinstate(self, release: Release) -> None:
        """Note that what serves is asked for although a person had rolled back from it."""
        self._write(self.ledger().reinstated(release.archive))

    def forget(self, digest: str) -> None:
        """Have a bundle judged anew, nothing kept of what it was asked before."""
        self.judge.forget(digest)
        self.book.forget(digest)

    def prune(self, actual: Actual, asked: Iterable[Release], keep: int) -> list[str]:
        """Delete the archives that nobody needs, but for the `keep` youngest; returns their names.

        Needed is what is loaded, what belongs in TorchServe, what served last and before, and what is asked for.
        """
        ledger = self.ledger()
        needed = {release.archive for release in asked} | {*ledger.loaded, ledger.default or "", ledger.last_good or ""}
        for held in actual.loaded.values():
            needed |= {held.release.archive, held.release.digest}  # of something unknown this is the archive's name
        gone = [path.name for path in archives.surplus(self.store, needed, keep)]
        for name in gone:
            # The ledger first: cut off between the two, the file is one that the ledger does not know, and goes later.
            self._write(self.ledger().pruned(name))
            (self.store / name).unlink(missing_ok=True)
        return gone

    def run(
        self,
        step: Step,
        progress: Callable[[str], None] = lambda remark: None,
        forced: dict[str, str] | None = None,
    ) -> str:
        """Do one step; returns a remark on it, possibly empty.

        `progress` receives a remark now and then during a long step and may raise NotYet to stop it. `forced` is
        {by, reason} of the person who overrules the gates.

        Raises:
            Refused, StepFailed: the release is at fault, for good or this time.
            RegistryError, RegistryUnavailable, TorchServeUnavailable: so may be its surroundings.
            NotYet: nobody is at fault, and the step has not come to its end.
        """
        steps = {
            Action.STORE: lambda: self._store(step.release),
            Action.LOAD: lambda: self._load(step.release, progress),
            Action.REVIVE: lambda: self._revive(step.release),
            Action.CHECK: lambda: self._check(step.release, progress, forced),
            Action.SERVE: lambda: self._serve(step.release),
            Action.RETIRE: lambda: self._retire(step.release),
        }
        try:
            return steps[step.action]()
        except ConnectionError:  # a server is away, and says which
            raise
        except EvaluationSetError as error:
            self.evaluation.doubt()
            raise StepFailed(f"{step} failed: {error}") from error
        except (OSError, zipfile.BadZipFile, TorchServeError) as error:
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

    def _load(self, release: Release, progress: Callable[[str], None]) -> str:
        settings = self.ledger().archives[release.archive].settings
        startup = settings.get("startupTimeout", STARTUP)
        try:
            self.torchserve.register(release.archive, settings.get("minWorkers", 1))
        except TorchServeError as error:
            if error.status != 409:  # registered already: by a call of ours that was cut off
                raise
        if not self.torchserve.wait_ready(release.version, startup, lambda: progress("its worker starts")):
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
            self._given_up.add(release.version)
            raise StepFailed(f"version {release.version} has no ready worker after {startup:g} s; see TorchServe's log")
        # A dead worker still counts as one, so first there must be none.
        self.torchserve.scale(release.version, 0, synchronous=True)
        self.torchserve.scale(release.version, settings.get("minWorkers", 1), synchronous=False)
        self._unready[release.version] = (now, True)
        raise NotYet(f"The worker of version {release.version} was started anew; waiting for it.")

    def _check(self, release: Release, progress: Callable[[str], None], forced: dict[str, str] | None) -> str:
        try:
            judgement = self._judgement(release, progress)
        except BundleError as error:
            raise Refused(f"the bundle in its archive is damaged: {error}") from error
        if judgement.blocking and forced and self.judge.may_force(judgement):
            judgement = replace(judgement, forced=forced)
        self.judge.keep(judgement)
        if not judgement.passed:
            self._write(self.ledger().retired(release.archive))  # it may have passed before, as challenger
            with suppress(TorchServeError):  # it may even be the default, if it was the first
                self.torchserve.unregister(release.version)
            raise Refused(judgement.reason)
        self._write(self.ledger().approved(release.archive))
        if judgement.forced:
            return f"overruled by {judgement.forced['by']} ({judgement.forced['reason']}): {judgement.reason}"
        passed = sum(verdict.outcome is Outcome.PASSED for verdict in judgement.verdicts)
        left_open = f"; {judgement.reason}" if judgement.reason else ""
        return f"{passed} of {len(judgement.verdicts)} gates passed in {judgement.seconds:g} s{left_open}"

    def _judgement(self, release: Release, progress: Callable[[str], None]) -> Judgement:
        """The verdicts on a release that is loaded: those that were kept, or new ones."""
        self._await_champion(release, progress)
        champion = _champion(self.observe(), release)
        evaluation = self.evaluation.get()
        question = self.judge.question(release, evaluation, champion)
        if kept := self.judge.kept(question):
            return replace(kept, version=release.version)
        registered = self.registry.version(release.version)
        with tempfile.TemporaryDirectory() as temporary:
            bundle = Bundle.load(archives.extract_bundle(self.store / release.archive, Path(temporary)))
            return self.judge.judge(
                Candidate(
                    release,
                    bundle,
                    self.torchserve,
                    self.book,
                    registered_digest=registered.digest if registered else None,
                    signature=self.registry.signature(release.version),
                    champion=champion,
                    evaluation=evaluation,
                    progress=progress,
                )
            )

    def _await_champion(self, candidate: Release, progress: Callable[[str], None]) -> None:
        """Give a champion that has just lost its worker time to get it back: without one to be compared with, the
        candidate would pass as the very first. Raises StepFailed, the candidate being taken out to make room."""
        actual = self.observe()
        serving = actual.serving
        lost = serving is not None and Loaded(serving, ready=False) in actual.loaded.values()
        if not lost or serving is None or serving.version in self._given_up:
            return
        if self.torchserve.wait_ready(serving.version, RECOVERY, lambda: progress("the champion's worker starts")):
            return
        with suppress(TorchServeError):
            self.torchserve.unregister(candidate.version)
        raise StepFailed(
            f"version {serving.version}, which serves, has lost its worker and does not get it back beside version "
            f"{candidate.version}, which was taken out again: is there memory for both?"
        )

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


def _champion(actual: Actual, candidate: Release) -> Release | None:
    """Whom a candidate is compared with: what serves and answers, and is another bundle."""
    serving = actual.serving
    held = actual.loaded.get(serving.version) if serving else None
    answers = held is not None and held.release == serving and held.ready
    return serving if answers and serving and serving.digest != candidate.digest else None
