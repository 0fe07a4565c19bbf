"""Plan the scoring of a large archive: measure a sample of it on this machine, then compute hours and storage."""

import multiprocessing
import os
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from pyarrow import parquet

from handlers.errors import UserError
from mlflow_tracking.command_line import console, run, table
from mlflow_tracking.stack_settings import SHIPPED, Settings
from scripts.archive_pictures import read_picture
from scripts.archive_scoring import PieceScorer, prepare

SIZES = (1_000_000, 100_000_000)  # pictures
CORES = (16, 256)
EXAMPLES = ["python scripts/studies/archive_plan.py data/sample"]


class MeasuredSample(NamedTuple):
    """Pictures a second on one core while all measured cores work, and bytes for each picture."""

    rate: float
    picture_bytes: float
    score_bytes: float  # in OUT: the list of pictures and the scores


class ArchivePlan(NamedTuple):
    """What an archive of a size needs; the bytes are of pictures and of OUT."""

    core_hours: float
    picture_bytes: float
    score_bytes: float


def plan(sample: MeasuredSample, pictures: int) -> ArchivePlan:
    """Compute the plan of an archive whose pictures are like the sample's."""
    seconds = pictures / sample.rate
    return ArchivePlan(seconds / 3600, pictures * sample.picture_bytes, pictures * sample.score_bytes)


def measure(source: str, bundle: Path, workers: int, seconds: float, cache: Path) -> MeasuredSample:
    """Score the first piece of a source again and again, in one process for each core.

    Raises:
        UserError: no picture can be scored.
        BundleError, SourceFault
    """
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary, str(number)) for number in range(workers)]
        (folders[0] / "scores").mkdir(parents=True)
        scoring = prepare(folders[0], source, bundle, "auto", cache)
        for folder in folders[1:]:  # a piece has one worker at a time
            shutil.copytree(folders[0], folder)
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            rates = list(pool.map(pictures_per_second, folders, [seconds] * workers))
        scores = parquet.read_table(scoring.file(0), columns=["path", "error_code"], partitioning=None)
        scored = [row["path"] for row in scores.to_pylist() if row["error_code"] is None]
        if not scored:
            raise UserError(f"None of the first {len(scores)} pictures of {source} can be scored. Choose others.")
        listed = (folders[0] / "input.parquet").stat().st_size / scoring.rows
        return MeasuredSample(
            sum(rates) / workers,
            sum(len(read_picture(path)) for path in scored) / len(scored),
            listed + scoring.file(0).stat().st_size / len(scores),
        )


def pictures_per_second(folder: Path, seconds: float) -> float:
    """Return the rate of a worker, without its start."""
    scorer, pictures = PieceScorer(folder), 0
    scorer.score(0)
    begin = time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < seconds or not pictures:
        pictures += scorer.score(0)[0]
    return pictures / elapsed


def main(
    source: Annotated[str, typer.Argument(help="A sample: whatever scripts/score.py takes. 256 pictures are enough.")],
    bundle: Annotated[Path, typer.Option(help="A bundle folder.")] = SHIPPED,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes of one thread.", show_default="one for each core")
    ] = None,
    seconds: Annotated[float, typer.Option(min=0.1, help="The length of the measurement.")] = 30,
) -> None:
    """Plan the scoring of archives of a million and of a hundred million pictures.

    The files of the sample are in memory when they are read. The plan therefore needs a disk or network that reads as
    fast as the printed rate.
    """
    count = workers or len(os.sched_getaffinity(0))
    if "://" not in source:
        source = str(Path(source).expanduser().absolute())
    sample = measure(source, bundle, count, seconds, Settings.load().completed_bundles)
    console.print(
        f"{sample.rate:.1f} pictures/s on each of {count} cores; {sample.picture_bytes / 1e3:.0f} kB a picture, so "
        f"{sample.rate * sample.picture_bytes / 1e6:.1f} MB/s to read for each core; {sample.score_bytes:.0f} bytes of "
        "results a picture."
    )
    titles = ("pictures", "core-hours", *(f"h, {cores} cores" for cores in CORES), "pictures, GB", "results, GB")
    rows = table("Plan", titles)
    for pictures in SIZES:
        needs = plan(sample, pictures)
        hours = (f"{needs.core_hours / cores:,.1f}" for cores in CORES)
        storage = (f"{size / 1e9:,.1f}" for size in (needs.picture_bytes, needs.score_bytes))
        rows.add_row(f"{pictures:,}", f"{needs.core_hours:,.1f}", *hours, *storage)
    console.print(rows)


if __name__ == "__main__":
    run(main, examples=EXAMPLES)
