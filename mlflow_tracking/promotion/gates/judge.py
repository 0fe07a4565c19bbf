"""All gates over one candidate: the judgement, kept so that the same question is never asked twice.

A judgement belongs to a bundle, an evaluation set, the gates' settings, and the champion it was compared with. What was
refused costs nothing when it is asked for again, by whichever promoter; `forget` makes it be judged anew.
"""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from handlers.errors import UserError
from handlers.files import atomic_file
from mlflow_tracking.digests import short
from mlflow_tracking.promotion.comparison import compare
from mlflow_tracking.promotion.evaluation_set import EvaluationSet
from mlflow_tracking.promotion.gates.base import Candidate, Gate, Outcome, Verdict
from mlflow_tracking.promotion.gates.behaviour import LatencyBudget, StressFlips
from mlflow_tracking.promotion.gates.identity import (
    DigestAndSignature,
    GoldenParity,
    LeakageReceipt,
    PreprocessingFingerprint,
)
from mlflow_tracking.promotion.gates.quality import (
    BalancedAccuracy,
    CalibrationError,
    MalignantCalls,
    MelanomaSensitivity,
    UnknownDetection,
)
from mlflow_tracking.promotion.plan import Release
from mlflow_tracking.registry import RegisteredVersion

SCHEMA = 1
# In the order in which they are asked: what costs least, and what all others rest upon, comes first.
GATES: tuple[type[Gate], ...] = (
    DigestAndSignature,
    GoldenParity,
    PreprocessingFingerprint,
    LeakageReceipt,
    LatencyBudget,
    BalancedAccuracy,
    MelanomaSensitivity,
    CalibrationError,
    UnknownDetection,
    MalignantCalls,
    StressFlips,
)


class GateSettingsError(UserError):
    """A gates.yaml that cannot be used; a sentence."""


@dataclass(frozen=True)
class Question:
    """What a judgement answers: these four digests; None for no set, and for no champion."""

    bundle: str
    evaluation_set: str | None
    settings: str
    champion: str | None


