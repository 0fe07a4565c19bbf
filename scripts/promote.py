"""Bring what TorchServe serves in line with the registry, once; or say first which version shall serve.

The promoter of `make up` does the same every two seconds: moving the alias
in MLflow's page is enough. Here one sees every step, and the audit log
knows who it was. A version has to pass the gates of
mlflow_tracking/gates.yaml before it serves; what it lacked stands in MLflow
with it. Whatever fails, the version that served before keeps serving. The
exit code is 1 when a version was refused or failed, or the audit log is not
whole, 2 for wrong options, 3 when a server is away.
"""

import sys
import time
from contextlib import suppress
from dataclasses import dataclass

import typer
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from mlflow_tracking.command_line import table
from mlflow_tracking.digests import short
from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion.audit import person
from mlflow_tracking.promotion.gates.judge import GateSettingsError
from mlflow_tracking.promotion.ledger import LedgerError, StoreBusy
from mlflow_tracking.promotion.plan import Actual, Release
from mlflow_tracking.promotion.reconcile import Event, Pass, Reconciler
from mlflow_tracking.promotion.torchserve_client import TorchServeError, TorchServeUnavailable
from mlflow_tracking.registry import RegisteredVersion, RegistryError, RegistryUnavailable
from mlflow_tracking.settings import MODEL_NAME, Settings, SettingsError
from scripts.options import known_alias

EPILOG = """
Examples:

  python scripts/promote.py --version 3     # champion is version 3 from now on; deploy it

  python scripts/promote.py                 # deploy what the aliases in MLflow ask for

  python scripts/promote.py --rollback --reason "misses melanomas"   # back to the last good version, in seconds

  python scripts/promote.py --version 3 --force --reason "urgent; agreed with the lab"   # whatever the gates say

  python scripts/promote.py --version 3 --again   # judge it anew: nothing kept from earlier tries counts

  python scripts/promote.py --watch         # deploy what the aliases ask for, again and again

  python scripts/promote.py --status        # what is registered, wanted, loaded, serving, refused
"""
MARKS = {"done": "[green]✓[/]", "waiting": "[yellow]…[/]", "refused": "[red]✗[/]", "failed": "[red]✗[/]"}

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__, epilog=EPILOG)
def promote(
    version: str = typer.Option("", "--version", help="First point the alias at this version."),
    alias: str = typer.Option(
        "",
        "--alias",
        callback=known_alias,
        help="The alias to move: champion, which serves (the default), or challenger, which stands by.",
    ),
    rollback: bool = typer.Option(False, "--rollback", help="Point champion at the last good version."),
    force: bool = typer.Option(False, "--force", help="Let --version serve whatever the gates say; needs --reason."),
    reason: str = typer.Option("", "--reason", help="Why, for the audit log."),
    again: bool = typer.Option(False, "--again", help="Judge --version anew, as if it had never been."),
    watch: bool = typer.Option(False, "--watch", help="Go on until Ctrl-C."),
    status: bool = typer.Option(False, "--status", help="Only show how things stand."),
) -> None:
    if status and (version or watch or rollback):
        raise typer.BadParameter("--status changes nothing; leave --version, --rollback and --watch out.")
    if rollback and (version or force or again or alias):
        raise typer.BadParameter("--rollback chooses the version itself; leave --version and its options out.")
    if (force or again or alias) and not version:
        raise typer.BadParameter("say with --version which one is meant.")
    if reason and not (version or rollback):
        raise typer.BadParameter("--reason says why --version or --rollback; there is neither.")
    if force and not reason:
        raise typer.BadParameter("--force needs --reason: it is kept in the audit log and in MLflow.")
    alias = alias or "champion"
    settings = Settings.load()
    by = f"{person()} with promote.py"
    spinner = console.status("Waiting for the promoter to finish its step …")
    reconciler = Reconciler.create(settings, tell=lambda event: show(event, spinner), by=by)
    if status:
        raise typer.Exit(0 if show_status(reconciler) else 3)
    back = Rollback.planned(reconciler) if rollback else None
    if force:
        reconciler.executor.overruled[version] = {"by": by, "reason": reason}
    moved_to = back.target.version if back else version
    at_once = moved_to and not force and not again
    if at_once:  # a promoter that is busy with another version stops when it sees this
        move(reconciler, alias, moved_to)
    with spinner, ledgers.lock(settings.store, ledgers.LOCK_SECONDS):
        if again:
            reconciler.forget(version)
        if moved_to and not at_once:
            move(reconciler, alias, moved_to)
        if back:
            back.note(reconciler, reason)
        elif version:
            registered = reconciler.registry.version(version)
            reconciler.audit.append(
                "alias moved",
                by,
                alias=alias,
                version=version,
                digest=registered.digest if registered else None,
                forced=force or None,
                reason=reason or None,
            )
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


