"""Compare the training speed of several processes of one thread with that of one process of as many threads.

Both run training/train.py with the same settings on the same cores, so with the same global batches. Each run is
stopped after its epochs. The rounds alternate, so that other load on the machine affects both; compare the ratio.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from handlers.errors import UserError
from mlflow_tracking.command_line import console, run, table
from training.checkpoints import LAST, load
from training.config import ROOT
from training.data.manifest import read_manifest

TRAIN = str(ROOT / "training" / "train.py")


class StoppedRunError(UserError):
    """A run ended before its epochs."""


def epoch_seconds(command: list[str], output: Path, epochs: int) -> list[float]:
    """Return the seconds of a run's first epochs, validation included, and end the run after them.

    Raises:
        StoppedRunError: the run ended before.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": f"sqlite:///{output}.db"}
    lines: list[str] = []
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        for line in process.stdout or ():
            lines.append(line)
            if line.startswith("epoch ") and sum(text.startswith("epoch ") for text in lines) == epochs:
                process.terminate()
    if sum(text.startswith("epoch ") for text in lines) < epochs:
        raise StoppedRunError(f"A run ended before its epochs. Its output ends with {''.join(lines[-5:])!r}.")
    return [row["seconds"] for row in load(output / LAST)["history"][:epochs]]


def main(
    data: Annotated[Path, typer.Option(help="A manifest.csv, as prepare_data.py writes it.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings, as for train.py.")
    ] = None,
    config: Annotated[str, typer.Option(help="A preset of training/configs by name, or a YAML file.")] = "dermoscopy",
    processes: Annotated[int, typer.Option(min=2, help="Processes of one thread, and threads of one process.")] = 2,
    epochs: Annotated[int, typer.Option(min=2, help="Epochs of a run; the first is not counted.")] = 3,
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each kind.")] = 2,
) -> None:
    """Compare the training speed of several processes of one thread with that of one process of as many threads."""
    images = int((read_manifest(data)["split"] == "train").sum())
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    kinds = {f"1 process, {processes} threads": ([], processes), f"{processes} processes, 1 thread": (torchrun, 1)}
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(rounds):
        for name, (launcher, threads) in kinds.items():
            with tempfile.TemporaryDirectory() as folder:
                output = Path(folder) / str(number)
                settings = [f"manifest={data.resolve()}", f"threads={threads}", f"epochs={epochs + 1}"]
                command = [sys.executable, *launcher, TRAIN, "--config", config, "--output", str(output)]
                seconds = epoch_seconds([*command, *(overrides or ()), *settings], output, epochs)
                rates[name] += [images / value for value in seconds[1:]]
    base = statistics.median(next(iter(rates.values())))
    grid = table("", ("training by", "images/s, median", "range", "of one process"))
    for name, values in rates.items():
        median = statistics.median(values)
        grid.add_row(name, f"{median:.1f}", f"{min(values):.1f} to {max(values):.1f}", f"{median / base:.2f}")
    console.print(f"{config} {' '.join(overrides or ())}, {images:,} images an epoch, load {os.getloadavg()[0]:.1f}")
    console.print(grid)


if __name__ == "__main__":
    run(
        main,
        examples=[
            "python scripts/studies/bench_ranks.py --data data/manifest.csv --config dermoscopy output_stride=32"
        ],
    )
