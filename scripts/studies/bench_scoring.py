"""Benchmark of scripts/score.py: its speed as a share of the graph and of decoding alone, and its memory."""

import math
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Barrier
from typing import Annotated, NamedTuple

import numpy as np
import psutil
import typer
from PIL import Image
from pyarrow import parquet

from handlers.errors import UserError
from mlflow_tracking.command_line import console, run, table
from mlflow_tracking.stack_settings import ROOT, SHIPPED, Settings
from scripts.archive_scoring import BATCH, SMALL_PIECE, PieceScorer, prepare
from scripts.studies.idle_machine import BusyOption, require_idle_machine
from training.data.synthetic import draw_lesion

CORES = len(os.sched_getaffinity(0))
ALONE_SECONDS = 4.0
# Ray's workers otherwise give way to other programs, which the graph and decoding alone do not.
ENVIRONMENT = {"RAY_ADDRESS": "", "RAY_worker_niceness": "0"}
SIZES = {(200, 150): 64, (600, 450): 64, (4000, 3000): 4}  # width and height; how many pictures differ
LEAST_ROWS = 1000  # of the comparison of memory
POLL = 0.1


class Pace(NamedTuple):
    """Pictures a second on all cores, and seconds of score.py's start and end."""

    graph: float
    decoding: float
    scoring: float
    start: float

    @property
    def bound(self) -> float:
        """Pictures a second if each core decodes and runs the graph, and does nothing else."""
        return 1 / (1 / self.graph + 1 / self.decoding)


ROWS: dict[str, Callable[[Pace], str]] = {
    "graph alone": lambda pace: f"{pace.graph:.1f}",
    "decoding alone": lambda pace: f"{pace.decoding:.1f}",
    "bound": lambda pace: f"{pace.bound:.1f}",
    "score.py": lambda pace: f"{pace.scoring:.1f}",
    "share of the graph": lambda pace: f"{pace.scoring / pace.graph:.2f}",
    "share of decoding": lambda pace: f"{pace.scoring / pace.decoding:.2f}",
    "share of the bound": lambda pace: f"{pace.scoring / pace.bound:.2f}",
    "start and end, s": lambda pace: f"{pace.start:.0f}",
}


class ScoringRecord(NamedTuple):
    """A run of score.py: pictures a second, seconds in all, peaks of memory in MB, bytes of a row of its scores."""

    rate: float
    seconds: float
    driver: float
    worker: float
    row_bytes: float


def main(
    pieces: Annotated[int, typer.Option(min=4 * CORES, help=f"Pieces of each archive, of {SMALL_PIECE} pictures.")] = 6
    * CORES,
    rounds: Annotated[int, typer.Option(min=1, help="Repetitions; the table has the medians.")] = 3,
    memory: Annotated[int, typer.Option(help="Instead: compare the memory of 1,000 rows and so many.")] = 0,
    bundle: Annotated[Path, typer.Option(help="A bundle folder.")] = SHIPPED,
    busy: BusyOption = False,
) -> None:
    """Measure the graph alone, decoding alone and score.py in turn, on all cores of an otherwise idle machine.

    The graph and decoding run in one process for each core, of one thread. `bound` is the speed of both together if
    they share the cores without a loss. score.py's speed leaves out the time to the end of the second piece of each
    worker, and the summary; the last row shows how long start and end take. Pictures are drawn, with noise.
    """
    with tempfile.TemporaryDirectory() as folder:
        if memory:
            measure_memory(Path(folder), bundle, memory)
        else:
            require_idle_machine(busy)
            measure_speed(Path(folder), bundle, pieces * SMALL_PIECE, rounds)


def measure_memory(folder: Path, bundle: Path, most: int) -> None:
    """Print the memory that an archive of 1,000 rows and one of `most` rows need.

    To take minutes and not hours, one of 256 rows is a picture, and the others are files that do not exist.
    """
    files = draw(folder / "pictures", (200, 150), 1) + [folder / "missing.jpg"] * 255
    grid = table("Memory", ("rows", "driver, MB", "worker, MB", "bytes a row", "seconds"))
    for rows in sorted({LEAST_ROWS, most}):
        record = score(folder / f"out-{rows}", archive(folder, files, rows), bundle, watch=True)
        figures = (record.driver, record.worker, record.row_bytes, record.seconds)
        grid.add_row(f"{rows:,}", *(f"{figure:.0f}" for figure in figures))
    console.print(grid)


def measure_speed(folder: Path, bundle: Path, rows: int, rounds: int) -> None:
    """Print the speed of the parts and of the whole for each size of picture."""
    files = {size: draw(folder / f"{size[0]}", size, count) for size, count in SIZES.items()}
    paces: dict[tuple[int, int], list[Pace]] = {size: [] for size in SIZES}
    for turn in range(rounds):
        for size in SIZES:
            source = archive(folder, files[size], rows)
            parts = alone(folder / f"alone-{size[0]}-{turn}", source, files[size], bundle)
            record = score(folder / f"out-{size[0]}-{turn}", source, bundle)
            paces[size].append(Pace(*parts, record.rate, record.seconds - rows / record.rate))
    medians = [Pace(*np.median(measured, axis=0).tolist()) for measured in paces.values()]
    grid = table(f"Pictures a second on {CORES} cores", ("", *(f"{width}×{height}" for width, height in SIZES)))
    for name, value in ROWS.items():
        grid.add_row(name, *(value(pace) for pace in medians))
    console.print(grid)


