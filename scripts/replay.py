"""What would change if the challenger answered: champion and challenger asked about the same pictures.

Both must be loaded: point the alias challenger at a version and wait for
the promoter. The pictures are those of the frozen evaluation set, and, if
you name folders with --samples, your own: live requests are not kept, so
only pictures given on purpose can be replayed. The report (JSON and HTML)
tells agreement, flips into and out of malignant, and latency; it is kept
with the challenger's version in MLflow. The exit code is 1 when something
is missing, 2 for wrong options, 3 when a server is away.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape

from mlflow_tracking.promotion.answers import AnswerBook
from mlflow_tracking.promotion.comparison import replay_samples, replay_set
from mlflow_tracking.promotion.evaluation_set import CurrentSet, EvaluationSetError
from mlflow_tracking.promotion.execute import JUDGEMENTS
from mlflow_tracking.promotion.gates.judgement_report import write_replay
from mlflow_tracking.promotion.ledger import LedgerError
from mlflow_tracking.promotion.locks import LOCK_SECONDS, lock
from mlflow_tracking.promotion.observe import Observer
from mlflow_tracking.promotion.plan import Release
from mlflow_tracking.promotion.torchserve_client import TorchServe, TorchServeError, TorchServeUnavailable
from mlflow_tracking.registry import Registry, RegistryError, RegistryUnavailable
from mlflow_tracking.settings import Settings, SettingsError
from training.data.sources import IMAGE_ENDINGS

EPILOG = """
Examples:

  python scripts/replay.py

  python scripts/replay.py --samples clinic/2026-11 --out replay
"""
REPLAY = "replay"  # where the report lies among the challenger's artifacts

console = Console(highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(help=__doc__, epilog=EPILOG)
def replay(
    samples: list[Path] = typer.Option(
        [], "--samples", exists=True, file_okay=False, help="A folder of pictures to ask about as well; repeat."
    ),
    out: Path = typer.Option(None, "--out", help="Also write the report into this folder."),
    as_json: bool = typer.Option(False, "--json", help="Print the tables as JSON."),
) -> None:
    settings = Settings.load()
    registry = Registry(settings.registry_uri)
    torchserve = TorchServe(settings.inference_url, settings.management)
    champion, challenger = both(registry, Observer(settings.store, torchserve))
    book = AnswerBook(settings.store / JUDGEMENTS)
    tables: dict[str, Any] = {}
    with console.status("Asking both versions …"):
        # Set and answers are the promoter's too. Its gates have asked both versions already, so this is short.
        with lock(settings.store, LOCK_SECONDS):
            if (evaluation := CurrentSet(registry, settings.evaluation_cache).get()) is not None:
                table = replay_set(torchserve, book, evaluation, champion, challenger)
                tables["frozen evaluation set"] = table
        for folder in samples:
            found = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
            files = sorted(path for path in found if not path.name.startswith("."))  # macOS leaves ._NAME.jpg
            if not files:
                raise RegistryError(f"{folder} holds no pictures ({', '.join(sorted(IMAGE_ENDINGS))}).")
            tables[str(folder)] = replay_samples(torchserve, files, champion, challenger)
    torchserve.close()
    if not tables:
        raise RegistryError("There is nothing to replay: freeze an evaluation set, or name folders with --samples.")
    with tempfile.TemporaryDirectory() as temporary:
        write_replay(Path(temporary), champion.version, challenger.version, tables)
        registry.log_report(challenger.version, Path(temporary), REPLAY)
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_replay(out, champion.version, challenger.version, tables)
    if as_json:
        print(json.dumps(tables, indent=1))
        return
    for name, table in tables.items():
        console.print(
            f"[bold]{escape(name)}[/]: {table['images']} pictures, {table['agreement']:.1%} agree; "
            f"{table['into_malignant']} turn malignant, {table['out_of_malignant']} turn benign"
        )
        for refused, reason in table.get("refused", {}).items():
            console.print(f"  [yellow]{escape(refused)} was left out:[/] {escape(reason)}")
        for who, version in (("champion", champion), ("challenger", challenger)):
            figures = table[who]
            quality = (
                f", balanced accuracy {figures['balanced_accuracy']:.3f}" if "balanced_accuracy" in figures else ""
            )
            times = f"p50 {figures['p50_milliseconds']:.0f} ms, p95 {figures['p95_milliseconds']:.0f} ms"
            console.print(f"  {who} (version {version.version}): {times}{quality}")


def both(registry: Registry, observer: Observer) -> tuple[Release, Release]:
    """What serves and what stands by, both loaded. Raises RegistryError."""
    challenger = registry.resolve("challenger")
    actual = observer.actual_state()
    loaded = {held.release for held in actual.loaded.values() if held.ready}
    if actual.serving is None or actual.serving not in loaded:
        raise RegistryError("No champion is served; nothing to compare with.")
    if challenger is None:
        raise RegistryError("No version is challenger. Name one with `promote.py to VERSION --alias challenger`.")
    release = Release(challenger.version, challenger.digest or "")
    if release not in loaded:
        reason = challenger.tags.get("serving.reason") or "the promoter has not brought it up yet"
        raise RegistryError(f"The challenger, version {release.version}, is not loaded: {reason.rstrip('.')}.")
    return actual.serving, release


if __name__ == "__main__":
    try:
        app()
    except (RegistryUnavailable, TorchServeUnavailable) as error:
        errors.print(f"[red]{escape(str(error))}[/]")
        sys.exit(3)
    except (RegistryError, TorchServeError, EvaluationSetError, LedgerError, SettingsError, OSError) as error:
        errors.print(f"[red]{escape(str(error))}[/]")
        sys.exit(1)
