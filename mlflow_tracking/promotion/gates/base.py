"""What a gate is: one question about a candidate, and a verdict with a reason.

A new gate is a subclass of Gate (or of SetGate, for a question about the frozen set) with a `name`, its limits as
fields, and an answer; it joins GATES in judge.py and gets a line in gates.yaml. docs/operations.md tells more.
"""

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
from mlflow_tracking.promotion.torchserve_client import TorchServe
from mlflow_tracking.version_card import Signature

NO_SET = "no evaluation set is frozen: scripts/prepare_data.py --freeze-eval makes one"
NO_CHAMPION = "no other version answers yet to compare it with"


class Outcome(StrEnum):
    """How a question was answered."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_EVALUATED = "not evaluated"


@dataclass(frozen=True)
class Verdict:
    """What a gate found: one sentence why, and the figures behind it. `blocks`: it keeps the candidate from serving."""

    gate: str
    outcome: Outcome
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)
    blocks: bool = False

    @property
    def passed(self) -> bool:
        """Whether the gate was evaluated and is content."""
        return self.outcome is Outcome.PASSED


@dataclass
class Candidate:
    """A release that is loaded in TorchServe but may not answer yet, its bundle out of its archive, and what to hold it
    against.

    `signature` are the types of MLflow's inputs and outputs, ((name, type), …) each; `registered_digest` is the
    version's tag. `champion` is what answers now. `progress` hears how far asking is, and may raise to stop it.
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
        assert self.evaluation is not None, "the gates that need the set look for it first"
        size = len(self.evaluation)
        return self.book.complete(
            self.torchserve,
            release,
            self.evaluation,
            lambda done: self.progress(f"version {release.version} has answered {done} of {size} pictures"),
        )


class Gate(ABC, BaseModel):
    """One question. Its fields are its limits, as gates.yaml gives them.

    `not_evaluated` says what a gate does that lacks what it needs: `block`; `first`: let the very first champion pass,
    and block all others; `unfrozen`: as `first`, but let all pass while nobody has frozen an evaluation set; `allow`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: ClassVar[str]
    # With this one failed, the other questions have no meaning, and are not asked.
    decisive: ClassVar[bool] = False

    not_evaluated: Literal["block", "first", "unfrozen", "allow"] = "unfrozen"

    @abstractmethod
    def evaluate(self, candidate: Candidate) -> Verdict:
        """Raises only for what is not the candidate's fault: TorchServeUnavailable, TorchServeError."""

    def holds(self, passed: bool, reason: str, **figures: Any) -> Verdict:
        """The verdict of a question that was asked."""
        return Verdict(self.name, Outcome.PASSED if passed else Outcome.FAILED, reason, figures)

    def skips(self, reason: str, **figures: Any) -> Verdict:
        """The verdict of a question that could not be asked."""
        return Verdict(self.name, Outcome.NOT_EVALUATED, reason, figures)

    def blocks(self, verdict: Verdict, candidate: Candidate) -> bool:
        """Whether a verdict keeps the candidate from serving."""
        if verdict.outcome is not Outcome.NOT_EVALUATED:
            return verdict.outcome is Outcome.FAILED
        first, unfrozen = candidate.champion is None, candidate.evaluation is None
        passes = {"allow": True, "unfrozen": first or unfrozen, "first": first, "block": False}
        return not passes[self.not_evaluated]


class SetGate(Gate):
    """A question about the answers to the frozen evaluation set."""

    def evaluate(self, candidate: Candidate) -> Verdict:
        """`not evaluated` without a set."""
        if candidate.evaluation is None:
            return self.skips(NO_SET)
        return self.judge(candidate, candidate.evaluation)

    @abstractmethod
    def judge(self, candidate: Candidate, evaluation: EvaluationSet) -> Verdict:
        """As evaluate, with a set."""
