"""A process of a training run for tests/test_ranks.py: training/train.py without MLflow and without its last steps.

`torchrun tests/rank_worker.py [ARGS] [+ ARGS]...` runs train.py once for each list of arguments. The processes join
once, since torch does not let them join again, and part in the last run.
"""

import sys
from contextlib import nullcontext
from itertools import groupby

import typer

from mlflow_tracking.command_line import run
from tests.tiny_lesions import without_mlflow
from training import train
from training.ranks import Ranks, joined


def main() -> None:
    """Run train.py for each list of arguments."""
    runs = [list(group) for is_plus, group in groupby(words, lambda word: word == "+") if not is_plus]
    app = typer.Typer()
    app.command()(train.main)
    command = typer.main.get_command(app)
    with without_mlflow() as monkeypatch, joined() as ranks:
        monkeypatch.setattr(train, "finish", lambda *args: train.console.print("finished by the writer"))
        monkeypatch.setattr(train, "joined", lambda: nullcontext(ranks))
        part = Ranks.part
        for number, arguments in enumerate(runs, start=1):
            monkeypatch.setattr(Ranks, "part", part if number == len(runs) else lambda self: None)
            command(arguments, standalone_mode=False)


if __name__ == "__main__":
    words, sys.argv[1:] = sys.argv[1:], []
    run(main)
