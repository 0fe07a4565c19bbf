"""Provenance: trace a model from a digest, a version number or a request id to its run, code, data and deployment.

MLflow knows how a model was made. The audit log in the model store knows what promoters did, and still answers if
MLflow does not or if the version was deleted.
"""

import json
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from handlers.bundle import CONFIG, RECEIPT
from handlers.errors import UserError
from handlers.receipt import DIGITS, read_receipt
from mlflow_tracking.promotion.audit import AuditLog
from mlflow_tracking.promotion.gates.judgement_report import REPORT
from mlflow_tracking.registry import BUNDLE_ARTIFACT, RegisteredVersion, Registry, RegistryError, RegistryUnavailable

MIN_DIGITS = 8  # of an abbreviated digest


class LineageError(UserError):
    """Neither the registry nor the audit log nor a prediction log knows the query."""


@dataclass
class Lineage:
    """The history of one bundle. `missing` are sentences on what could not be found.

    `taught` are the versions that learned from a correction of the predicted picture, with the split that it was in.
    `audit` are the audit log's rows on the bundle. Of these, `aliases` are those on moved aliases, `served` those on
    its deployment.
    """

    query: str
    digest: str
    prediction: dict[str, Any] | None = None
    version: dict[str, Any] | None = None
    run: dict[str, Any] | None = None
    training: dict[str, Any] = field(default_factory=dict)
    receipt: dict[str, Any] | None = None
    gates: dict[str, Any] | None = None
    aliases: list[dict[str, Any]] = field(default_factory=list)
    served: list[dict[str, Any]] = field(default_factory=list)
    audit: list[dict[str, Any]] = field(default_factory=list)
    taught: list[dict[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def trace(query: str, registry: Registry, audit: AuditLog, predictions: Iterable[Path] = ()) -> Lineage:
    """Collect the history of the model that a query names. Raises LineageError if nothing matches.

    The query is a digest or at least its first MIN_DIGITS digits, a version number, or the id of a request in
    `predictions`, which are prediction logs.
    """
    prediction, missing, version = None, [], None
    key = query.removeprefix("sha256:").lower()
    if not re.fullmatch(rf"\d{{1,6}}|[0-9a-f]{{{MIN_DIGITS},64}}", key):
        prediction, key = _prediction(query, predictions)
    rows = [row for row in audit.rows() if "damaged" not in row]
    try:
        version = _version(key, registry)
    except (RegistryUnavailable, RegistryError) as error:
        missing.append(str(error))
    digest = (version.digest if version else None) or _digest_in(rows, key)
    sha256 = str((prediction or {}).get("image_sha256", key))
    taught = versions_taught(sha256, registry) if prediction or not digest else []
    if digest is None and taught:
        return Lineage(query, "", taught=taught)
    if digest is None:
        raise LineageError(f"Neither the registry {registry.uri} nor the audit log {audit.path} knows {query}.")
    lineage = Lineage(query, digest, prediction, taught=taught, missing=missing)
    lineage.audit = [row for row in rows if digest in (row.get("digest"), row.get("previous_digest"))]
    own = [row for row in lineage.audit if row.get("digest") == digest]
    lineage.aliases = [row for row in own if row["event"] in ("alias seen", "alias moved", "rollback")]
    lineage.served = [row for row in own if row["event"] == "serve"]
    if version is not None:
        lineage.version = _version_facts(version)
        try:
            _add_from_registry(lineage, version, registry)
        except (RegistryUnavailable, RegistryError) as error:
            missing.append(str(error))
    elif not missing:
        missing.append("The registry no longer holds this version.")
    return lineage


def versions_taught(sha256: str, registry: Registry) -> list[dict[str, str]]:
    """Return the versions that learned from the correction of an uploaded picture, and the split that it was in.

    Empty for a SHA-256 of fewer than DIGITS digits, or if the registry does not answer.
    """
    taught: list[dict[str, str]] = []
    if len(sha256) < DIGITS:
        return taught
    with suppress(RegistryUnavailable, RegistryError), tempfile.TemporaryDirectory() as temporary:
        for version in registry.versions():
            path = f"artifacts/{BUNDLE_ARTIFACT}/{RECEIPT}"
            receipt = read_receipt(registry.download_version(version.version, path, Path(temporary)).parent)
            taught += [
                {"version": version.version, "split": split}
                for split, seen in receipt.splits.items()
                if sha256[:DIGITS] in seen.corrections
            ]
    return taught


def _version(key: str, registry: Registry) -> RegisteredVersion | None:
    """Return the version with this number, or whose bundle's digest begins with `key`."""
    if len(key) < MIN_DIGITS:
        return registry.version(key)
    for version in registry.versions():
        for digest in (version.digest, version.tags.get("source_digest")):
            if digest and digest.removeprefix("sha256:").startswith(key):
                return version
    return None


def _digest_in(rows: list[dict[str, Any]], key: str) -> str | None:
    """Return the newest digest in the audit log for a version number or the beginning of a digest."""
    for row in reversed(rows):
        digest = str(row.get("digest", ""))
        matches = len(key) >= MIN_DIGITS and digest.removeprefix("sha256:").startswith(key)
        if digest and (matches or row.get("version") == key):
            return digest
    return None


def _prediction(request_id: str, logs: Iterable[Path]) -> tuple[dict[str, Any], str]:
    """Return the logged prediction of a request and its model's digest without prefix. Raises LineageError."""
    searched = []
    for log in logs:
        searched.append(str(log))
        with log.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if request_id not in line:
                    continue
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                model = row.get("model") if isinstance(row.get("model"), dict) else {}
                digest = row.get("digest") or model.get("digest")
                if row.get("request_id") == request_id and isinstance(digest, str):
                    return row, digest.removeprefix("sha256:")
    if not searched:
        raise LineageError(
            f"{request_id} is neither a version nor a digest, and there is no prediction log. Give a digest."
        )
    raise LineageError(
        f"{request_id} is neither a version nor a digest, and no request of that id is in {', '.join(searched)}."
    )


def _utc(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")


def _version_facts(version: RegisteredVersion) -> dict[str, Any]:
    return {
        "version": version.version,
        "registered": _utc(version.created_ms),
        "aliases": list(version.aliases),
        "status": version.tags.get("serving.status"),
        "reason": version.tags.get("serving.reason") or None,
        "architecture": version.tags.get("architecture"),
        "balanced_accuracy": version.tags.get("balanced_accuracy"),
    }


def _add_from_registry(lineage: Lineage, version: RegisteredVersion, registry: Registry) -> None:
    """Add the run, the bundle's evidence and receipt, and the gates' report. Raises RegistryError."""
    run_id = version.run_id or version.tags.get("training_run")
    run = registry.run(run_id) if run_id else None
    if run is None:
        lineage.missing.append("The version is linked to no training run in this registry.")
    else:
        lineage.run = {
            "run_id": run.info.run_id,
            "name": run.info.run_name,
            "user": run.data.tags.get("mlflow.user"),
            "started": _utc(run.info.start_time),
            "config": dict(run.data.params),
        }
    with tempfile.TemporaryDirectory() as temporary:

        def download(path: str) -> Path:
            return registry.download_version(version.version, path, Path(temporary))

        bundle = f"artifacts/{BUNDLE_ARTIFACT}"
        config = json.loads(download(f"{bundle}/{CONFIG}").read_bytes())
        names = ("code_revision", "dataset_fingerprint", "images", "seed", "initial_bundle")
        lineage.training = {name: config["evidence"][name] for name in names if name in config["evidence"]}
        receipt = read_receipt(download(f"{bundle}/{RECEIPT}").parent)
        lineage.receipt = {
            "dataset_fingerprint": receipt.dataset_fingerprint,
            "images": {split: len(seen.sha256) for split, seen in receipt.splits.items()},
            "lesions": {split: len(seen.lesions) for split, seen in receipt.splits.items()},
            "corrections": {split: len(seen.corrections) for split, seen in receipt.splits.items() if seen.corrections},
        }
        if "gates.judgement" in version.tags:
            lineage.gates = json.loads(download(f"{REPORT}/report.json").read_bytes())
        else:
            lineage.missing.append("No gate has judged the version yet.")