def move(reconciler: Reconciler, alias: str, version: str) -> None:
    """Point the alias at the version. Raises RegistryError, RegistryUnavailable."""
    reconciler.registry.set_alias(alias, version)
    console.print(f"[green]✓[/] {alias} is version {version}")


@dataclass(frozen=True)
class Rollback:
    """To where, and from where: `left` served when it was planned; None if that is where the way leads."""

    target: Release
    left: Release | None

    @classmethod
    def planned(cls, reconciler: Reconciler) -> "Rollback":
        """Where to go: the last good version, or what serves if the alias asks for something else. RegistryError."""
        book = reconciler.executor.ledger()
        serving, last_good = book.release(book.default), book.release(book.last_good)
        champion = reconciler.registry.resolve("champion")
        # A roll-back that was cut off has moved the alias to the last good version already.
        here = [one.digest for one in (serving, last_good) if one]
        pending = champion is not None and serving is not None and champion.digest not in here
        target, left = (serving, None) if pending else (last_good, serving)
        if target is None:
            raise RegistryError(
                "The model store knows no good version before the one that serves; name one with --version "
                "(--status lists them)."
            )
        registered = reconciler.registry.version(target.version)
        if registered is None or registered.digest != target.digest:
            raise RegistryError(f"Version {target.version} in {reconciler.registry.uri} is not the one that served.")
        return cls(target, left)

    def note(self, reconciler: Reconciler, reason: str) -> None:
        """Write it into ledger and audit log; the caller holds the store's lock."""
        book = reconciler.executor.ledger()
        serving = book.release(book.default)  # a busy promoter may have had another version serve since
        left = {one for one in (self.left, serving) if one and one != self.target}
        for release in left:
            reconciler.executor.withdraw(release)
        newest = serving if serving in left else self.left
        reconciler.audit.append(
            "rollback",
            reconciler.by,
            version=self.target.version,
            digest=self.target.digest,
            previous=newest.version if newest else None,
            previous_digest=newest.digest if newest else None,
            reason=reason or None,
        )


def settle(reconciler: Reconciler) -> Pass:
    """Passes until nothing is left to be done, or something stands in the way."""
    while True:
        result = reconciler.reconcile_locked()
        if not result.waiting and (result.settled or result.errors):
            return result


def show(event: Event, spinner: Status) -> None:
    """Print a step when it ends; while it goes on the spinner tells."""
    if event.state in ("begun", "running"):
        spinner.update(escape(f"{event.step} … {event.remark}"))
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
    # At their longest these take 80 columns, one with both aliases two lines.
    whole = ("Version", "TorchServe", "Status", "Since\n(UTC)", "Bal.\nacc.", "Digest")
    grid = table(f"{MODEL_NAME} in {escape(reconciler.registry.uri)}", whole, folded=["Alias"])
    grid.caption = (
        "Bal. acc.: balanced accuracy on the model's own test split (without one, its validation split), "
        "as its bundle tells."
    )
    for one in sorted(known.values(), key=lambda one: one.created_ms, reverse=True):
        held = actual.loaded.get(one.version)
        place = "" if held is None else "answers" if one.version == actual.default else "ready"
        grid.add_row(
            one.version,
            place if held is None or held.ready else "no worker",
            one.tags.get("serving.status", ""),
            one.tags.get("serving.since", "")[5:16].replace("T", " "),
            one.tags.get("balanced_accuracy", ""),
            short(one.digest or ""),
            " ".join(one.aliases),
        )
    console.print(grid)
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
    except (RegistryError, StoreBusy, LedgerError, GateSettingsError, SettingsError, OSError) as error:
        errors.print(f"[red]{escape(str(error))}[/]")
        sys.exit(1)
