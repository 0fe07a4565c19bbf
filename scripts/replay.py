"""Compare champion and challenger on the same pictures."""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from handlers.errors import UsageError
from mlflow_tracking.command_line import console, run
from mlflow_tracking.promotion.answers import AnswerBook
from mlflow_tracking.promotion.champion_comparison import compare, replay_folder
from mlflow_tracking.promotion.evaluation_set import CurrentSet
from mlflow_tracking.promotion.execute import JUDGEMENTS
from mlflow_tracking.promotion.gates.judgement_report import write_replay
from mlflow_tracking.promotion.locks import LOCK_SECONDS, lock
from mlflow_tracking.promotion.observe import Observer
from mlflow_tracking.promotion.plan import Release
from mlflow_tracking.registry import Registry, RegistryError
from mlflow_tracking.stack_settings import Settings
from mlflow_tracking.torchserve_client import TorchServe

REPLAY = "replay"  # the report's folder among the challenger's artifacts


def replay(
    samples: Annotated[
        list[Path] | None, typer.Option(exists=True, file_okay=False, help="A folder of pictures to add; repeatable.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the tables as JSON.")] = False,
) -> None:
    """Compare champion and challenger on the same pictures.

    First point the alias challenger at a version and wait until the promoter
    has loaded it. The pictures are those of the frozen evaluation set and of
    folders named with --samples; live requests are not kept. The report (JSON
    and HTML) has agreement, flips between benign and malignant, and latency.
    MLflow stores it with the challenger's version. Exit codes: 0 done, 1 a
    version or the pictures are missing, 2 wrong options, 3 a server does not
    answer.
    """
    settings = Settings.load()
    registry = Registry(settings.registry_uri)
    torchserve = TorchServe(settings.inference_url, settings.management)
    champion, challenger = loaded_pair(registry, Observer(settings.store, torchserve))
    book = AnswerBook(settings.store / JUDGEMENTS)
    tables: dict[str, Any] = {}
    with console.status("Both versions answer …"):
        # The promoter uses the same set and answers. Its gates have collected most answers already.
        with lock(settings.store, LOCK_SECONDS):
            if evaluation := CurrentSet(registry, settings.evaluation_cache).get():
                before, after = (book.complete(torchserve, release, evaluation) for release in (champion, challenger))
                tables["frozen evaluation set"] = compare(evaluation, before, after)
        for folder in samples or []:
            tables[str(folder)] = replay_folder(torchserve, folder, champion, challenger)
    torchserve.close()
    if not tables:
        raise UsageError("There are no pictures: freeze an evaluation set, or name a folder with --samples.")
    with tempfile.TemporaryDirectory() as temporary:
        write_replay(Path(temporary), champion.version, challenger.version, tables)
        registry.log_report(challenger.version, Path(temporary), REPLAY)
    if as_json:
        print(json.dumps(tables, indent=1))
        return
    for name, table in tables.items():
        show(name, table, {"champion": champion, "challenger": challenger})


def loaded_pair(registry: Registry, observer: Observer) -> tuple[Release, Release]:
    """Return champion and challenger, both loaded in TorchServe. Raises RegistryError."""
    actual = observer.actual_state()
    loaded = {version.release for version in actual.loaded.values() if version.ready}
    if actual.serving is None or actual.serving not in loaded:
        raise RegistryError("No champion serves. Deploy one with `promote.py to VERSION`.")
    challenger = registry.resolve("challenger")
    if challenger is None:
        raise RegistryError("No version is challenger. Choose one with `promote.py to VERSION --alias challenger`.")
    release = Release(challenger.version, challenger.digest or "")
    if release not in loaded:
        reason = challenger.tags.get("serving.reason") or "The promoter has not loaded it yet."
        raise RegistryError(f"The challenger, version {release.version}, is not loaded. {reason}")
    return actual.serving, release


def show(name: str, table: dict[str, Any], releases: dict[str, Release]) -> None:
    """Print one table."""
    console.print(
        f"{name}: {table['images']} pictures, {table['agreement']:.1%} agree, "
        f"{table['into_malignant']} turn malignant, {table['out_of_malignant']} turn benign",
        style="bold",
    )
    for file, reason in table.get("refused", {}).items():
        console.print(f"  {file} was left out: {reason}", style="yellow")
    for role, release in releases.items():
        figures = table[role]
        line = f"p50 {figures['p50_milliseconds']:.0f} ms, p95 {figures['p95_milliseconds']:.0f} ms"
        if "balanced_accuracy" in figures:
            line += f", balanced accuracy {figures['balanced_accuracy']:.3f}"
        console.print(f"  {role} (version {release.version}): {line}")


if __name__ == "__main__":
    run(
        replay,
        examples=["python scripts/replay.py", "python scripts/replay.py --samples clinic/2026-11"],
    )
