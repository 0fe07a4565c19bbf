"""Training by several processes, with two of them and gloo on CPUs.

The same global batches give the same losses as one process, with batch norm over all images and with accumulated
gradients. A run goes on with another number of processes. If a process is killed, or with Ctrl-C, all end with one
sentence, and the last epoch is kept.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch

from tests.tiny_lesions import tiny_manifest
from tests.waiting import eventually
from training import checkpoints, train
from training.config import DEFAULT_PRESET, ROOT, ConfigError, load_config
from training.ranks import Ranks

pytest_plugins = ["tests.fixtures_training"]
pytestmark = pytest.mark.usefixtures("only_the_loop")

NEVER = SimpleNamespace(watch=lambda: None, check=lambda agree=int: None, number=0)  # interrupted
# 47 training images in batches of at most 10: no batch, and no process's part of it, is like the next.
TINY = ["image_size=32", "batch_size=10", "lr=1e-3", "warmup_epochs=1", "threads=1", "precision=fp32",
        "pretrained=false", "metadata=[age]", "randaugment=3", "resample=0.3", "ema_decay=0.9",
        "cache_size=36", "drop_path_rate=0", "mixup_alpha=0", "cutmix_alpha=0"]  # fmt: skip
NETWORKS = {
    "attention": ["architecture=test_vit", "freeze_epochs=1", "outliers=0.1"],
    # No outliers: in blank pictures rounding decides which of equal pixels a maximum takes, and its gradient.
    "batch_norm": ["architecture=test_resnet"],
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """`settings(network)`: of a run with age as an input."""
    manifest = tiny_manifest(tmp_path_factory.mktemp("data"), {"train": 47, "val": 17})
    frame = pd.read_csv(manifest, keep_default_na=False)
    frame.assign(age=np.arange(len(frame)) % 90).to_csv(manifest, index=False)
    return lambda network: [*TINY, *NETWORKS[network], f"manifest={manifest}"]


def start(*args, log):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("w") as output:
        return subprocess.Popen(
            [*command, str(ROOT / "tests" / "rank_worker.py"), *map(str, args)],
            cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip


def alone(folder, settings, *more):
    """Train in this process, or resume the run in `folder`."""
    last = folder / "last.pt"
    checkpoint = checkpoints.load(last) if last.exists() else None
    train.train(load_config(DEFAULT_PRESET, [*settings, *more]), folder, checkpoint, NEVER)
    return checkpoints.load(last)


def assert_equal_runs(first, second):
    """Losses agree to six digits; weights nearly, as AdamW makes steps even of gradients that are only rounding."""
    assert len(first["history"]) == len(second["history"])
    for row, other in zip(first["history"], second["history"], strict=True):
        for figure in ("train_loss", "val_loss"):
            assert row[figure] == pytest.approx(other[figure], rel=1e-6)
        assert row["lr"] == other["lr"]
    assert first["best"]["epoch"] == second["best"]["epoch"]
    for name, tensor in first["ema"].items():
        torch.testing.assert_close(tensor, second["ema"][name], atol=2e-3, rtol=1e-3)


# Run by one start of two processes, which takes seconds; the last one runs until it is ended.
RUNS = {
    "two_attention": ("attention", "epochs=2", "accumulate=2"),
    "two_batch_norm": ("batch_norm", "epochs=2"),
    "one_then_two": ("resumed", "epochs=2"),
    "two_then_one": ("batch_norm", "epochs=1"),
    "endless": ("attention", "epochs=100000", "patience=0"),
}


@dataclass
class Launched:
    """Two processes that train one run after the other in `folder`."""

    folder: Path
    process: subprocess.Popen

    @property
    def text(self) -> str:
        return (self.folder / "log").read_text()

    def wait_for_an_epoch(self, run: str) -> None:
        last = self.folder / run / "last.pt"
        eventually(lambda: (last.exists() and checkpoints.load(last)["epoch"]) or self.process.poll() is not None, 100)
        assert self.process.poll() is None, self.text


@pytest.fixture(scope="module")
def launched(settings, tmp_path_factory) -> Launched:
    """All of RUNS are done, and the last one goes on."""
    folder = tmp_path_factory.mktemp("ranks")
    alone(folder / "first", settings("attention"), "epochs=1")
    shutil.copytree(folder / "first", folder / "one_then_two")
    words = []
    for name, (network, *more) in RUNS.items():
        begin = ["--resume"] if network == "resumed" else [*settings(network), "--output"]
        words += ["+", *begin, folder / name, *more]
    launched = Launched(folder, start(*words, log=folder / "log"))
    try:
        launched.wait_for_an_epoch("endless")
        yield launched
    finally:
        launched.process.kill()
        launched.process.wait()


def ranks_of(process):
    """The training processes in the order of their ranks."""
    workers = psutil.Process(process.pid).children()
    return sorted(workers, key=lambda worker: int(worker.environ()["RANK"]))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ending", ["Ctrl-C", "kill -9 of a process"])
def test_all_processes_end_with_one_sentence_and_keep_the_last_epoch(ending, settings, launched, tmp_path):
    if ending != "Ctrl-C":
        command = [*settings("attention"), "epochs=100000", "patience=0", "--output", tmp_path / "endless"]
        launched = Launched(tmp_path, start(*command, log=tmp_path / "log"))
        launched.wait_for_an_epoch("endless")
    output, before, workers = launched.folder / "endless", launched.text, ranks_of(launched.process)
    assert len(workers) == 2
    if ending == "Ctrl-C":
        launched.process.send_signal(signal.SIGINT)
        sentence = f"whole epochs. Resume with `python training/train.py --resume {output / 'last.pt'}`."
    else:
        workers[0].kill()  # rank 0, so that the other has to speak
        sentence = f"Resume with `torchrun training/train.py --resume {output / 'last.pt'}`"
    began = time.monotonic()
    assert launched.process.wait(60) != 0
    assert time.monotonic() - began < 25  # torchrun kills after 30 seconds
    assert not any(worker.is_running() for worker in workers)
    text = launched.text.removeprefix(before)
    assert text.count(sentence) == 1, text
    assert text.count("after") == 1
    kept = checkpoints.load(output / "last.pt")
    assert kept["epoch"] >= 1
    assert alone(output, settings("attention"), f"epochs={kept['epoch'] + 1}")["epoch"] == kept["epoch"] + 1


@pytest.mark.timeout(300)
def test_two_processes_and_one_give_the_same_losses_and_continue_each_others_runs(settings, launched, tmp_path):
    whole = {name: alone(tmp_path / name, settings(name), "epochs=2") for name in NETWORKS}
    assert launched.text.count("finished by the writer") == len(RUNS) - 1
    assert launched.text.count("47 training and 17 validation images") == len(RUNS)
    for name in NETWORKS:
        assert_equal_runs(checkpoints.load(launched.folder / f"two_{name}" / "last.pt"), whole[name])
    assert_equal_runs(checkpoints.load(launched.folder / "one_then_two" / "last.pt"), whole["attention"])
    continued = alone(launched.folder / "two_then_one", settings("batch_norm"), "epochs=2")
    assert_equal_runs(continued, whole["batch_norm"])


def test_too_small_batches_and_devices_of_one_process_are_refused():
    ranks = Ranks(0, 4)
    with pytest.raises(ConfigError, match="Batches of 7 images and 9 validation images cannot be divided among 4"):
        ranks.check_sizes(14, 9, load_config(None, ["batch_size=8", "accumulate=2"]))
    ranks.check_sizes(16, 9, load_config(None, ["batch_size=8", "accumulate=2"]))
    with pytest.raises(ConfigError, match="device=mps trains in one process"):
        ranks.device(torch.device("mps"))
    assert Ranks().device(torch.device("mps")).type == "mps"
