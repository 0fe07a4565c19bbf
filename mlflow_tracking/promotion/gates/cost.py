"""Gates of what a version costs to serve: its latency."""

from typing import ClassVar

import numpy as np
from pydantic import Field

from mlflow_tracking.promotion.answers import ask
from mlflow_tracking.promotion.gates.base import Candidate, Gate, Verdict


class LatencyGate(Gate):
    """The 95th percentile of latency over REST, one request at a time on this machine, is within the budget."""

    name: ClassVar[str] = "latency"

    p95_milliseconds: float = Field(1000.0, gt=0)
    requests: int = Field(30, ge=5)

    def evaluate(self, candidate: Candidate) -> Verdict:
        """Send the golden pictures in turn."""
        cases = candidate.bundle.golden()
        images = [cases[number % len(cases)].image for number in range(self.requests)]
        candidate.progress(f"version {candidate.release.version} is timed")
        times = ask(candidate.torchserve, candidate.release, images, parallel=1).milliseconds
        p50, p95 = np.percentile(times, [50, 95]).tolist()
        reason = f"95 % of the answers took at most {p95:.0f} ms; the budget is {self.p95_milliseconds:g} ms."
        return self.verdict(p95 <= self.p95_milliseconds, reason, p50=p50, p95=p95, budget=self.p95_milliseconds)
