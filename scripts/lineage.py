"""Where an answer came from: from a prediction's model.digest to version, run, code, data, gates and promotion.

WHAT is the digest that stands in every answer under model.digest (or its
first eight digits or more), a version number, or the request id of a
prediction that was logged (X-Request-Id in the answer's header). The audit log tells when a promoter saw an alias
move, what it did, and who it was where promote.py moved it; --verify finds
lines of it that were changed or are missing. The exit code is 1 when nothing
is known of WHAT or the audit log is broken, 2 for wrong options.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from mlflow_tracking.command_line import table
from mlflow_tracking.promotion.audit import AuditLog, Head
from mlflow_tracking.promotion.outbox import HEAD_TAG
from mlflow_tracking.provenance import Lineage, LineageError, trace
from mlflow_tracking.registry import Registry, RegistryUnavailable
from mlflow_tracking.settings import MODEL_NAME, Settings, SettingsError

EPILOG = """
Examples:

  python scripts/lineage.py sha256:DIGEST

  python scripts/lineage.py 3 --json

  python scripts/lineage.py 7c1e2b0a-53c4-4d0e-9a55-0d3f8a9c1f10

  python scripts/lineage.py --verify     # is the audit log whole?
"""

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__, epilog=EPILOG)
def lineage(
    what: str = typer.Argument("", metavar="DIGEST|REQUEST_ID|VERSION", help="What to trace.", show_default=False),
    predictions: list[Path] = typer.Option(
        [], "--predictions", exists=True, dir_okay=False, help="One more prediction log to search; repeat."
    ),
    as_json: bool = typer.Option(False, "--json", help="Print everything as JSON."),
    check: bool = typer.Option(False, "--verify", help="Check the audit log's chain of hashes."),
) -> None:
    if bool(what) == check:
        raise typer.BadParameter("give either something to trace or --verify.")
    settings = Settings.load()
    registry, audit = Registry(settings.registry_uri), AuditLog(settings.store)
    if check:
        raise typer.Exit(verify(registry, audit))
    found = trace(what, registry, audit, [*settings.prediction_logs, *predictions])
    if as_json:
        print(json.dumps(found.to_dict(), indent=1, ensure_ascii=False))
    else:
        show(found)


def verify(registry: Registry, audit: AuditLog) -> int:
    """Check the chain, and its end against what the registry knows. The exit code."""
    anchor = None
    try:
        anchor = Head.parse(registry.model_tag(HEAD_TAG) or "")
    except RegistryUnavailable as error:
        errors.print(f"[yellow]{escape(str(error))}[/] Lines missing at the end would not be noticed.")
    faults = audit.verify(anchor)
    for sentence in faults:
        errors.print(f"[red]✗[/] {escape(sentence)}")
    if not faults:
        held = "; its end is the one the registry knows" if anchor else ""
        console.print(f"[green]✓[/] {audit.path}: {len(audit.rows()):,} lines, none changed, none missing{held}.")
    return 1 if faults else 0


def show(found: Lineage) -> None:
    """Print what is known, from the model to the audit log."""
    console.print(f"[bold]{MODEL_NAME}[/] {found.digest}")
    if found.prediction:
        _pairs("Prediction", {name: value for name, value in found.prediction.items() if not isinstance(value, dict)})
    if found.version:
        _pairs("Version", found.version)
    if found.run:
        _pairs("Run", {name: value for name, value in found.run.items() if name != "config"})
        _pairs("Configuration", found.run["config"])
    _pairs("Training", found.training)
    if found.receipt:
        _pairs("Receipt of what it has seen", found.receipt)
    if found.gates:
        _pairs("Gates", {one["gate"]: f"{one['outcome']}: {one['reason']}" for one in found.gates["verdicts"]})
        if forced := found.gates["forced"]:
            console.print(f"  [yellow]overruled by {escape(forced['by'])}: {escape(forced['reason'])}[/]")
    for row in found.served:
        previous = f", after version {row['previous']}" if row.get("previous") else ""
        console.print(f"[bold]Served[/] since {row['at'][:19]}{previous} ({escape(row['by'])})")
    if found.audit:
        grid = table("Audit log", ("At (UTC)", "Event", "Version"), folded=("By", "More"))
        for row in found.audit:
            more = row.get("reason") or row.get("remark") or row.get("alias") or ""
            at = row["at"][:16].replace("T", " ")
            grid.add_row(
                at,
                row["event"],
                row.get("version", ""),
                escape(row["by"]),
                escape(shorten(str(more), 90, placeholder=" …")),
            )
        console.print(grid)
    for sentence in found.missing:
        console.print(f"[dim]{escape(sentence)}[/]")


def _pairs(title: str, values: Mapping[str, Any]) -> None:
    told = {name: value for name, value in values.items() if value not in (None, "", [], {})}
    if told:
        console.print(f"[bold]{title}[/]")
    for name, value in told.items():
        text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else value
        text = ", ".join(map(str, value)) if isinstance(value, list) else text
        console.print(f"  [dim]{escape(name):<22}[/]{escape(str(text))}")


if __name__ == "__main__":
    try:
        app()
    except (LineageError, SettingsError) as error:
        errors.print(f"[red]{escape(str(error))}[/]")
        sys.exit(1)