def draw(folder: Path, size: tuple[int, int], count: int) -> list[Path]:
    """Write drawn lesions with a sensor's noise as JPEG of quality 90."""
    folder.mkdir()
    files = [folder / f"{seed}.jpg" for seed in range(count)]
    for seed, file in enumerate(files):
        picture = np.asarray(draw_lesion(seed, "NV").resize(size, Image.Resampling.BICUBIC), np.float32)
        noise = np.random.default_rng(seed).standard_normal(picture.shape, np.float32) * 4
        Image.fromarray((picture + noise).clip(0, 255).astype(np.uint8)).save(file, quality=90)
    return files


def archive(folder: Path, files: list[Path], rows: int) -> Path:
    """Write a table of so many rows, which repeat the files."""
    path = folder / f"{files[0].parent.name}-{rows}.csv"
    with path.open("w") as file:
        file.write("path\n")
        file.writelines(f"{files[row % len(files)]}\n" for row in range(rows))
    return path


def alone(folder: Path, source: Path, files: list[Path], bundle: Path) -> tuple[float, float]:
    """Return pictures a second of the graph alone and of decoding alone, on all cores together."""
    (folder / "scores").mkdir(parents=True)
    prepare(folder, str(source), bundle, "auto", Settings.load().completed_bundles)
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, ProcessPoolExecutor(CORES, context) as pool:
        barrier = manager.Barrier(CORES)
        rates = list(pool.map(alone_on_one_core, [folder] * CORES, [files[:BATCH]] * CORES, [barrier] * CORES))
    return sum(graph for graph, _ in rates), sum(decoding for _, decoding in rates)


def alone_on_one_core(folder: Path, files: list[Path], barrier: Barrier) -> tuple[float, float]:
    """Return pictures a second of the graph and of decoding here, while all processes measure the same."""
    predictor = PieceScorer(folder).predictor
    preprocessing, contents = predictor.config.preprocessing, [file.read_bytes() for file in files]
    pixels = np.stack([preprocessing(contents[number % len(files)])[0] for number in range(BATCH)])
    targets = np.full(BATCH, -1)
    graph = repeated(lambda: predictor.runtime(pixels, targets), BATCH, barrier)
    return graph, repeated(lambda: [preprocessing(data) for data in contents], len(contents), barrier)


def repeated(work: Callable[[], object], pictures: int, barrier: Barrier) -> float:
    """Repeat the work with so many pictures, and return pictures a second. Starts when all processes do."""
    work()
    barrier.wait()
    count, began = 0, time.perf_counter()
    while (seconds := time.perf_counter() - began) < ALONE_SECONDS:
        work()
        count += pictures
    return count / seconds


def score(out: Path, source: Path, bundle: Path, watch: bool = False) -> ScoringRecord:
    """Run score.py, and watch the memory of its processes if asked, which costs some speed.

    Raises:
        UserError: score.py fails.
    """
    command = [sys.executable, "scripts/score.py", str(source), "--out", str(out), "--bundle", str(bundle)]
    driver = worker = 0.0
    began = time.perf_counter()
    process = psutil.Popen(command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=sys.stderr)
    while watch and process.poll() is None:
        for name, size in processes(process):
            driver = max(driver, size if "scripts/score.py" in name else 0)
            worker = max(worker, size if "PieceScorer" in name else 0)
        time.sleep(POLL)
    code = process.wait()
    seconds = time.perf_counter() - began
    if code:
        raise UserError(f"The command score.py ended with code {code} on {source}. Its messages are above.")
    paths = sorted((out / "scores").glob("part-*"), key=lambda path: path.stat().st_mtime_ns)
    rows = [parquet.read_metadata(path).num_rows for path in paths]
    rate = steady_rate([path.stat().st_mtime for path in paths], rows, CORES)
    size = sum(path.stat().st_size for path in paths)
    return ScoringRecord(rate, seconds, driver, worker, size / sum(rows))


def steady_rate(ends: list[float], rows: list[int], workers: int) -> float:
    """Return rows a second from the sorted times at which pieces end, without the first two pieces of each worker."""
    first = 2 * workers
    return sum(rows[first:]) / (ends[-1] - ends[first - 1]) if len(ends) > first else math.nan


def processes(process: psutil.Process) -> Iterator[tuple[str, float]]:
    """Yield the command and the resident MB of a process and its descendants."""
    for member in (process, *process.children(recursive=True)):
        with suppress(psutil.Error), member.oneshot():
            yield " ".join(member.cmdline()), member.memory_info().rss / 1e6


if __name__ == "__main__":
    run(
        main,
        examples=[
            "python scripts/studies/bench_scoring.py  # eight minutes on two idle cores",
            "python scripts/studies/bench_scoring.py --memory 1000000",
        ],
    )
