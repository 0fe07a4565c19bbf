"""The judge: asks all gates about one candidate, and keeps the judgement.

A judgement answers one question: this bundle, this evaluation set, these gate settings, this champion. The same
question is never put twice, whichever promoter asks, unless `forget` deletes the judgement.
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
from pydantic import TypeAdapter, ValidationError

from handlers.errors import UserError
from handlers.files import write_json
from mlflow_tracking.digests import short
from mlflow_tracking.promotion.champion_comparison import compare
from mlflow_tracking.promotion.evaluation_set import EvaluationSet
from mlflow_tracking.promotion.gates.base import Candidate, Gate, Outcome, Verdict
from mlflow_tracking.promotion.gates.cost import LatencyGate
from mlflow_tracking.promotion.gates.identity import (
    GoldenParityGate,
    LeakageGate,
    PreprocessingGate,
    RegistrationGate,
)
from mlflow_tracking.promotion.gates.quality import (
    AlarmGate,
    BalancedAccuracyGate,
    CalibrationGate,
    MalignantCallsGate,
    MelanomaSensitivityGate,
    UnknownDetectionGate,
)
from mlflow_tracking.promotion.gates.robustness import StressGate
from mlflow_tracking.promotion.plan import Release
from mlflow_tracking.registry import RegisteredVersion

# In the order of evaluation: decisive and cheap gates first.
GATES: tuple[type[Gate], ...] = (
    RegistrationGate,
    GoldenParityGate,
    PreprocessingGate,
    LeakageGate,
    LatencyGate,
    BalancedAccuracyGate,
    MelanomaSensitivityGate,
    AlarmGate,
    CalibrationGate,
    UnknownDetectionGate,
    MalignantCallsGate,
    StressGate,
)


class GateSettingsError(UserError):
    """A gates.yaml that cannot be used."""


@dataclass(frozen=True)
class Question:
    """The four digests that a judgement depends on; None for no evaluation set and for no champion."""

    bundle: str
    evaluation_set: str | None
    settings: str
    champion: str | None


@dataclass(frozen=True)
class Judgement:
    """All verdicts on a bundle.

    `forced` is {by, reason} if a person overruled them. `comparison` compares the candidate with the champion on the
    frozen set (promotion.champion_comparison).
    """

    question: Question
    version: str
    verdicts: tuple[Verdict, ...]
    at: str
    seconds: float
    forced: dict[str, str] | None = None
    comparison: dict[str, Any] | None = None

    @property
    def blocking(self) -> tuple[Verdict, ...]:
        """The verdicts that keep the candidate from serving."""
        return tuple(verdict for verdict in self.verdicts if verdict.blocks)

    @property
    def passed(self) -> bool:
        """True if the candidate may serve."""
        return not self.blocking or self.forced is not None

    @property
    def outcome(self) -> str:
        """`passed`, `refused` or `forced`."""
        if self.forced:
            return "forced"
        return "refused" if self.blocking else "passed"

    @property
    def reason(self) -> str:
        """The reasons of the blocking verdicts, or else of those that were not evaluated, each after its gates."""
        gates: dict[str, list[str]] = {}  # several gates may give the same reason
        for verdict in self.blocking or self.verdicts:
            if verdict.outcome is Outcome.NOT_EVALUATED:
                gates.setdefault(f"not evaluated. {verdict.reason}", []).append(verdict.gate)
            elif verdict.outcome is Outcome.FAILED:
                gates.setdefault(verdict.reason, []).append(verdict.gate)
        return " ".join(f"{', '.join(names)}: {reason}" for reason, names in gates.items())

    @property
    def id(self) -> str:
        """A short hash of this judgement."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, as kept and as in the report."""
        return {"outcome": self.outcome, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Judgement":
        """Invert to_dict. Raises ValueError for anything else."""
        return TypeAdapter(cls).validate_python(values)


class Judge:
    """The gates, and a folder that keeps one file for each question."""

    def __init__(self, gates: Sequence[Gate], folder: Path) -> None:
        self.gates = gates
        self.folder = folder
        values = [{"gate": gate.name, **gate.model_dump()} for gate in gates]
        self.settings = "sha256:" + hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    def question(
        self, release: Release, evaluation: EvaluationSet | RegisteredVersion | None, champion: Release | None
    ) -> Question:
        """Return the question about a release; of the evaluation set only the digest is used."""
        evaluation_set = None if evaluation is None else evaluation.digest
        return Question(release.digest, evaluation_set, self.settings, None if champion is None else champion.digest)

    def judge(self, candidate: Candidate) -> Judgement:
        """Ask all gates, up to a decisive one that fails; the judgement is not kept.

        Raises TorchServeError, TorchServeUnavailable, EvaluationSetError or OSError if the candidate is not at fault.
        """
        began = time.monotonic()
        verdicts: list[Verdict] = []
        failed = ""  # the decisive gate that failed
        for gate in self.gates:
            if failed:
                verdicts.append(gate.skipped(f"Skipped because {failed} failed."))
                continue
            candidate.progress(gate.name)
            verdict = gate.evaluate(candidate)
            verdicts.append(replace(verdict, blocks=gate.blocks(verdict, candidate)))
            if gate.decisive and verdict.outcome is Outcome.FAILED:
                failed = gate.name
        comparison = None
        if not failed and candidate.evaluation and candidate.champion and candidate.champion_answers:
            comparison = compare(candidate.evaluation, candidate.champion_answers, candidate.answers)
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
        """Return True if a person may overrule the judgement: the candidate is the registered model."""
        return all(verdict.gate != RegistrationGate.name for verdict in judgement.blocking)

    def keep(self, judgement: Judgement) -> None:
        """Keep a judgement as the newest, in place of an older one on the same question."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self._path(judgement.question), judgement.to_dict())

    def kept(self, question: Question) -> Judgement | None:
        """Return the judgement that answers a question, or None."""
        judgement = _read(self._path(question))
        return judgement if judgement and judgement.question == question else None

    def newest(self, bundle: str) -> Judgement | None:
        """Return the newest judgement on a bundle, or None."""
        paths = self.folder.glob(f"{short(bundle)}-*.json")
        path = max(paths, key=lambda path: path.stat().st_mtime_ns, default=None)
        judgement = _read(path) if path else None
        return judgement if judgement and judgement.question.bundle == bundle else None

    def forget(self, bundle: str) -> None:
        """Delete the judgements on a bundle. AnswerBook.forget deletes its answers."""
        for path in self.folder.glob(f"{short(bundle)}-*.json"):
            path.unlink(missing_ok=True)

    def _path(self, question: Question) -> Path:
        key = hashlib.sha256(json.dumps(asdict(question), sort_keys=True).encode()).hexdigest()
        return self.folder / f"{short(question.bundle)}-{key[:12]}.json"


def load_gates(path: Path) -> tuple[Gate, ...]:
    """Return the gates that a YAML file names, with its limits, in the order of GATES. Raises GateSettingsError."""
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        raise GateSettingsError(f"The gate settings {path} cannot be read ({error}).") from error
    names = [gate.name for gate in GATES]
    if not isinstance(values, dict):
        raise GateSettingsError(f"{path} is not a table of gates. The gates are {', '.join(names)}.")
    if unknown := sorted(str(name) for name in set(values) - set(names)):
        raise GateSettingsError(f"{path} names {', '.join(unknown)}, but the gates are {', '.join(names)}.")
    gates = []
    for gate in GATES:
        if gate.name in values:
            try:
                gates.append(gate.model_validate(values[gate.name] or {}))
            except ValidationError as error:
                first = error.errors()[0]
                limit = ".".join(map(str, (gate.name, *first["loc"])))
                raise GateSettingsError(f"{path} has a wrong value for {limit}: {first['msg']}.") from error
    return tuple(gates)


def _read(path: Path) -> Judgement | None:
    try:
        return Judgement.from_dict(json.loads(path.read_bytes()))
    except (OSError, ValueError):
        return None  # missing, or written by another version
