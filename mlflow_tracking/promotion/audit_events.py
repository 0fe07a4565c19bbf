"""The events that the promoter writes into the audit log: moved aliases, steps, refusals, failures, pruned archives."""

from collections.abc import Mapping

from mlflow_tracking.promotion.audit import AuditLog
from mlflow_tracking.promotion.plan import Actual, Release
from mlflow_tracking.registry import RegisteredVersion


class AuditEvents:
    """Writes events into an audit log in the name of `by`."""

    def __init__(self, audit: AuditLog, by: str) -> None:
        self._audit = audit
        self._by = by

    def aliases(self, versions: Mapping[str, RegisteredVersion | None]) -> None:
        """Record the aliases that have moved since the last record. MLflow keeps neither the time nor the person."""
        for alias, version in versions.items():
            last = self._audit.newest("alias seen", alias=alias) or {}
            number, digest = (version.version, version.digest or "") if version else ("", "")
            if (number, digest) != (last.get("version", ""), last.get("digest", "")):
                self._audit.append(
                    "alias seen",
                    self._by,
                    alias=alias,
                    version=number,
                    digest=digest,
                    previous=last.get("version", ""),
                    previous_digest=last.get("digest", ""),
                )

    def serving(self, actual: Actual) -> None:
        """Record the serving release if a promoter died between the step and its record."""
        last = self._audit.newest("serve") or {}
        if actual.serving and last.get("digest") != actual.serving.digest:
            self.step("serve", actual.serving, "noticed afterwards: a promoter has died")

    def step(self, event: str, release: Release, remark: str) -> None:
        """Record a step that has ended; a `serve` also names the release before it."""
        last = (self._audit.newest("serve") if event == "serve" else None) or {}
        self._audit.append(
            event,
            self._by,
            version=release.version,
            digest=release.digest,
            previous=last.get("version"),
            previous_digest=last.get("digest"),
            remark=remark or None,
        )

    def pruned(self, archive: str) -> None:
        """Record an archive that was deleted."""
        self._audit.append("prune", self._by, archive=archive)
