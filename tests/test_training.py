"""Training.

A resumed run equals the uninterrupted run to the last bit and continues in the same MLflow run, even after kill -9.
SIGTERM leaves a checkpoint and a run marked KILLED. A run that could not finish is refused before it begins. A user's
mistake is one sentence and an exit code.
"""

import json
import os
import shutil
import signal

import numpy as np
import pandas as pd
import pytest
import torch

from handlers.bundle import Bundle
from handlers.predictor import Predictor
from tests.tiny_lesions import printed, tiny_manifest
from training import checkpoints, evaluate, finish, train
from training.config import load_config
from training.data.image_cache import DataError
from training.evaluation.served_predictions import predict_rows
from training.interruption import Interrupted

pytest_plugins = ["tests.fixtures_training"]
pytestmark = [
    pytest.mark.usefixtures("only_the_loop"),
    # MLflow's database models use an option that SQLAlchemy will drop.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
]

# timm's smallest vision transformer, made for tests
TINY = ["architecture=test_vit", "image_size=32", "batch_size=16", "lr=1e-3", "warmup_epochs=1", "bootstrap=10",
        "threads=1", "precision=fp32"]  # fmt: skip


# ---- checkpoints


def test_checkpoints_are_atomic_and_plain(tmp_path):
    path = tmp_path / "last.pt"
    checkpoints.save(path, {"tensor": torch.ones(2), "history": [{"epoch": 1}], "best": None})
    assert torch.load(path, weights_only=True)["history"] == [{"epoch": 1}]
    with pytest.raises(Exception, match="pickle"):
        checkpoints.save(path, {"unpicklable": (x for x in ())})
    assert checkpoints.load(path)["tensor"].tolist() == [1, 1]
    assert [file.name for file in tmp_path.iterdir()] == ["last.pt"]


def test_a_checkpoint_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"model": Evil()}, tmp_path / "last.pt")
    with pytest.raises(checkpoints.CheckpointError, match="not a checkpoint of this project"):
        checkpoints.load(tmp_path / "last.pt")
    assert not (tmp_path / "ran").exists()


# ---- the loop, in this process


class StopAfter:
    """An interruption after this number of checks."""

    number = 0

    def __init__(self, checks=10**9):
        self.left = checks

    def watch(self):
        pass

    def check(self, agree=int):
        self.left -= 1
        if not self.left:
            self.number = signal.SIGTERM
            raise Interrupted(signal.SIGTERM)


def run(output, *settings, resume=False, stop=None):
    output.mkdir(exist_ok=True)
    checkpoint = checkpoints.load(output / "last.pt") if resume else None
    train.train(load_config(None, [*TINY, *settings]), output, checkpoint, stop or StopAfter())
    return checkpoints.load(output / "last.pt")


def history(state):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in state["history"]]


EVERYTHING = ["drop_rate=0.2", "drop_path_rate=0.2", "mixup_alpha=0.2", "cutmix_alpha=1", "sampler_power=0.5",
              "ema_decay=0.9", "precision=bf16", "cache_size=36", "head_hidden=[16]", "randaugment=5",
              "layer_decay=0.8", "freeze_epochs=1", "scheduler=restarts", "restart_epochs=1"]  # fmt: skip


def test_a_resumed_run_is_the_uninterrupted_run(calls, tmp_path):
    manifest = tiny_manifest(tmp_path / "data")
    frame = pd.read_csv(manifest, keep_default_na=False)
    frame.assign(age=np.arange(len(frame)) % 90).to_csv(manifest, index=False)
    settings = [*EVERYTHING, f"manifest={manifest}", "epochs=3", "metadata=[age]"]
    whole = run(tmp_path / "whole", *settings)

    # The cache exists by now, so only batches and epochs are checked: 3 + 1 per epoch. The 6th is in the second epoch.
    with pytest.raises(Interrupted, match="after 1 whole epochs. Resume with `python training/train.py") as stopped:
        run(tmp_path / "broken", *settings, stop=StopAfter(6))
    assert stopped.value.exit_code == 143
    assert ("end", ("KILLED",)) in calls
    assert checkpoints.load(tmp_path / "broken" / "last.pt")["epoch"] == 1

    torch.manual_seed(12345)  # a resumed run must not depend on the process's random state
    resumed = run(tmp_path / "broken", *settings, resume=True)
    assert len(resumed["history"]) == 3
    assert history(resumed) == history(whole)
    for part in ("model", "ema"):
        assert all(torch.equal(resumed[part][name], whole[part][name]) for name in whole[part])
    best = [checkpoints.load(tmp_path / name / "best.pt") for name in ("whole", "broken")]
    assert best[0]["best"] == best[1]["best"]
    assert all(torch.equal(best[0]["weights"][name], best[1]["weights"][name]) for name in best[0]["weights"])
    # Another seed gives another run, so the equality above means something.
    assert history(run(tmp_path / "other", *settings, "seed=1", "epochs=1"))[0] != history(whole)[0]