@dataclass(frozen=True)
class Judgement:
    """All verdicts on a bundle. `forced` is {by, reason} where a person overruled them; `comparison` holds the
    candidate against the champion on the frozen set (promotion.replay)."""

    question: Question
    version: str
    verdicts: tuple[Verdict, ...]
    at: str
    seconds: float
    forced: dict[str, str] | None = None
    comparison: dict[str, Any] | None = None

    @property
    def blocking(self) -> tuple[Verdict, ...]:
        """The verdicts against it."""
        return tuple(verdict for verdict in self.verdicts if verdict.blocks)

    @property
    def passed(self) -> bool:
        """Whether it may serve."""
        return not self.blocking or self.forced is not None

    @property
    def word(self) -> str:
        """The outcome in one word."""
        return "forced" if self.forced else "refused" if self.blocking else "passed"

    @property
    def reason(self) -> str:
        """Why it was refused, or what was left open, in a sentence without its stop."""
        told = self.blocking or tuple(one for one in self.verdicts if one.outcome is Outcome.NOT_EVALUATED)
        # Several gates lack the same thing.
        gates: dict[str, list[str]] = {}
        for verdict in told:
            open_ = verdict.outcome is Outcome.NOT_EVALUATED
            gates.setdefault(f"{'not evaluated: ' if open_ else ''}{verdict.reason}", []).append(verdict.gate)
        return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in gates.items())

    @property
    def id(self) -> str:
        """A short name for this very judgement."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as kept and as in the report."""
        return {"schema": SCHEMA, "outcome": self.word, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Judgement":
        """The inverse of to_dict. Raises KeyError, TypeError or ValueError for something else."""
        if values.pop("schema") != SCHEMA:
            raise ValueError("another schema")
        del values["outcome"]
        verdicts = tuple(Verdict(**{**one, "outcome": Outcome(one["outcome"])}) for one in values.pop("verdicts"))
        return cls(question=Question(**values.pop("question")), verdicts=verdicts, **values)


class Judge:
    """Asks the gates and keeps judgements in a folder, one file for each question."""

    def __init__(self, gates: Sequence[Gate], folder: Path) -> None:
        self.gates = gates
        self.folder = folder
        values = [{"gate": gate.name, **gate.model_dump()} for gate in gates]
        self.settings = "sha256:" + hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def question(
        self, release: Release, evaluation: EvaluationSet | RegisteredVersion | None, champion: Release | None
    ) -> Question:
        """What would be asked about a release now: of the set only the digest matters."""
        evaluation_set = None if evaluation is None else evaluation.digest
        return Question(release.digest, evaluation_set, self.settings, None if champion is None else champion.digest)

    def judge(self, candidate: Candidate) -> Judgement:
        """Ask all gates; after a decisive one has failed the others are not asked. Keeps nothing.

        Raises:
            TorchServeError, TorchServeUnavailable, EvaluationSetError, OSError: what is not the candidate's fault.
        """
        began = time.monotonic()
        verdicts: list[Verdict] = []
        decided: str | None = None
        for gate in self.gates:
            if decided:
                verdict = gate.skips(f"not asked, since {decided} failed")
                verdicts.append(verdict)
                continue
            candidate.progress(gate.name)
            verdict = gate.evaluate(candidate)
            verdicts.append(replace(verdict, blocks=gate.blocks(verdict, candidate)))
            if gate.decisive and verdict.outcome is Outcome.FAILED:
                decided = gate.name
        comparison = None
        if candidate.evaluation and candidate.champion and not decided:
            ours, theirs = candidate.answers, candidate.champion_answers
            assert theirs is not None, "there is a champion"
            comparison = compare(candidate.evaluation, theirs, ours)
            comparison |= {"champion_version": candidate.champion.version, "version": candidate.release.version}
        return Judgement(
            self.question(candidate.release, candidate.evaluation, candidate.champion),
            candidate.release.version,
            tuple(verdicts),
            datetime.now(UTC).isoformat(timespec="seconds"),
            round(time.monotonic() - began, 1),
            comparison=comparison,
        )

    def may_force(self, judgement: Judgement) -> bool:
        """Whether a person may overrule it: not where the candidate is not what was registered."""
        return all(verdict.gate != DigestAndSignature.name for verdict in judgement.blocking)

    def keep(self, judgement: Judgement) -> None:
        """Keep a judgement in place of an older one on the same question, as the one that counts now."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._path(judgement.question)) as file:
            file.write(json.dumps(judgement.to_dict(), indent=1).encode() + b"\n")

    def kept(self, question: Question) -> Judgement | None:
        """The judgement that answers a question, if it was asked before."""
        found = _read(self._path(question))
        return found if found and found.question == question else None

    def newest(self, bundle: str) -> Judgement | None:
        """The judgement on a bundle that counted last."""
        paths = self.folder.glob(f"{short(bundle)}-*.json")
        newest = max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)
        found = _read(newest) if newest else None
        return found if found and found.question.bundle == bundle else None

    def forget(self, bundle: str) -> None:
        """Have a bundle judged anew. Its answers stay: AnswerBook.forget."""
        for path in self.folder.glob(f"{short(bundle)}-*.json"):
            path.unlink(missing_ok=True)

    def _path(self, question: Question) -> Path:
        key = hashlib.sha256(json.dumps(asdict(question), sort_keys=True).encode()).hexdigest()
        return self.folder / f"{short(question.bundle)}-{key[:12]}.json"


def load_gates(path: Path) -> tuple[Gate, ...]:
    """The gates that a YAML file names, with its limits, in the order of GATES. Raises GateSettingsError."""
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise GateSettingsError(f"The gates' settings {path} cannot be read: {error}") from error
    known = {gate.name: gate for gate in GATES}
    if not isinstance(values, dict) or (unknown := set(values) - set(known)):
        what = ", ".join(map(str, sorted(unknown))) if isinstance(values, dict) else "something else than gates"
        raise GateSettingsError(f"{path} names {what}; the gates are {', '.join(known)}.")
    gates = []
    for name, gate in known.items():
        if name in values:
            try:
                gates.append(gate.model_validate(values[name] or {}))
            except ValidationError as error:
                first = error.errors()[0]
                limit = ".".join(map(str, first["loc"])) or "its limits"
                raise GateSettingsError(f"{path}: {name}: {limit}: {first['msg']}.") from error
    return tuple(gates)


def _read(path: Path) -> Judgement | None:
    try:
        return Judgement.from_dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # none, or one that an older version wrote
