"""Run the steps of a plan in order, and record how each ends: events, audit log, back-off, status in the registry."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion.audit import AuditEvents
from mlflow_tracking.promotion.backoff import Backoff
from mlflow_tracking.promotion.execute import Executor
from mlflow_tracking.promotion.ledger import Ledger
from mlflow_tracking.promotion.observe import AliasWatch
from mlflow_tracking.promotion.outbox import Outbox
from mlflow_tracking.promotion.plan import Action, NotYet, Refused, Release, Step, StepFailed
from mlflow_tracking.promotion.torchserve_client import TorchServeUnavailable
from mlflow_tracking.registry import RegistryError, RegistryUnavailable

# How a step may end; Executor.run raises nothing else.
STEP_ERRORS = (NotYet, Refused, StepFailed, RegistryError, RegistryUnavailable, TorchServeUnavailable)
State = Literal["begun", "running", "done", "waiting", "refused", "failed"]


@dataclass(frozen=True)
class Event:
    """The progress of a step; `remark` says more."""

    step: Step
    state: State
    seconds: float = 0.0
    remark: str = ""


@dataclass
class StepRunner:
    """Runs steps. `listener` receives their events; `overruled` holds {by, reason} for versions by number."""

    executor: Executor
    backoff: Backoff
    events: AuditEvents
    outbox: Outbox
    listener: Callable[[Event], None]
    overruled: Mapping[str, dict[str, str]]

    def execute(self, steps: Sequence[Step], watch: AliasWatch, done: list[Step], errors: list[str]) -> bool:
        """Run steps until one fails, and add them to `done` and `errors`; return whether a step needs another pass."""
        for step in steps:
            try:
                self._run(step, watch)
            except STEP_ERRORS as error:
                errors.append(str(error))
                return isinstance(error, NotYet)
            done.append(step)
        for step in steps:
            if step.action is not Action.RETIRE:
                self.backoff.clear(step.release)
        return False

    def set_back(self, release: Release, error: Exception) -> bool:
        """Record a refusal or a failure for back-off and registry; return whether its reason is new."""
        final = isinstance(error, Refused)
        self.outbox.put(release, "refused" if final else "failed", str(error))
        approved = release.archive in ledgers.read(self.executor.store).loaded
        return self.backoff.add(release, str(error), final=final, approved=approved)

    def _run(self, step: Step, watch: AliasWatch) -> None:
        """Run one step. Raises as Executor.run."""
        began = time.monotonic()

        def emit(state: State, remark: str = "") -> None:
            self.listener(Event(step, state, time.monotonic() - began, remark))

        def progress(remark: str) -> None:
            emit("running", remark)
            watch.check(step)

        emit("begun")
        before = ledgers.read(self.executor.store)
        try:
            remark = self.executor.run(step, progress, self.overruled.get(step.release.version))
        except STEP_ERRORS as error:
            state: State = "failed"
            if isinstance(error, Refused | NotYet):
                state = "refused" if isinstance(error, Refused) else "waiting"
            emit(state, str(error))
            if state != "waiting" and self.set_back(step.release, error):
                self.events.step(f"{step.action} {state}", step.release, str(error))
            raise
        emit("done", remark)
        self.events.step(str(step.action), step.release, remark)
        self._announce(step, before)

    def _announce(self, step: Step, before: Ledger) -> None:
        """Put the new status of the step's release, and of the release that served before, into the outbox."""
        served = before.release(before.default)
        if step.action is Action.SERVE:
            if served is not None and served != step.release:
                self.outbox.put(served, "standby")
            self.outbox.put(step.release, "serving")
        elif step.action is Action.RETIRE and step.release not in self.backoff.setbacks:  # a setback has its reason
            withdrawn = step.release.archive in before.withdrawn
            self.outbox.put(step.release, "rolled back" if withdrawn else "retired")
