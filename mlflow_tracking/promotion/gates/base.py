"""Gates: the questions that a candidate must answer well before it serves.

A new gate is a subclass of Gate, or of SetGate for a question about the frozen evaluation set. It has a `name`, its
limits as fields, and an answer. Add it to GATES in judge.py and to gates.yaml; docs/operations.md lists the steps.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from handlers.bundle import Bundle
from mlflow_tracking.promotion.answers import AnswerBook, Answers
from mlflow_tracking.promotion.evaluation_set import EvaluationSet
from mlflow_tracking.promotion.plan import Release
from mlflow_tracking.torchserve_client import TorchServe
from mlflow_tracking.version_card import Signature

NO_SET = "No evaluation set is frozen. Freeze one with prepare_data.py --freeze-eval."


class Outcome(StrEnum):
    """The outcome of a gate."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_EVALUATED = "not evaluated"


@dataclass(frozen=True)
class Verdict:
    """A gate's outcome with reason, in whole sentences, and figures. `blocks`: the candidate may not serve."""

    gate: str
    outcome: Outcome
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)
    blocks: bool = False

    @property
    def passed(self) -> bool:
        """True if the gate was evaluated and passed."""
        return self.outcome is Outcome.PASSED


@dataclass
class Candidate:
    """A release that is loaded in TorchServe but does not serve yet, with everything the gates need.

    `bundle` is read from the release's archive. `registered_digest` and `signature` are those of the version in MLflow.
    `champion` is the release that serves now. `progress` receives remarks and may raise to stop.
    """

    release: Release
    bundle: Bundle
    torchserve: TorchServe
    book: AnswerBook
    registered_digest: str | None = None
    signature: Signature | None = None
    champion: Release | None = None
    evaluation: EvaluationSet | None = None
    progress: Callable[[str], None] = lambda remark: None

    @cached_property
    def answers(self) -> Answers:
        """The candidate's answers to the frozen set."""
        return self._answers(self.release)

    @cached_property
    def champion_answers(self) -> Answers | None:
        """The champion's answers to the frozen set; None without a champion."""
        return self._answers(self.champion) if self.champion else None

    def _answers(self, release: Release) -> Answers:
        assert self.evaluation is not None, "only a SetGate uses answers"
        size = len(self.evaluation)
        return self.book.complete(
            self.torchserve,
            release,
            self.evaluation,
            lambda done: self.progress(f"version {release.version} has answered {done} of {size} pictures"),
        )


class Gate(ABC, BaseModel):
    """One question. Its fields are the limits that gates.yaml can set.

    `not_evaluated` decides for a gate that lacks something: `block` blocks; `first` lets only the first champion pass;
    `unfrozen` also lets all versions pass while no evaluation set is frozen; `allow` lets all pass.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ClassVar[str]
    # After a decisive gate has failed, the remaining gates are skipped.
    decisive: ClassVar[bool] = False

    not_evaluated: Literal["block", "first", "unfrozen", "allow"] = "unfrozen"

    @abstractmethod
    def evaluate(self, candidate: Candidate) -> Verdict:
        """Return the verdict. Raises TorchServeError, TorchServeUnavailable if the candidate is not at fault."""

    def verdict(self, passed: bool, reason: str, **figures: Any) -> Verdict:
        """Return `passed` or `failed`. Figures that are NaN or infinite become None, as JSON has none of these."""
        finite = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in figures.items()}
        return Verdict(self.name, Outcome.PASSED if passed else Outcome.FAILED, reason, finite)

    def skipped(self, reason: str, **figures: Any) -> Verdict:
        """Return `not evaluated`."""
        return Verdict(self.name, Outcome.NOT_EVALUATED, reason, figures)

    def blocks(self, verdict: Verdict, candidate: Candidate) -> bool:
        """Return True if a verdict keeps the candidate from serving."""
        if verdict.outcome is not Outcome.NOT_EVALUATED:
            return verdict.outcome is Outcome.FAILED
        first, unfrozen = candidate.champion is None, candidate.evaluation is None
        passes = {"allow": True, "unfrozen": first or unfrozen, "first": first, "block": False}
        return not passes[self.not_evaluated]


class SetGate(Gate):
    """A question about the answers to the frozen evaluation set."""

    def evaluate(self, candidate: Candidate) -> Verdict:
        """Return the verdict of `judge`, or `not evaluated` without a set."""
        if candidate.evaluation is None:
            return self.skipped(NO_SET)
        return self.judge(candidate, candidate.evaluation)

    @abstractmethod
    def judge(self, candidate: Candidate, evaluation: EvaluationSet) -> Verdict:
        """Return the verdict on the answers to this set. Raises as `evaluate`."""
