"""Download public data sets of skin lesions from their publishers, ready for prepare_data.py."""

from pathlib import Path
from typing import Annotated

import requests
import typer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from handlers.errors import UsageError
from mlflow_tracking.command_line import console, run, table
from mlflow_tracking.stack_settings import ROOT
from training.data.download import choose, fetch, list_files, read_catalogue

EXAMPLES = [
    "python scripts/fetch_data.py                           # lists the data sets and their licences",
    "python scripts/fetch_data.py ham10000",
    "python scripts/fetch_data.py isic2019 bcn20000 --out /data/skin",
]


def main(
    names: Annotated[list[str] | None, typer.Argument(help="Data sets; without a name, they are listed.")] = None,
    out: Annotated[Path, typer.Option(help="Folder that gets one folder for each data set.")] = ROOT / "data",
) -> None:
    """Download public data sets, verify and unpack them.

    An interrupted download resumes where it stopped. Each data set has its licence, which applies to you: read it
    before you use the images. Derm7pt needs a request to its authors: https://derm.cs.sfu.ca
    """
    catalogue = read_catalogue()
    if not names:
        grid = table("Data sets", ("Name", "Licence"), folded=("Contents",))
        for name, data_set in catalogue.items():
            grid.add_row(name, data_set.licence, data_set.title)
        console.print(grid)
        return
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out is {out}, which is a file: name a folder.")
    session = requests.Session()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeRemainingColumn(),
    )
    for name, data_set in choose(catalogue, names).items():
        folder = out / name
        console.print(f"{data_set.title}\n  Licence: {data_set.licence}\n  Cite: {data_set.cite}")
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
            tasks: dict[str, TaskID] = {}

            def show(
                title: str, done: int, total: int, bars: Progress = bars, tasks: dict[str, TaskID] = tasks
            ) -> None:
                task = tasks.setdefault(title, TaskID(-1))
                if task == -1:
                    task = tasks[title] = bars.add_task(title, total=None)
                bars.update(task, completed=done, total=total or None)

            for file in list_files(data_set, session):
                fetch(file, folder, session, show)
                console.print(f"  {file.name}")
        console.print(f"Next: python scripts/prepare_data.py --data {folder}")


if __name__ == "__main__":
    run(main, EXAMPLES)
