"""The check step: ask the gates about a loaded release, and keep their judgement."""

import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from handlers.bundle import Bundle, BundleError
from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion import model_archive
from mlflow_tracking.promotion.answers import AnswerBook
from mlflow_tracking.promotion.evaluation_set import CurrentSet, EvaluationSetError
from mlflow_tracking.promotion.gates.base import Candidate, Outcome
from mlflow_tracking.promotion.gates.judge import Judge, Judgement, Question
from mlflow_tracking.promotion.observe import Observer
from mlflow_tracking.promotion.plan import Actual, Loaded, Refused, Release, StepFailed
from mlflow_tracking.promotion.shared_judgements import SharedJudgements
from mlflow_tracking.promotion.workers import Workers
from mlflow_tracking.registry import Registry
from mlflow_tracking.torchserve_client import TorchServe, TorchServeError

# How long a check waits for the champion's worker to come back. Without a champion to compare with, the candidate
# would pass as the first version of all.
CHAMPION_SECONDS = 30.0


@dataclass
class GateCheck:
    """Asks the gates of `judge`, unless another promoter did. `book` keeps the answers to the frozen `evaluation`."""

    store: Path
    registry: Registry
    torchserve: TorchServe
    judge: Judge
    shared: SharedJudgements
    book: AnswerBook
    evaluation: CurrentSet
    observer: Observer
    workers: Workers

    def run(self, release: Release, progress: Callable[[str], None], forced: dict[str, str] | None) -> str:
        """Judge a release and approve it in the ledger; return a remark. Arguments and errors as for Executor.run.

        A refused version is unloaded. A champion without a worker, or a damaged frozen set, is a StepFailed.
        """
        try:
            judgement = self._judgement(release, progress)
        except BundleError as error:
            raise Refused(
                f"Version {release.version} was refused because the bundle in its archive is damaged. {error}"
            ) from error
        except EvaluationSetError as error:
            self.evaluation.doubt()
            raise StepFailed(f"Version {release.version} could not be checked. {error}") from error
        if judgement.blocking and forced and self.judge.may_force(judgement):
            judgement = replace(judgement, forced=forced)
        self.judge.keep(judgement)
        ledger = ledgers.read(self.store)
        if not judgement.passed:
            ledgers.write(self.store, ledger.retired(release.archive))  # it may have passed before, as challenger
            with suppress(TorchServeError):  # TorchServe keeps a default; the next plan retires it
                self.torchserve.unregister(release.version)
            raise _refusal(release, judgement)
        ledgers.write(self.store, ledger.approved(release.archive))
        if judgement.forced:
            return f"overruled by {judgement.forced['by']} ({judgement.forced['reason']}): {judgement.reason}"
        passed = sum(verdict.outcome is Outcome.PASSED for verdict in judgement.verdicts)
        remark = f"{passed} of {len(judgement.verdicts)} gates passed in {judgement.seconds:g} s"
        return f"{remark}; {judgement.reason}" if judgement.reason else remark

    def earlier_refusal(self, release: Release, actual: Actual) -> Refused | None:
        """Return the refusal that the same check gave before, by whichever promoter. Raises RegistryUnavailable."""
        question = self._question(release, actual)
        judgement = self.judge.kept(question)
        return _refusal(release, judgement) if judgement and not judgement.passed else None

    def is_judged_elsewhere(self, release: Release, actual: Actual) -> bool:
        """Return whether another promoter has judged the release. Raises RegistryUnavailable."""
        return self.shared.find(release.version, self._question(release, actual)) is not None

    def forget(self, digest: str) -> None:
        """Discard the judgements and answers of a bundle."""
        self.judge.forget(digest)
        self.book.forget(digest)

    def _judgement(self, release: Release, progress: Callable[[str], None]) -> Judgement:
        """Return the judgement on a loaded release: a kept one, or a new one."""
        self._await_champion(release, progress)
        champion = comparable_champion(self.observer.actual_state(), release)
        evaluation = self.evaluation.get()
        question = self.judge.question(release, evaluation, champion)
        if kept := self.judge.kept(question) or self.shared.find(release.version, question):
            return replace(kept, version=release.version)
        registered = self.registry.version(release.version)
        with tempfile.TemporaryDirectory() as temporary:
            bundle = Bundle.read(model_archive.extract_bundle(self.store / release.archive, Path(temporary)))
            candidate = Candidate(
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
            return self.judge.judge(candidate)

    def _question(self, release: Release, actual: Actual) -> Question:
        return self.judge.question(release, self.registry.evaluation_set(), comparable_champion(actual, release))

    def _await_champion(self, candidate: Release, progress: Callable[[str], None]) -> None:
        """Wait for a champion that has just lost its worker. Unload the candidate and raise StepFailed in vain."""
        actual = self.observer.actual_state()
        serving = actual.serving
        if serving is None or Loaded(serving, ready=False) not in actual.loaded.values():
            return
        if self.workers.is_given_up(serving.version):
            return
        waiting = "the champion's worker is starting"
        if self.torchserve.wait_ready(serving.version, CHAMPION_SECONDS, lambda: progress(waiting)):
            return
        with suppress(TorchServeError):
            self.torchserve.unregister(candidate.version)
        raise StepFailed(
            f"The champion, version {serving.version}, lost its worker while version {candidate.version} was loaded, "
            f"so version {candidate.version} was unloaded. Check that there is memory for both."
        )


def comparable_champion(actual: Actual, candidate: Release) -> Release | None:
    """Return the release that a candidate is compared with: it serves, has a ready worker and is another bundle."""
    serving = actual.serving
    if serving is None or serving.digest == candidate.digest:
        return None
    return serving if Loaded(serving, ready=True) in actual.loaded.values() else None


def _refusal(release: Release, judgement: Judgement) -> Refused:
    return Refused(f"Version {release.version} was refused: {judgement.reason.rstrip('.')}.")
