"""Deploy a version, roll back, or show what is deployed.

The promoter of `make up` deploys by itself when an alias moves in MLflow.
This command does the same, shows every step, and records who ran it. A
version must pass the gates of mlflow_tracking/gates.yaml before it serves.
If a step fails, the previous version keeps serving.

Exit codes: 0 done, 1 refused or failed, 2 wrong options, 3 a server is away.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.status import Status

from handlers.errors import UsageError
from mlflow_tracking.command_line import command_group, console, errors, run, table
from mlflow_tracking.digests import short
from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion.audit import person
from mlflow_tracking.promotion.ledger import LedgerError
from mlflow_tracking.promotion.locks import LOCK_SECONDS, StoreBusy, lock
from mlflow_tracking.promotion.plan import Actual
from mlflow_tracking.promotion.reconcile import WAITING_SECONDS, Event, Pass, Reconciler, create_reconciler
from mlflow_tracking.promotion.rollback import plan_rollback, record_rollback
from mlflow_tracking.registry import RegisteredVersion, RegistryUnavailable, check_alias
from mlflow_tracking.stack_settings import MODEL_NAME, Settings
from mlflow_tracking.torchserve_client import TorchServeError, TorchServeUnavailable

EXAMPLES = (
    "python scripts/promote.py to 3                    # champion is version 3",
    "python scripts/promote.py to 4 --alias challenger # load it next to the champion",
    "python scripts/promote.py to 3 --again            # discard earlier judgements",
    'python scripts/promote.py to 3 --force --reason "agreed with the lab"',
    'python scripts/promote.py rollback --reason "misses melanomas"',
    "python scripts/promote.py status --json           # versions, aliases, TorchServe",
    "python scripts/promote.py watch                   # deploy what the aliases say, until Ctrl-C",
)
MARKS = {"done": "[green]✓[/]", "waiting": "[yellow]…[/]", "refused": "[red]✗[/]", "failed": "[red]✗[/]"}

app = command_group(__doc__, EXAMPLES)


@app.command()
def to(
    version: Annotated[str, typer.Argument(metavar="VERSION", help="The version's number in MLflow.")],
    alias: Annotated[
        str, typer.Option(callback=check_alias, help="champion serves; challenger is loaded next to it.")
    ] = "champion",
    force: Annotated[bool, typer.Option("--force", help="Overrule the gates; needs --reason.")] = False,
    reason: Annotated[str, typer.Option(help="The reason, for the audit log.")] = "",
    again: Annotated[bool, typer.Option("--again", help="Discard earlier answers and judgements first.")] = False,
) -> None:
    """Point an alias at VERSION and deploy it."""
    if force and not reason:
        raise UsageError("--force needs --reason. The audit log and MLflow keep the reason.")
    reconciler, spinner = open_reconciler({version: reason} if force else {})
    at_once = not force and not again
    if at_once:  # so that a promoter that is deploying another version gives way
        move(reconciler, alias, version)

    def prepare() -> None:
        if again:
            reconciler.forget(version)
        if not at_once:
            move(reconciler, alias, version)
        registered = reconciler.registry.version(version)
        reconciler.audit.append(
            "alias moved",
            reconciler.by,
            alias=alias,
            version=version,
            digest=registered.digest if registered else None,
            forced=force or None,
            reason=reason or None,
        )

    finish(settle_locked(reconciler, spinner, prepare))


@app.command()
def rollback(reason: Annotated[str, typer.Option(help="The reason, for the audit log.")] = "") -> None:
    """Return to the last good version."""
    reconciler, spinner = open_reconciler()
    planned = plan_rollback(reconciler.registry, ledgers.read(reconciler.store))
    move(reconciler, "champion", planned.target.version)
    record = partial(record_rollback, planned, reconciler.store, reconciler.audit, reconciler.by, reason)
    finish(settle_locked(reconciler, spinner, record))


@app.command()
def watch() -> None:
    """Deploy what the aliases in MLflow ask for, until Ctrl-C."""
    reconciler, spinner = open_reconciler()
    result = settle_locked(reconciler, spinner)
    report(result)
    while True:
        time.sleep(Settings.load().promoter_poll_seconds)
        with suppress(StoreBusy):
            before, result = result, reconciler.reconcile()
            if result.done or result.errors != before.errors:
                report(result)


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False) -> None:
    """List the versions in MLflow and TorchServe."""
    reconciler, _ = open_reconciler()
    versions: list[RegisteredVersion] = []
    actual, complete = Actual(), True
    try:
        versions = reconciler.registry.versions()
    except RegistryUnavailable as error:
        errors.print(str(error))
        complete = False
    try:
        actual = reconciler.executor.observe()
    except (TorchServeUnavailable, TorchServeError, LedgerError) as error:
        errors.print(str(error))
        complete = False
    rows = status_rows(versions, actual)
    if as_json:
        print(json.dumps({"registry": reconciler.registry.uri, "versions": rows}, indent=1))
    else:
        print_status(rows, reconciler.registry.uri)
    if complete and actual.serving and not any("champion" in version.aliases for version in versions):
        errors.print(no_champion(actual.serving.version, [version.version for version in versions]))
    if not complete:
        raise typer.Exit(3)


def settle_locked(reconciler: Reconciler, spinner: Status, prepare: Callable[[], None] = lambda: None) -> Pass:
    """Hold the store, prepare, and reconcile until nothing is left to do or an error stops it."""
    with spinner, lock(reconciler.store, LOCK_SECONDS):
        prepare()
        while True:
            result = reconciler.reconcile_locked()
            if not result.waiting and (result.settled or result.errors):
                return result
            if result.waiting:
                time.sleep(WAITING_SECONDS)


def open_reconciler(overruled: Mapping[str, str] | None = None) -> tuple[Reconciler, Status]:
    """Return a reconciler for the services of the settings, and the spinner that shows its steps."""
    spinner = console.status("Waiting for the promoter to finish its step …")
    by = f"{person()} with promote.py"
    return create_reconciler(Settings.load(), lambda event: show(event, spinner), by, overruled), spinner


def move(reconciler: Reconciler, alias: str, version: str) -> None:
    """Point the alias at the version. Raises RegistryError, RegistryUnavailable."""
    reconciler.registry.set_alias(alias, version)
    console.print(f"[green]✓[/] {alias} is version {escape(version)}", markup=True)


def show(event: Event, spinner: Status) -> None:
    """Print a step that has ended; show a running one in the spinner."""
    if event.state in ("begun", "running"):
        spinner.update(escape(f"{event.step} … {event.remark}"))
    if event.state in MARKS:
        remark = f"  [dim]{escape(event.remark)}[/]" if event.remark else ""
        console.print(f"{MARKS[event.state]} {event.step}  [dim]{event.seconds:.1f} s[/]{remark}", markup=True)


def report(result: Pass) -> None:
    """Print the errors of a pass, or the version that serves."""
    for sentence in result.errors:
        errors.print(sentence)
    if result.errors:
        return
    if result.actual and result.actual.serving:
        console.print(f"Version {result.actual.serving.version} serves.")
    else:
        console.print(f"No version of {MODEL_NAME} is champion. Deploy one with `promote.py to VERSION`.")


def finish(result: Pass) -> None:
    """Print how a deployment ended and exit with its code."""
    report(result)
    if result.errors:
        raise typer.Exit(1 if result.registry_up and result.torchserve_up else 3)


def status_rows(versions: list[RegisteredVersion], actual: Actual) -> list[dict[str, Any]]:
    """Return one row for each version that MLflow or TorchServe holds, the newest first."""
    merged = {number: RegisteredVersion(number, held.release.digest) for number, held in actual.loaded.items()}
    merged |= {version.version: version for version in versions}
    rows = []
    for version in sorted(merged.values(), key=lambda version: version.created_ms, reverse=True):
        held = actual.loaded.get(version.version)
        state = "" if held is None else "answers" if version.version == actual.default else "ready"
        rows.append(
            {
                "version": version.version,
                "torchserve": state if held is None or held.ready else "no worker",
                "status": version.tags.get("serving.status", ""),
                "since": version.tags.get("serving.since", ""),
                "reason": version.tags.get("serving.reason", ""),
                "balanced_accuracy": version.tags.get("balanced_accuracy", ""),
                "digest": version.digest or "",
                "aliases": list(version.aliases),
            }
        )
    return rows


def no_champion(serving: str, versions: Sequence[str]) -> str:
    """Return the sentences for a registry in which no version has the alias champion, though one serves."""
    if serving in versions:
        return (
            f"No version has the alias champion; version {serving} still serves. Set it with `promote.py to VERSION`."
        )
    return (
        f"The alias champion points nowhere: version {serving} was deleted from MLflow and still serves. "
        "Deploy another version with `promote.py to VERSION`."
    )


def print_status(rows: list[dict[str, Any]], uri: str) -> None:
    """Print the rows as a table of 80 columns, and below it why a version was refused."""
    columns = ("Version", "TorchServe", "Status", "Since\n(UTC)", "Bal.\nacc.", "Digest")
    grid = table(f"{MODEL_NAME} in {uri}", columns, folded=["Alias"])
    grid.caption = "Bal. acc.: balanced accuracy on the bundle's own test split, or else on its validation split."
    for row in rows:
        since, digest = row["since"][5:16].replace("T", " "), short(row["digest"])
        cells = (row["version"], row["torchserve"], row["status"], since, row["balanced_accuracy"], digest)
        grid.add_row(*cells, " ".join(row["aliases"]))
    console.print(grid)
    for row in rows:
        if row["reason"]:
            console.print(f"✗ {row['reason']}")


if __name__ == "__main__":
    run(app)