CHANGES = ["optimizer=adam", "weight_decay=1", "scheduler=constant", "layer_decay=0.5", "freeze_epochs=1",
           "warmup_epochs=0", "grad_clip=0.01", "ema_decay=0", "precision=bf16", "loss=focal", "label_smoothing=0.2",
           "class_weight_power=1", "sampler_power=1", "drop_rate=0.5", "drop_path_rate=0.5", "mixup_alpha=1",
           "cutmix_alpha=1", "randaugment=9", "flip=false", "crop_scale=0.3", "hue=0.3", "seed=1",
           "logit_adjustment=1"]  # fmt: skip


def test_every_setting_of_the_loop_changes_the_result(tmp_path):
    """One epoch of a few steps each. If the loop ignored a setting, the history would stay the same to the last bit."""
    manifest = tiny_manifest(tmp_path / "data")
    table = pd.read_csv(manifest, dtype=str, keep_default_na=False)
    rare = (table["split"] == "train") & (table["label"] == "MEL") & (table.index % 2 == 0)
    table[~rare].to_csv(manifest, index=False)  # unequal classes, or balancing would change nothing
    base = [f"manifest={manifest}", "epochs=1", "batch_size=8", "warmup_epochs=0.5", "ema_decay=0.5",
            "mix_probability=1", "lr=1e-2"]  # fmt: skip
    plain = run(tmp_path / "plain", *base)
    assert history(run(tmp_path / "again", *base)) == history(plain)
    changed = {setting: run(tmp_path / setting, *base, setting) for setting in CHANGES}
    assert [setting for setting, state in changed.items() if history(state) == history(plain)] == []
    [row] = plain["history"]
    assert plain["best"]["score"] == row["val_balanced_accuracy"]
    assert run(tmp_path / "loss", *base, "monitor=loss")["best"]["score"] == -row["val_loss"]


def test_early_stopping_and_resuming_after_it(manifest, calls, tmp_path):
    settings = [f"manifest={manifest}", "epochs=50", "patience=2", "lr=1e-12", "ema_decay=0"]
    state = run(tmp_path / "run", *settings)
    assert state["best"]["epoch"] + 2 == state["epoch"] < 50
    calls.clear()
    assert run(tmp_path / "run", *settings, resume=True)["epoch"] == state["epoch"]
    assert [name for name, _ in calls if name in ("epoch", "finish")] == ["finish"]


BASE = ["lr=1e-2", "ema_decay=0.5", "layer_decay=0.8", "weight_decay=0.5"]


