"""What the promoter writes into the registry: statuses, judgements, and the end of the audit log.

Entries wait here while the registry is away.
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
from mlflow_tracking.promotion.shared_judgements import SharedJudgements
from mlflow_tracking.registry import RegisteredVersion, Registry, RegistryError, head_tag


class Outbox:
    """Tags and reports on their way to the registry. `replica` names one of several promoters that share it."""

    def __init__(
        self, registry: Registry, judge: Judge, shared: SharedJudgements, audit: AuditLog, replica: str = ""
    ) -> None:
        self._registry = registry
        self._judge = judge
        self._shared = shared
        self._audit = audit
        self._due: dict[Release, dict[str, str]] = {}
        self._head_tag = head_tag(replica)
        self._head = ""  # the line that the registry has
        self._reported: set[str] = set()  # judgements written by this promoter; those of others stay

    def put(self, release: Release, status: str, reason: str = "") -> None:
        """Set the status of a release; it replaces a waiting one."""
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self._due[release] = {"serving.status": status, "serving.reason": reason, "serving.since": since}

    def correct(self, versions: Iterable[RegisteredVersion], actual: Actual) -> None:
        """Put the statuses that a promoter could not write before it died. `versions` are those with an alias."""
        expected = dict.fromkeys(actual.approved, "challenger")
        if actual.serving:
            expected[actual.serving] = "serving"
        for version in versions:
            release = _release(version)
            status = expected.get(release)
            if status and version.tags.get("serving.status") != status and release not in self._due:
                self.put(release, status)

    def send(self, versions: Iterable[RegisteredVersion]) -> list[str]:
        """Write what waits, the judgements on `versions` (those with an alias) and the audit log's end.

        Returns sentences on a damaged audit log. Raises RegistryUnavailable; then the rest keeps waiting.
        """
        for release in list(self._due):
            version = self._registry.version(release.version)
            # A new registry may hold another model under the same number.
            if version is not None and _release(version) == release:
                self._registry.tag(release.version, self._due[release])
            del self._due[release]
        for version in versions:
            if version.digest:
                self._report(version, version.digest)
        return self._send_head()

    def _report(self, version: RegisteredVersion, digest: str) -> None:
        """Write the judgement on a version into MLflow, unless it is there already."""
        judgement = self._judge.newest(digest)
        if judgement is None or version.tags.get("gates.judgement") == judgement.id:
            return
        if judgement.id in self._reported:
            return  # another promoter has written its own since
        with tempfile.TemporaryDirectory() as temporary:
            report.write_report(Path(temporary), judgement)
            with suppress(RegistryError):  # a version of another tool has no place for files
                self._registry.log_report(version.version, Path(temporary), report.REPORT)
        self._registry.tag(version.version, self._shared.tags(judgement) | report.tags(judgement))
        self._reported.add(judgement.id)

    def _send_head(self) -> list[str]:
        """Write the audit log's newest line into the registry, unless the log lacks the line that is there."""
        head = str(self._audit.head())
        if head == self._head:
            return []
        faults = self._audit.verify(Head.parse(self._registry.model_tags().get(self._head_tag, "")))
        if faults:
            return [f"The audit log {self._audit.path} is damaged (see docs/operations.md). {faults[0]}"]
        self._registry.set_model_tag(self._head_tag, head)
        self._head = head
        return []


def _release(version: RegisteredVersion) -> Release:
    return Release(version.version, version.digest or "")
