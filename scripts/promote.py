"""Bring what TorchServe serves in line with the registry, once; or say first which version shall serve.

The promoter of `make up` does the same every two seconds: moving the alias
in MLflow's page is enough. Here one sees every step. Whatever fails, the
version that served before keeps serving. The exit code is 1 when a version
was refused or failed, 2 for wrong options, 3 when a server is away.
"""

import sys
import time
from contextlib import suppress

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion.ledger import LedgerError, StoreBusy
from mlflow_tracking.promotion.plan import Actual
from mlflow_tracking.promotion.reconcile import Event, Pass, Reconciler
from mlflow_tracking.promotion.torchserve_client import TorchServeError, TorchServeUnavailable
from mlflow_tracking.registry import RegisteredVersion, RegistryError, RegistryUnavailable
from mlflow_tracking.settings import MODEL_NAME, Settings

EPILOG = """
Examples:

  python scripts/promote.py --version 3     # champion is version 3 from now on; deploy it

  python scripts/promote.py                 # deploy what the aliases in MLflow ask for

  python scripts/promote.py --watch         # the same, again and again

  python scripts/promote.py --status        # what is registered, wanted, loaded, serving, refused
"""
# While the promoter of `make up` is in the middle of a step.
LOCK_SECONDS = 300.0
MARKS = {"done": "[green]✓[/]", "waiting": "[yellow]…[/]", "refused": "[red]✗[/]", "failed": "[red]✗[/]"}

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__, epilog=EPILOG)
def promote(
    version: str = typer.Option("", "--version", help="First point the alias at this version."),
    alias: str = typer.Option("champion", "--alias", help="The alias to move: champion serves, challenger stands by."),
    watch: bool = typer.Option(False, "--watch", help="Go on until Ctrl-C."),
    status: bool = typer.Option(False, "--status", help="Only show how things stand."),
) -> None:
    if status and (version or watch):
        raise typer.BadParameter("--status changes nothing; leave --version and --watch out.")
    settings = Settings()
    reconciler = Reconciler.create(settings, tell=show)
    if status:
        raise typer.Exit(0 if show_status(reconciler) else 3)
    waiting = console.status("Waiting for the promoter to finish its step …")
    with waiting, ledgers.lock(settings.store, LOCK_SECONDS):
        waiting.stop()
        if version:
            reconciler.registry.set_alias(alias, version)
            console.print(f"[green]✓[/] {alias} is version {version}")
        result = settle(reconciler)
    conclude(result)
    while watch:
        time.sleep(settings.promoter_poll_seconds)
        with suppress(StoreBusy):
            before, result = result, reconciler.reconcile()
            if result.done or result.errors != before.errors:
                conclude(result)
    if result.errors:
        raise typer.Exit(1 if result.registry_up and result.torchserve_up else 3)


def settle(reconciler: Reconciler) -> Pass:
    """Passes until nothing is left to be done, or something stands in the way."""
    while True:
        result = reconciler.reconcile_locked()
        if not result.waiting and (result.settled or result.errors):
            return result


def show(event: Event) -> None:
    """Print a step when it ends."""
    if event.state in MARKS:
        remark = f"  [dim]{escape(event.remark)}[/]" if event.remark else ""
        console.print(f"{MARKS[event.state]} {event.step}  [dim]{event.seconds:.1f} s[/]{remark}")


def conclude(result: Pass) -> None:
    """Say how it ended."""
    for sentence in result.errors:
        errors.print(f"[red]{escape(sentence)}[/]")
    if result.errors:
        return
    if result.actual and result.actual.serving:
        console.print(f"Version {result.actual.serving.version} serves.")
    else:
        console.print(f"Nothing serves: no version of {MODEL_NAME} is champion; `--version N` makes one so.")


def show_status(reconciler: Reconciler) -> bool:
    """Print all versions that the registry or TorchServe knows. Whether both servers answered."""
    versions: list[RegisteredVersion] = []
    actual, complete = Actual(), True
    try:
        versions = reconciler.registry.versions()
    except RegistryUnavailable as error:
        errors.print(f"[red]{escape(str(error))}[/]")
        complete = False
    try:
        actual = reconciler.executor.observe()
    except (TorchServeUnavailable, TorchServeError, LedgerError) as error:
        errors.print(f"[red]{escape(str(error))}[/]")
        complete = False
    known = {number: RegisteredVersion(number, held.release.digest) for number, held in actual.loaded.items()}
    known |= {one.version: one for one in versions}
    table = Table("Version", "Alias", "TorchServe", "Status", "Since (UTC)", "Bal. acc.", "Digest", title=MODEL_NAME)
    for one in sorted(known.values(), key=lambda one: one.created_ms, reverse=True):
        held = actual.loaded.get(one.version)
        place = "" if held is None else "answers" if one.version == actual.default else "ready"
        table.add_row(
            one.version,
            ", ".join(one.aliases),
            place if held is None or held.ready else "no worker yet",
            one.tags.get("serving.status", ""),
            one.tags.get("serving.since", "")[:16].replace("T", " "),
            one.tags.get("balanced_accuracy", ""),
            (one.digest or "").removeprefix("sha256:")[:12],
        )
    console.print(table)
    for one in versions:
        if reason := one.tags.get("serving.reason"):
            console.print(f"[red]✗[/] {escape(reason)}")
    return complete


if __name__ == "__main__":
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except RegistryUnavailable as error:
        errors.print(f"[red]{escape(str(error))}[/]\nIs it running? `make up`, or mlflow_tracking/mlflow_server.sh.")
        sys.exit(3)
    except (RegistryError, StoreBusy) as error:
        errors.print(f"[red]{escape(str(error))}[/]")
        sys.exit(1)