@pytest.fixture(scope="module")
def first_epoch(manifest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("first") / "run"
    run(folder, f"manifest={manifest}", *BASE, "epochs=1")
    return folder


@pytest.fixture
def resumed(first_epoch, manifest, tmp_path):
    """`resumed(settings)`: the state after resuming a copy of the run `first_epoch`."""

    def resume(*settings):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        shutil.copytree(first_epoch, folder)
        return run(folder, f"manifest={manifest}", *BASE, *settings, resume=True)

    return resume


def test_a_resumed_run_without_epochs_left_keeps_the_settings_that_epochs_read(resumed, calls):
    assert resumed("epochs=1", "lr=9", "seed=3", "confidence_level=0.8")["epoch"] == 1
    assert printed(calls, "All 1 epochs are done")
    for step in ("start", "finish"):
        [settings] = [args[2] if step == "start" else args[0].to_dict() for name, args in calls if name == step]
        assert [settings[name] for name in ("epochs", "lr", "seed", "confidence_level")] == [1, 1e-2, 0, 0.8]


def test_a_finished_run_can_be_resumed_with_half_turn(manifest, calls, tmp_path):
    settings = [f"manifest={manifest}", "architecture=test_resnet", "epochs=1"]
    run(tmp_path / "run", *settings)
    run(tmp_path / "run", *settings, "half_turn=true", resume=True)
    assert [args[0].half_turn for name, args in calls if name == "finish"] == [False, True]


def test_a_resumed_run_uses_its_new_settings(resumed, calls):
    plain = history(resumed("epochs=2"))
    for change in ("weight_decay=2", "layer_decay=0.5", "optimizer=adam"):
        changed = history(resumed("epochs=2", change))
        assert changed[0] == plain[0]
        assert changed[1] != plain[1], change
    assert not printed(calls, "epochs are done")


def test_a_resumed_run_may_monitor_another_figure(resumed):
    """The best epoch so far gets its score by the new figure, so that later epochs are compared fairly."""
    state = resumed("epochs=4", "monitor=loss")
    losses = [row["val_loss"] for row in state["history"]]
    assert state["best"] == {"epoch": int(np.argmin(losses)) + 1, "score": -min(losses)}
    assert state["best"]["epoch"] > 1


def test_a_changed_model_or_manifest_is_not_resumed(resumed, manifest, tmp_path):
    with pytest.raises(checkpoints.CheckpointError, match="resume without changing the model"):
        resumed("architecture=test_vit2")
    shorter = tmp_path / "manifest.csv"
    frame = pd.read_csv(manifest, dtype=str, keep_default_na=False)[:-1]
    frame.assign(image=str(manifest.parent) + "/" + frame["image"]).to_csv(shorter, index=False)
    with pytest.raises(train.TrainingError, match="has changed since this run began"):
        resumed(f"manifest={shorter}")


def test_a_single_class_is_refused(tmp_path):
    manifest = tiny_manifest(tmp_path / "data", {"train": 4, "val": 4})
    table = pd.read_csv(manifest, dtype=str, keep_default_na=False)
    table.assign(label="MEL").to_csv(manifest, index=False)
    with pytest.raises(DataError, match="are MEL; add images of another class"):
        run(tmp_path / "run", f"manifest={manifest}")
    assert not list((tmp_path / "run").iterdir())


def test_a_diverging_run_is_stopped(manifest, calls, tmp_path):
    with pytest.raises(train.TrainingError, match=r"The loss is nan in epoch \d; try a lower lr"):
        run(tmp_path / "run", f"manifest={manifest}", "lr=1e30", "epochs=3", "warmup_epochs=0")
    assert ("end", ("FAILED",)) in calls


def test_served_figures_equal_those_of_training(tmp_path, monkeypatch, calls):
    monkeypatch.setattr(train, "finish", finish.finish)
    manifest = tiny_manifest(tmp_path / "data", {"train": 48, "val": 80, "calibration": 60, "test": 60})
    table = pd.read_csv(manifest, dtype=str, keep_default_na=False)
    table.loc[(table["split"] == "test") & (table["label"] == "NV"), "label"] = "UNK"
    table.assign(lesion_id=table["image_id"]).to_csv(manifest, index=False)
    run(tmp_path / "run", f"manifest={manifest}", "epochs=2")
    assert not printed(calls, "logits only")

    bundle = Bundle.load(tmp_path / "run" / "bundle")
    assert bundle.config.calibration.rejection.residual_weight > 0
    rows, _ = evaluate.open_rows(manifest, "test", tmp_path)
    served = evaluate.evaluate(rows, predict_rows(Predictor(bundle), rows), 0)
    reports = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert served["summary"]["nll"] == pytest.approx(reports["test"]["summary"]["nll"], abs=0.02)
    assert served["rejected"] == pytest.approx(reports["test"]["rejected"], abs=1.5 / 40)
    assert served["unknown"] == pytest.approx(reports["test"]["unknown"], abs=0.05)
    # The known space was fitted on the validation images, so their rejection is not reported.
    assert not {"rejected", "balanced_accuracy_9", "as_served", "unknown"} & set(reports["val"])
    assert not any("UNK" in key or "rejected" in key for key in bundle.config.evidence["metrics"]["val"])
    assert reports["val"]["conformal"]["coverage"] > 0
