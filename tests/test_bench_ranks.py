"""bench_ranks.py reads the seconds of a run's epochs from its checkpoint and ends the run after them."""

import sys

import pytest

from scripts.studies.bench_ranks import StoppedRunError, epoch_seconds

RUN = """
import sys, time
from pathlib import Path
from training.checkpoints import save
history = []
for epoch in range(1, int(sys.argv[2]) + 1):
    history.append({"epoch": epoch, "seconds": epoch / 2})
    save(Path(sys.argv[1]) / "last.pt", {"history": history})
    print(f"epoch {epoch}", flush=True)
if len(history) > 2:
    time.sleep(600)
"""


@pytest.mark.timeout(120)
def test_a_run_is_timed_and_ended_and_a_failed_one_is_reported(tmp_path):
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", RUN, str(tmp_path / "run")]
    assert epoch_seconds([*command, "3"], tmp_path / "run", 2) == [0.5, 1.0]
    with pytest.raises(StoppedRunError, match="Its output ends with 'epoch 1"):
        epoch_seconds([*command, "1"], tmp_path / "run", 2)
