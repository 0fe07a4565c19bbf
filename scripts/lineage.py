"""Trace an answer to its model's version, run, code, data, gates and deployment."""

import json
from collections.abc import Mapping
from textwrap import shorten
from typing import Annotated, Any

import typer

from handlers.errors import UsageError, UserError
from mlflow_tracking.command_line import console, errors, run, table
from mlflow_tracking.promotion.audit import AuditLog, Head
from mlflow_tracking.provenance import Lineage, trace
from mlflow_tracking.registry import Registry, RegistryUnavailable, head_tag
from mlflow_tracking.stack_settings import MODEL_NAME, Settings


def lineage(
    what: Annotated[
        str,
        typer.Argument(metavar="WHAT", help="Digest, request id, version or picture's SHA-256.", show_default=False),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    check: Annotated[bool, typer.Option("--verify", help="Check the audit log's chain of hashes.")] = False,
) -> None:
    """Trace an answer to its model's version, run, code, data, gates and deployment.

    WHAT is the digest in every answer under model.digest (at least its first
    eight digits), a version number, the request id of a logged prediction
    (the answer's header X-Request-Id), or the SHA-256 of a picture that was
    corrected: then the versions that learned from it are listed. The audit log shows when a promoter saw
    an alias move, what it did, and who ran promote.py. --verify checks the
    audit log for changed or missing lines. Exit codes: 0 found, 1 unknown or
    the audit log is damaged, 2 wrong options.
    """
    if bool(what) == check:
        raise UsageError("Give either a digest, version or request id to trace, or --verify.")
    settings = Settings.load()
    registry, audit = Registry(settings.registry_uri), AuditLog(settings.store)
    if check:
        verify(registry, audit, settings.promoter_replica)
        return
    history = trace(what, registry, audit, settings.prediction_logs)
    if as_json:
        print(json.dumps(vars(history), indent=1, ensure_ascii=False))
    else:
        show(history)


def verify(registry: Registry, audit: AuditLog, replica: str = "") -> None:
    """Check the audit log's chain, and its end against the registry. Raises UserError with every fault."""
    anchor = None
    try:
        anchor = Head.parse(registry.model_tags().get(head_tag(replica), ""))
    except RegistryUnavailable as error:
        errors.print(f"{error} Lines missing at the end would not be noticed.", style="yellow")
    if faults := audit.verify(anchor):
        raise UserError(f"The audit log {audit.path} is not whole. {' '.join(faults)}")
    console.print(f"✓ {audit.path}: {len(audit.rows()):,} lines, none changed, none missing.")
    if anchor:
        console.print("✓ Its end is the one that the registry knows.")


def show(history: Lineage) -> None:
    """Print a model's history, from its version to the audit log."""
    for taught in history.taught:
        console.print(f"A correction of this picture taught version {taught['version']} ({taught['split']}).")
    if not history.digest:
        return
    console.print(f"{MODEL_NAME} {history.digest}", style="bold")
    prediction, run_facts = history.prediction or {}, history.run or {}
    _pairs("Prediction", {name: value for name, value in prediction.items() if not isinstance(value, dict)})
    _pairs("Version", history.version or {})
    _pairs("Run", {name: value for name, value in run_facts.items() if name != "config"})
    _pairs("Configuration", run_facts.get("config", {}))
    _pairs("Training", history.training)
    _pairs("Receipt of the training images", history.receipt or {})
    if history.gates:
        verdicts = history.gates["verdicts"]
        _pairs("Gates", {verdict["gate"]: f"{verdict['outcome']}. {verdict['reason']}" for verdict in verdicts})
        if forced := history.gates["forced"]:
            console.print(f"  overruled by {forced['by']}: {forced['reason']}", style="yellow")
    for row in history.served:
        previous = f", after version {row['previous']}" if row.get("previous") else ""
        console.print(f"Served since {row['at'][:19]}{previous} ({row['by']})", style="bold")
    if history.audit:
        grid = table("Audit log", ("At (UTC)", "Event", "Version"), folded=("By", "More"))
        for row in history.audit:
            more = shorten(str(row.get("reason") or row.get("remark") or row.get("alias") or ""), 90, placeholder=" …")
            grid.add_row(row["at"][:16].replace("T", " "), row["event"], row.get("version", ""), row["by"], more)
        console.print(grid)
    for sentence in history.missing:
        console.print(sentence, style="dim")


def _pairs(title: str, values: Mapping[str, Any]) -> None:
    """Print a heading and `name value` lines, without those that are empty."""
    shown = {name: value for name, value in values.items() if value not in (None, "", [], {})}
    if shown:
        console.print(title, style="bold")
    for name, value in shown.items():
        text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else value
        text = ", ".join(map(str, value)) if isinstance(value, list) else text
        console.print(f"  {name:<22}{text}")


if __name__ == "__main__":
    run(
        lineage,
        examples=[
            "python scripts/lineage.py sha256:DIGEST",
            "python scripts/lineage.py 3 --json",
            "python scripts/lineage.py 7c1e2b0a-53c4-4d0e-9a55-0d3f8a9c1f10",
            "python scripts/lineage.py --verify",
        ],
    )
