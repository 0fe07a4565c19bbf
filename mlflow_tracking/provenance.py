"""Where an answer came from: model, version, run, code, data, gates, and when it was put into service by whom.

The registry knows the model and its making; the audit log in the model store knows what the promoters did. Each is told
as far as it is there: with MLflow away, or a version deleted, the audit log still speaks.
"""

import json
import re
import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from handlers.bundle import CONFIG
from handlers.errors import UserError
from handlers.receipt import RECEIPT, read_receipt
from mlflow_tracking.promotion.audit import AuditLog
from mlflow_tracking.promotion.gates.judgement_report import REPORT
from mlflow_tracking.registry import BUNDLE_ARTIFACT, RegisteredVersion, Registry, RegistryError, RegistryUnavailable

FEWEST_DIGITS = 8  # of a digest that is given in part


class LineageError(UserError):
    """Nothing is known of what was asked for; a sentence."""


@dataclass
class Lineage:
    """All that is known of one bundle. `missing` are sentences on what could not be told.

    `aliases` are audit rows on aliases that pointed at it, `served` those on its coming into service (with the
    champion before it), `audit` all rows on it.
    """

    asked: str
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
    missing: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return asdict(self)


def trace(asked: str, registry: Registry, audit: AuditLog, predictions: Iterable[Path] = ()) -> Lineage:
    """Walk from a digest (whole, or its first digits), a version number, or a request id to all that is known.

    Args:
        predictions: prediction logs (JSON lines with `request_id` and the model's `digest`), for request ids.

    Raises:
        LineageError: neither registry nor audit log know it.
    """
    missing: list[str] = []
    prediction = None
    wanted = asked.removeprefix("sha256:").lower()
    if not re.fullmatch(rf"\d{{1,6}}|[0-9a-f]{{{FEWEST_DIGITS},64}}", wanted):
        prediction, wanted = _prediction(asked, predictions)
    rows = [row for row in audit.rows() if "damaged" not in row]
    version = None
    try:
        version = _version(wanted, registry)
    except (RegistryUnavailable, RegistryError) as error:
        missing.append(str(error))
    digest = (version.digest if version else None) or _digest_in(rows, wanted)
    if digest is None:
        raise LineageError(f"{asked} is known neither to the registry {registry.uri} nor to {audit.path}.")
    found = Lineage(asked, digest, prediction, missing=missing)
    found.audit = [row for row in rows if row.get("digest") == digest or row.get("previous_digest") == digest]
    own = [row for row in found.audit if row.get("digest") == digest]
    found.aliases = [row for row in own if row["event"] in ("alias seen", "alias moved", "rollback")]
    found.served = [row for row in own if row["event"] == "serve"]
    if version is None:
        if not missing:
            missing.append("The registry does not hold this version any more.")
        return found
    found.version = _card(version)
    try:
        _from_registry(found, version, registry)
    except (RegistryUnavailable, RegistryError) as error:
        missing.append(str(error))
    return found


def _version(wanted: str, registry: Registry) -> RegisteredVersion | None:
    if len(wanted) < FEWEST_DIGITS:
        return registry.version(wanted)
    for version in registry.versions():
        digests = (version.digest or "", version.tags.get("source_digest", ""))
        if any(digest.removeprefix("sha256:").startswith(wanted) for digest in digests if digest):
            return version
    return None


def _digest_in(rows: list[dict[str, Any]], wanted: str) -> str | None:
    """The digest that the audit log names for a version (its newest) or for the first digits of a digest."""
    for row in reversed(rows):
        digest = str(row.get("digest", ""))
        named = digest.removeprefix("sha256:").startswith(wanted) and len(wanted) >= FEWEST_DIGITS
        if digest and (named or row.get("version") == wanted):
            return digest
    return None


def _prediction(request_id: str, logs: Iterable[Path]) -> tuple[dict[str, Any], str]:
    """The line of a prediction log with this request id, and its model's digest without the prefix."""
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
    where = f"in {', '.join(searched)}" if searched else "as there is no prediction log (--predictions names one)"
    raise LineageError(f"{request_id} is no version and no digest, and as a request id it was not found {where}.")


def _card(version: RegisteredVersion) -> dict[str, Any]:
    registered = datetime.fromtimestamp(version.created_ms / 1000, UTC).isoformat(timespec="seconds")
    return {
        "version": version.version,
        "registered": registered,
        "aliases": list(version.aliases),
        "status": version.tags.get("serving.status"),
        "reason": version.tags.get("serving.reason") or None,
        "architecture": version.tags.get("architecture"),
        "balanced_accuracy": version.tags.get("balanced_accuracy"),
    }


def _from_registry(found: Lineage, version: RegisteredVersion, registry: Registry) -> None:
    """Run, bundle's evidence, receipt and gates' report, as far as they are there."""
    run_id = version.run_id or version.tags.get("training_run")
    run = registry.run(run_id) if run_id else None
    if run is not None:
        found.run = {
            "run_id": run.info.run_id,
            "name": run.info.run_name,
            "user": run.data.tags.get("mlflow.user"),
            "started": datetime.fromtimestamp(run.info.start_time / 1000, UTC).isoformat(timespec="seconds"),
            "config": dict(run.data.params),
        }
    else:
        found.missing.append("It is linked to no training run in this registry, so its configuration is not known.")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundle = f"artifacts/{BUNDLE_ARTIFACT}"
        config = json.loads(registry.download(version.version, f"{bundle}/{CONFIG}", folder).read_bytes())
        evidence = config["evidence"]
        found.training = {
            name: evidence[name]
            for name in ("code_revision", "dataset_fingerprint", "images", "seed", "initial_bundle")
            if name in evidence
        }
        if RECEIPT in config["files"]:
            receipt = read_receipt(registry.download(version.version, f"{bundle}/{RECEIPT}", folder).parent)
            assert receipt is not None, "it was just fetched"
            found.receipt = {
                "dataset_fingerprint": receipt.dataset_fingerprint,
                "images": {split: len(seen.sha256) for split, seen in receipt.splits.items()},
                "lesions": {split: len(seen.lesions) for split, seen in receipt.splits.items()},
            }
        else:
            found.missing.append("The bundle has no receipt of the images it was made from.")
        if "gates.judgement" in version.tags:
            report = registry.download(version.version, f"{REPORT}/report.json", folder)
            found.gates = json.loads(report.read_bytes())
        else:
            found.missing.append("No gates' report is kept with it: it was never asked for.")
