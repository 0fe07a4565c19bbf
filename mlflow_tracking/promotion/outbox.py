"""What the promoter tells the registry: how versions stand, what the gates found, and where the audit log ends.

What the registry does not take, as it is away, is kept until it does.
"""

import tempfile
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from mlflow_tracking.promotion.audit import AuditLog, Head
from mlflow_tracking.promotion.gates import judgement_report as report
from mlflow_tracking.promotion.gates.judge import Judge
from mlflow_tracking.promotion.plan import Actual, Release
from mlflow_tracking.registry import RegisteredVersion, Registry, RegistryError

HEAD_TAG = "audit.head"  # the model's tag that holds the newest line of the audit log


class Outbox:
    """Tags and reports on their way to the registry."""

    def __init__(self, registry: Registry, judge: Judge, audit: AuditLog) -> None:
        self._registry = registry
        self._judge = judge
        self._audit = audit
        self._due: dict[Release, dict[str, str]] = {}
        self._head = ""  # as the registry was last told

    def put(self, release: Release, status: str, reason: str = "") -> None:
        """How a release stands from now on, in place of what was due on it."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self._due[release] = {"serving.status": status, "serving.reason": reason, "serving.since": since}

    def correct(self, asked: Iterable[RegisteredVersion], actual: Actual) -> None:
        """Put what the tags of versions with an alias do not say: a promoter may have died before it could tell."""
        expected = dict.fromkeys(actual.approved, "challenger")
        if actual.serving:
            expected[actual.serving] = "serving"
        for version in asked:
            release = _release(version)
            status = expected.get(release)
            if status and version.tags.get("serving.status") != status and release not in self._due:
                self.put(release, status)

    def send(self, asked: Iterable[RegisteredVersion]) -> list[str]:
        """Write what is due, the judgements on versions with an alias, and the audit log's end; returns what is wrong
        with that log. Raises RegistryUnavailable; the rest stays due."""
        for release in list(self._due):
            version = self._registry.version(release.version)
            # Another registry's version of the same number is another model.
            if version is not None and _release(version) == release:
                self._registry.tag(release.version, self._due[release])
            del self._due[release]
        for version in asked:
            if version.digest:
                self._report(version)
        return self._tell_head()

    def _report(self, version: RegisteredVersion) -> None:
        """Keep the judgement on a version with it in MLflow, if it is not there yet."""
        judgement = self._judge.newest(version.digest or "")
        if judgement is None or version.tags.get("gates.judgement") == judgement.id:
            return
        with tempfile.TemporaryDirectory() as temporary:
            report.write_report(Path(temporary), judgement)
            with suppress(RegistryError):  # registered by something else, it has no place for files
                self._registry.log_report(version.version, Path(temporary), report.REPORT)
        self._registry.tag(version.version, report.tags(judgement))

    def _tell_head(self) -> list[str]:
        """Have the registry remember the audit log's newest line; not when the log lacks what is remembered there."""
        head = str(self._audit.head())
        if head == self._head:
            return []
        faults = self._audit.verify(Head.parse(self._registry.model_tag(HEAD_TAG) or ""))
        if faults:
            return [f"The audit log {self._audit.path} is not whole (see docs/operations.md). {faults[0]}"]
        self._registry.set_model_tag(HEAD_TAG, head)
        self._head = head
        return []


def _release(version: RegisteredVersion) -> Release:
    return Release(version.version, version.digest or "")
