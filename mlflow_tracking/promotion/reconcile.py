"""One pass: see what is wanted and what is there, plan, do the steps, remember what was refused, tell the registry."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from mlflow_tracking.digests import DIGEST
from mlflow_tracking.promotion import archive as archives
from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion.audit import AuditLog
from mlflow_tracking.promotion.execute import Executor, NotYet, Refused, StepFailed
from mlflow_tracking.promotion.gates.judge import load_gates
from mlflow_tracking.promotion.outbox import Outbox
from mlflow_tracking.promotion.plan import Action, Actual, Desired, Release, Step, plan
from mlflow_tracking.promotion.torchserve_client import TorchServe, TorchServeError, TorchServeUnavailable
from mlflow_tracking.registry import ALIASES, RegisteredVersion, Registry, RegistryError, RegistryUnavailable
from mlflow_tracking.settings import Settings

# A failure is tried again at the next pass, then after 4, 8, 16 ... seconds up to this.
LONGEST_WAIT = 300.0


@dataclass(frozen=True)
class Event:
    """A step that began, goes on, is done, waits, was refused or failed; `remark` says more."""

    step: Step
    state: Literal["begun", "running", "done", "waiting", "refused", "failed"]
    seconds: float = 0.0
    remark: str = ""


@dataclass
class Setback:
    """Why a release is not tried now: for good, or until `retry_at` (monotonic seconds)."""

    reason: str
    final: bool
    attempts: int = 1
    retry_at: float = 0.0
    approved: bool = False  # although it had passed its gates


@dataclass(frozen=True)
class Pass:
    """What one pass found and did. `errors` are sentences; without any, and without steps, all is as wanted.

    `waiting` means that a worker is starting, and another pass will tell.
    """

    desired: Desired
    actual: Actual | None
    done: tuple[Step, ...] = ()
    errors: tuple[str, ...] = ()
    registry_up: bool = True
    torchserve_up: bool = True
    waiting: bool = False

    @property
    def settled(self) -> bool:
        """Whether nothing was to be done."""
        return not self.done and not self.errors


@dataclass
class Reconciler:
    """Makes TorchServe agree with the registry, one pass at a time.

    `tell` hears of every step as it begins, goes on and ends; `by` is who acts, for the audit log;
    `overruled` holds the versions that serve despite a refusal by the gates, each with the reason.
    """

    settings: Settings
    registry: Registry
    executor: Executor
    tell: Callable[[Event], None] = lambda event: None
    by: str = "promoter"
    overruled: Mapping[str, str] = field(default_factory=dict)
    setbacks: dict[Release, Setback] = field(default_factory=dict)
    _asked: tuple[Release, ...] = ()
    _looked: float = 0.0

    def __post_init__(self) -> None:
        self.audit = AuditLog(self.settings.store)
        self.outbox = Outbox(self.registry, self.executor.judge, self.audit)

    @classmethod
    def create(
        cls,
        settings: Settings,
        tell: Callable[[Event], None] = lambda event: None,
        by: str = "promoter",
        overruled: Mapping[str, str] | None = None,
    ) -> "Reconciler":
        """With clients for the services of `settings`; connects to nothing yet. Raises GateSettingsError."""
        registry = Registry(settings.registry_uri)
        torchserve = TorchServe(settings.inference_url, settings.management)
        gates = load_gates(settings.gates)
        executor = Executor(settings.store, registry, torchserve, gates, settings.evaluation_cache)
        return cls(settings, registry, executor, tell, by, overruled or {})

    @property
    def store(self) -> Path:
        """The model store."""
        return self.settings.store

    def forget(self, version: str) -> None:
        """Have a version judged anew. Raises RegistryUnavailable."""
        if (registered := self.registry.version(version)) and registered.digest:
            self.executor.forget(registered.digest)

    def close(self) -> None:
        """Close the connections to TorchServe."""
        self.executor.torchserve.close()

    def reconcile(self, wait: float = 0.0) -> Pass:
        """One pass, alone on the store. Raises StoreBusy after `wait` seconds."""
        with ledgers.lock(self.settings.store, wait):
            return self.reconcile_locked()

    def reconcile_locked(self) -> Pass:
        """One pass; the caller holds the store's lock. What goes wrong is in the result's errors."""
        try:
            return self._pass()
        except ConnectionError:
            raise
        except OSError as error:  # a full disk, or a folder that is not ours
            sentence = f"The model store {self.settings.store} cannot be kept: {error}."
            return Pass(Desired(known=False), None, errors=(sentence,))

    def _pass(self) -> Pass:
        archives.clean(self.settings.store)
        errors: list[str] = []
        done: list[Step] = []
        waiting = False
        try:
            ledgers.read(self.settings.store)
        except ledgers.LedgerError as error:
            errors.append(f"{error} It was set aside, and is made anew.")
            ledgers.set_aside(self.settings.store)
        desired, aliases = self._desired(errors)
        asked = [release for release in (desired.champion, desired.challenger) if release]
        self._asked = tuple(asked)
        if desired.known:
            self._record_aliases(aliases)
        actual = self._observe(asked, errors)
        if actual is not None:
            self._record_serving(actual)
            if (again := desired.champion) and again == actual.serving and again in actual.withdrawn:
                self.executor.reinstate(again)
            self._forget(desired, actual)
            self._recall(desired, actual)
            desired = replace(desired, blocked=self._blocked())
            steps = plan(desired, actual)
            try:
                for step in steps:
                    self._do(step)
                    done.append(step)
                for step in steps:
                    if step.action is not Action.RETIRE:
                        self.setbacks.pop(step.release, None)
            except NotYet as error:
                errors.append(str(error))
                waiting = True
            except _Stopped as error:
                errors.append(str(error))
            if steps:
                actual = self._observe(asked, errors)
        if actual is not None and desired.known:
            for name in self.executor.prune(actual, asked, self.settings.promoter_keep_archives):
                self.audit.append("prune", self.by, archive=name)
        registry_up = desired.known and self._send(aliases, actual, errors)
        for release in asked:
            if release in self.setbacks and self.setbacks[release].reason not in errors:
                errors.append(self.setbacks[release].reason)
        return Pass(desired, actual, tuple(done), tuple(errors), registry_up, actual is not None, waiting)

    def _observe(self, asked: list[Release], errors: list[str]) -> Actual | None:
        try:
            return self.executor.observe(asked)
        except (TorchServeUnavailable, TorchServeError) as error:
            errors.append(str(error))
            return None

    def _desired(self, errors: list[str]) -> tuple[Desired, dict[str, RegisteredVersion | None]]:
        try:
            versions = {alias: self.registry.resolve(alias) for alias in ALIASES}
        except RegistryUnavailable as error:
            errors.append(str(error))
            return Desired(known=False), {}
        releases: dict[str, Release | None] = {}
        for alias, version in versions.items():
            releases[alias] = None
            if version is None:
                continue
            # The digest becomes part of a file's name, and anybody who reaches the registry can write a tag.
            if version.digest and DIGEST.fullmatch(version.digest):
                releases[alias] = Release(version.version, version.digest)
                continue
            reason = (
                f"Version {version.version} has no valid digest tag: register bundles with scripts/register_model.py."
            )
            errors.append(reason)
            if version.tags.get("serving.status") != "refused":
                self.outbox.put(Release(version.version, version.digest or ""), "refused", reason)
        return Desired(releases["champion"], releases["challenger"]), versions

    def _forget(self, desired: Desired, actual: Actual) -> None:
        """Forget setbacks of releases that nobody asks for any more: setting the alias again is trying again."""
        if desired.known:
            matter = {desired.champion, desired.challenger, actual.serving, actual.last_good}
            self.setbacks = {release: setback for release, setback in self.setbacks.items() if release in matter}
        # Another promoter has brought it through since, perhaps by a person's word.
        for release in [one for one, back in self.setbacks.items() if one in actual.approved and not back.approved]:
            del self.setbacks[release]

    def _recall(self, desired: Desired, actual: Actual) -> None:
        """Refuse at once what was refused before, by whichever promoter, with nothing fetched or loaded."""
        served = (actual.serving, actual.last_good)
        for release in self._asked:
            waits = release in served or release in self.setbacks or release.version in self.overruled
            if waits or (release in actual.approved and release != desired.champion):
                continue
            with suppress(RegistryUnavailable):  # then it is asked again later
                if kept := self.executor.refusal(release, actual):
                    reason = f"Version {release.version} was refused: {kept.reason}."
                    self._set_back(release, reason, final=True)
                    self.outbox.put(release, "refused", reason)

    def _record_aliases(self, aliases: Mapping[str, RegisteredVersion | None]) -> None:
        """Write into the audit log which aliases were seen to have moved. MLflow keeps neither when nor who."""
        for alias, version in aliases.items():
            last = self.audit.newest("alias seen", alias=alias) or {}
            now = (version.version, version.digest or "") if version else ("", "")
            if now != (last.get("version", ""), last.get("digest", "")):
                self.audit.append(
                    "alias seen",
                    self.by,
                    alias=alias,
                    version=now[0],
                    digest=now[1],
                    previous=last.get("version", ""),
                    previous_digest=last.get("digest", ""),
                )

    def _record_serving(self, actual: Actual) -> None:
        """Write down what serves if a promoter died between having it serve and writing so."""
        last = self.audit.newest("serve") or {}
        if (now := actual.serving) and last.get("digest") != now.digest:
            self._record("serve", now, "noticed afterwards: a promoter has died")

    def _progress(self, step: Step, began: float, remark: str) -> None:
        """A step goes on. Raises NotYet when nobody asks for its release any more."""
        now = time.monotonic()
        self.tell(Event(step, "running", now - began, remark))
        if step.release not in self._asked or now - self._looked < 1.0:
            return
        self._looked = now
        try:
            wanted = [self.registry.resolve(alias) for alias in ALIASES]
        except RegistryUnavailable:
            return
        if not any(one and (one.version, one.digest) == (step.release.version, step.release.digest) for one in wanted):
            raise NotYet(f"Version {step.release.version} is not asked for any more; its {step.action} was stopped.")

    def _forced(self, release: Release) -> dict[str, str] | None:
        reason = self.overruled.get(release.version)
        return {"by": self.by, "reason": reason} if reason else None

    def _blocked(self) -> frozenset[Release]:
        now = time.monotonic()
        return frozenset(release for release, one in self.setbacks.items() if one.final or now < one.retry_at)

    def _do(self, step: Step) -> None:
        """Do one step. Raises NotYet, or _Stopped when it was refused or failed."""
        self.tell(Event(step, "begun"))
        began = time.monotonic()
        before = self.executor.ledger()
        try:
            remark = self.executor.run(
                step, lambda remark: self._progress(step, began, remark), self._forced(step.release)
            )
        except NotYet as error:
            self.tell(Event(step, "waiting", time.monotonic() - began, str(error)))
            raise
        except (Refused, StepFailed, RegistryError, RegistryUnavailable, TorchServeUnavailable) as error:
            final = isinstance(error, Refused)
            reason = f"Version {step.release.version} was refused: {error}." if final else str(error)
            self.tell(Event(step, "refused" if final else "failed", time.monotonic() - began, str(error)))
            if self._set_back(step.release, reason, final):
                self._record(f"{step.action} {'refused' if final else 'failed'}", step.release, str(error))
            self.outbox.put(step.release, "refused" if final else "failed", reason)
            raise _Stopped(reason) from error
        self.tell(Event(step, "done", time.monotonic() - began, remark))
        self._record(str(step.action), step.release, remark)
        served = before.release(before.default)
        if step.action is Action.SERVE:
            if served is not None and served != step.release:
                self.outbox.put(served, "standby")
            self.outbox.put(step.release, "serving")
        elif step.action is Action.RETIRE and step.release not in self.setbacks:  # else it says why
            self.outbox.put(step.release, "rolled back" if step.release.archive in before.withdrawn else "retired")

    def _send(self, aliases: Mapping[str, RegisteredVersion | None], actual: Actual | None, errors: list[str]) -> bool:
        """Tell the registry what it is to know. Whether it was there."""
        asked = [version for version in aliases.values() if version]
        if actual:
            self.outbox.correct(asked, actual)
        try:
            errors += self.outbox.send(asked)
        except RegistryUnavailable as error:
            errors.append(str(error))
            return False
        return True

    def _record(self, event: str, release: Release, remark: str) -> None:
        """A line of the audit log on a step that ended; on one that has a release serve, with what served before it."""
        last = (self.audit.newest("serve") if event == "serve" else None) or {}
        self.audit.append(
            event,
            self.by,
            version=release.version,
            digest=release.digest,
            previous=last.get("version"),
            previous_digest=last.get("digest"),
            remark=remark or None,
        )

    def _set_back(self, release: Release, reason: str, final: bool) -> bool:
        """Keep a setback. Whether it is news: tried again in vain for the same reason is none."""
        known = self.setbacks.get(release)
        attempts = known.attempts + 1 if known else 1
        wait = 0.0 if attempts == 1 else min(LONGEST_WAIT, 2.0 ** min(attempts, 16))
        approved = release.archive in self.executor.ledger().loaded
        self.setbacks[release] = Setback(reason, final, attempts, time.monotonic() + wait, approved)
        return known is None or known.reason != reason


class _Stopped(RuntimeError):
    """A step did not succeed, and those after it have to wait; a sentence."""
