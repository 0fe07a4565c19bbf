"""bench_ranks.py reads the seconds of a run's epochs from its checkpoint and ends the run after them."""

import sys

import pytest

from scripts.studies.bench_ranks import StoppedRunError, epoch_seconds
from training.checkpoints import save

RUN = """
import os, shutil, sys, time
folder, epochs = sys.argv[1], int(sys.argv[2])
for epoch in range(1, epochs + 1):
    os.replace(shutil.copy(f"{folder}/{epoch}.pt", f"{folder}/next.pt"), f"{folder}/last.pt")
    print(f"epoch {epoch}", flush=True)
if epochs > 2:
    time.sleep(600)
"""


def test_a_run_is_timed_and_ended_and_a_failed_one_is_reported(tmp_path):
    history = [{"epoch": epoch, "seconds": epoch / 2} for epoch in (1, 2, 3)]
    for epoch in (1, 2, 3):
        save(tmp_path / f"{epoch}.pt", {"history": history[:epoch]})
    command = [sys.executable, "-c", RUN, str(tmp_path)]
    assert epoch_seconds([*command, "3"], tmp_path, 2) == [0.5, 1.0]
    with pytest.raises(StoppedRunError, match="Its output ends with 'epoch 1"):
        epoch_seconds([*command, "1"], tmp_path, 2)
