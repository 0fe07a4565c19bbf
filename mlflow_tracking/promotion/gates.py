"""What a release must show before it serves. One small class a gate; all of them say yes, or it does not serve.

A new gate is a class with a `name` and an `evaluate`, added to GATES.
"""

from dataclasses import dataclass, field
from typing import Any, Protocol

from handlers.bundle import Bundle
from mlflow_tracking.promotion.plan import Release
from mlflow_tracking.promotion.torchserve_client import TorchServe, TorchServeError


@dataclass(frozen=True)
class Candidate:
    """A release that is loaded in TorchServe but may not answer yet, and its bundle out of its archive."""

    release: Release
    bundle: Bundle
    torchserve: TorchServe


@dataclass(frozen=True)
class Verdict:
    """What a gate found: passed or not, one sentence why, and the figures behind it."""

    gate: str
    passed: bool
    reason: str
    figures: dict[str, Any] = field(default_factory=dict)


class Gate(Protocol):
    """A condition on a candidate."""

    name: str

    def evaluate(self, candidate: Candidate) -> Verdict:
        """Raises only for what is not the candidate's fault: TorchServeUnavailable."""
        ...


class GoldenParity:
    """The served model gives the bundle's own answers, over REST.

    This proves the whole way at once: archive, handler, preprocessing, graph, calibration. Probabilities may differ by
    1e-3 where TorchServe computes in f32, by 1e-2 in a lower precision (the answer says which).
    """

    name = "golden parity"

    def evaluate(self, candidate: Candidate) -> Verdict:
        release, worst, precision = candidate.release, 0.0, ""
        cases = candidate.bundle.golden()
        if not cases:
            return Verdict(self.name, False, "the bundle has no golden images")
        for case in cases:
            try:
                answer = candidate.torchserve.predict(case.image, release.version)
            except TorchServeError as error:
                return Verdict(self.name, False, f"{case.name} got no answer: {error}")
            model = answer["model"]
            if model["digest"] != release.digest:
                return Verdict(self.name, False, f"another model answered: {model['digest']}")
            precision = model.get("precision", "f32")
            tolerance = 1e-3 if precision == "f32" else 1e-2
            difference = max(abs(answer["probabilities"][code] - p) for code, p in case.probabilities.items())
            worst = max(worst, difference)
            if not difference <= tolerance:  # nor when it is no number
                reason = (
                    f"{case.name}: a probability is off by {difference:.2g}; {precision} may differ by {tolerance:g}"
                )
                return Verdict(self.name, False, reason, {"max_difference": difference, "precision": precision})
        reason = f"probabilities differ by at most {worst:.1e} in {precision}"
        return Verdict(self.name, True, reason, {"max_difference": worst, "precision": precision})


GATES: tuple[Gate, ...] = (GoldenParity(),)
