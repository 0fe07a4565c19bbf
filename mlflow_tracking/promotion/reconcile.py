"""The reconcile pass: read desired and actual state, plan, execute, remember failures, report to the registry."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Literal

from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion import model_archive
from mlflow_tracking.promotion.audit import AuditEvents, AuditLog
from mlflow_tracking.promotion.backoff import Backoff
from mlflow_tracking.promotion.execute import Executor
from mlflow_tracking.promotion.gates.judge import load_gates
from mlflow_tracking.promotion.ledger import Ledger
from mlflow_tracking.promotion.locks import lock
from mlflow_tracking.promotion.observe import AliasWatch, desired_state, release_of
from mlflow_tracking.promotion.plan import Action, Actual, Desired, NotYet, Refused, Release, Step, StepFailed, plan
from mlflow_tracking.promotion.registry_outbox import Outbox
from mlflow_tracking.promotion.rolling_update import SharedReplicas
from mlflow_tracking.registry import RegisteredVersion, Registry, RegistryError, RegistryUnavailable
from mlflow_tracking.stack_settings import Settings
from mlflow_tracking.torchserve_client import TorchServe, TorchServeError, TorchServeUnavailable

# How a step may end; Executor.run raises nothing else.
STEP_ERRORS = (NotYet, Refused, StepFailed, RegistryError, RegistryUnavailable, TorchServeUnavailable)
WAITING_SECONDS = 0.5  # between two passes while a step waits, such as for another replica
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
    replicas: SharedReplicas
    listener: Callable[[Event], None]
    overruled: Mapping[str, dict[str, str]]

    def execute(
        self, steps: Sequence[Step], actual: Actual, watch: AliasWatch, done: list[Step], errors: list[str]
    ) -> bool:
        """Run steps until one fails, and add them to `done` and `errors`; return whether a step needs another pass.

        `actual` is the state before the steps.
        """
        for step in steps:
            try:
                self.replicas.await_turn(step, actual, self.executor.check.is_judged_elsewhere)
                self._run(step, watch)
            except STEP_ERRORS as error:
                errors.append(str(error))
                return isinstance(error, NotYet)
            done.append(step)
        for step in steps:
            if step.action is not Action.RETIRE:
                self.backoff.setbacks.pop(step.release, None)
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
            with suppress(RegistryUnavailable):  # the next pass reports it
                self.replicas.beat()
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


@dataclass(frozen=True)
class Pass:
    """The result of one pass. `waiting` means that a step needs another pass, such as for a worker that is starting."""

    desired: Desired
    actual: Actual | None
    done: tuple[Step, ...] = ()
    errors: tuple[str, ...] = ()
    registry_up: bool = True
    torchserve_up: bool = True
    waiting: bool = False

    @property
    def settled(self) -> bool:
        """Whether the actual state was the desired state already."""
        return not self.done and not self.errors


class Reconciler:
    """Makes TorchServe agree with the registry, one pass at a time.

    `keep_archives` unneeded archives stay in the store. `listener` receives the events of every step. `by` acts, for
    the audit log. The versions in `overruled`, each with a reason, serve although the gates refuse them. `replicas`
    are those that share the registry.
    """

    def __init__(
        self,
        registry: Registry,
        executor: Executor,
        keep_archives: int,
        listener: Callable[[Event], None] = lambda event: None,
        by: str = "promoter",
        overruled: Mapping[str, str] | None = None,
        replicas: SharedReplicas | None = None,
    ) -> None:
        self.registry = registry
        self.executor = executor
        self.store = executor.store
        self.by = by
        self.audit = AuditLog(self.store)
        self.backoff = Backoff()
        self._keep_archives = keep_archives
        self._overruled = {version: {"by": by, "reason": reason} for version, reason in (overruled or {}).items()}
        self._events = AuditEvents(self.audit, by)
        self.replicas = replicas or SharedReplicas(registry)
        self._outbox = Outbox(registry, executor.judge, executor.shared, self.audit, self.replicas.name)
        self._runner = StepRunner(
            executor, self.backoff, self._events, self._outbox, self.replicas, listener, self._overruled
        )

    def forget(self, version: str) -> None:
        """Discard the judgements and answers of a version. Raises RegistryUnavailable."""
        if (registered := self.registry.version(version)) and registered.digest:
            self.executor.check.forget(registered.digest)

    def close(self) -> None:
        """Close the connections to TorchServe."""
        self.executor.torchserve.close()

    def reconcile(self, wait: float = 0.0) -> Pass:
        """Run one pass under the store's lock. Raises StoreBusy after `wait` seconds, StoreUnwritable."""
        with lock(self.store, wait):
            return self.reconcile_locked()

    def reconcile_locked(self) -> Pass:
        """Run one pass; the caller holds the store's lock. Errors of the pass are in its result."""
        try:
            return self._pass()
        except ConnectionError:
            raise
        except OSError as error:  # a full disk, or a folder of another user
            sentence = f"The model store {self.store} cannot be kept: {error}."
            return Pass(Desired(registry_up=False), None, errors=(sentence,))

    def _pass(self) -> Pass:
        model_archive.clean(self.store)
        errors = self._repair_ledger()
        desired, versions = self._read_desired(errors)
        actual = self._observe(desired, errors)
        done: list[Step] = []
        waiting = False
        if actual is not None:
            self._prepare(desired, actual)
            desired = replace(desired, blocked=self.backoff.blocked())
            if steps := plan(desired, actual):
                waiting = self._runner.execute(steps, actual, AliasWatch(self.registry, desired), done, errors)
                actual = self._observe(desired, errors)
        if actual is not None and desired.registry_up:
            for archive in self.executor.prune(actual, desired.releases, self._keep_archives):
                self._events.pruned(archive)
        registry_up = desired.registry_up and self._report(versions, desired, actual, errors)
        for release in desired.releases:
            setback = self.backoff.setbacks.get(release)
            if setback and setback.reason not in errors:
                errors.append(setback.reason)
        return Pass(desired, actual, tuple(done), tuple(errors), registry_up, actual is not None, waiting)

    def _repair_ledger(self) -> list[str]:
        """Set a damaged ledger aside; return the errors of the pass so far."""
        try:
            ledgers.read(self.store)
        except ledgers.LedgerError as error:
            ledgers.set_aside(self.store)
            return [f"{error} It was renamed, and a new one is written from the registry."]
        return []

    def _read_desired(self, errors: list[str]) -> tuple[Desired, dict[str, RegisteredVersion | None]]:
        try:
            desired, versions = desired_state(self.registry)
            self.replicas.read()
        except RegistryUnavailable as error:
            errors.append(str(error))
            return Desired(registry_up=False), {}
        for version in filter(None, versions.values()):
            if release_of(version) is None:
                errors.append(
                    f"Version {version.version} has no valid digest tag. Register bundles with "
                    "scripts/register_model.py."
                )
                if version.tags.get("serving.status") != "refused":
                    self._outbox.put(Release(version.version, version.digest or ""), "refused", errors[-1])
        self._events.aliases(versions)
        return desired, versions

    def _observe(self, desired: Desired, errors: list[str]) -> Actual | None:
        try:
            return self.executor.observe(desired.releases)
        except (TorchServeUnavailable, TorchServeError) as error:
            errors.append(str(error))
            return None

    def _prepare(self, desired: Desired, actual: Actual) -> None:
        """Bring audit log, ledger and setbacks up to date before the plan."""
        self._events.serving(actual)
        if desired.champion and desired.champion == actual.serving and desired.champion in actual.withdrawn:
            ledger = ledgers.read(self.store)  # a person rolled back, and then moved the alias back
            ledgers.write(self.store, ledger.reinstated(desired.champion.archive))
        self.backoff.refresh(desired, actual)
        for release in desired.releases:
            if release in self.backoff.setbacks or release.version in self._overruled:
                continue
            if release in (actual.serving, actual.last_good):
                continue
            if release in actual.approved and release != desired.champion:
                continue
            with suppress(RegistryUnavailable):  # the next pass looks again
                if refusal := self.executor.check.earlier_refusal(release, actual):
                    self._runner.set_back(release, refusal)

    def _report(
        self,
        versions: Mapping[str, RegisteredVersion | None],
        desired: Desired,
        actual: Actual | None,
        errors: list[str],
    ) -> bool:
        """Write statuses, judgements and this replica's state into the registry; return whether it answered."""
        with_alias = [version for version in versions.values() if version]
        if actual:
            self._outbox.correct(with_alias, actual)
        try:
            errors += self._outbox.send(with_alias)
            self.replicas.publish(actual, desired.champion)  # last: the others then find the judgement
        except RegistryUnavailable as error:
            errors.append(str(error))
            return False
        return True


def create_reconciler(
    settings: Settings,
    listener: Callable[[Event], None] = lambda event: None,
    by: str = "promoter",
    overruled: Mapping[str, str] | None = None,
) -> Reconciler:
    """Return a reconciler for the services of the settings; it connects to nothing yet. Raises GateSettingsError."""
    registry = Registry(settings.registry_uri)
    torchserve = TorchServe(settings.inference_url, settings.management)
    gates = load_gates(settings.gates)
    key = settings.promoter_key
    executor = Executor(settings.store, registry, torchserve, gates, settings.evaluation_cache, key)
    replicas = SharedReplicas(registry, settings.promoter_replica, settings.inference_url)
    return Reconciler(registry, executor, settings.promoter_keep_archives, listener, by, overruled, replicas)
