"""Training.

A resumed run is the uninterrupted run, to the last bit, and goes on in the same MLflow run even after a kill -9;
SIGTERM leaves a run marked KILLED and a checkpoint; what a run could not come to its end with is refused before it
begins; a user's mistake is one sentence and an exit code.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from typer.testing import CliRunner

from handlers.backbone import BackboneError
from handlers.bundle import Bundle
from handlers.predictor import Predictor
from mlflow_tracking.runs import code_revision
from tests.tiny_lesions import tiny_manifest
from training import checkpoints, evaluate, finish, train
from training.config import ROOT, load_config
from training.data.image_cache import DataError

# MLflow's own models of its database use an option that SQLAlchemy will drop.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")

# timm's smallest vision transformer, made for tests
TINY = ["architecture=test_vit", "image_size=32", "batch_size=16", "lr=1e-3", "warmup_epochs=1", "bootstrap=10"]


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


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    return tmp_path / "mlflow.db"


@pytest.fixture
def bare(monkeypatch):
    """The loop alone, without calibration and export, and with tracking that only remembers."""
    told = []

    class Silent:
        uri, run_id, url = "nowhere", "run", ""

        def __init__(self, *args):
            pass

        def __getattr__(self, name):
            return lambda *args, **kwargs: told.append((name, args))

    monkeypatch.setattr(train, "Tracker", Silent)
    monkeypatch.setattr(train, "finish", lambda *args: told.append(("finish", args)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere")
    return told


class After:
    """An interruption after `batches` batches."""

    number = 0

    def __init__(self, batches=10**9):
        self.left = batches

    def watch(self):
        pass

    def check(self):
        self.left -= 1
        if not self.left:
            self.number = signal.SIGTERM
            raise train.Interrupted(signal.SIGTERM)


EVERYTHING = ["drop_rate=0.2", "drop_path_rate=0.2", "mixup_alpha=0.2", "cutmix_alpha=1", "sampler_power=0.5",
              "ema_decay=0.9", "precision=bf16", "cache_size=36", "head_hidden=[16]", "randaugment=5",
              "layer_decay=0.8", "freeze_epochs=1", "scheduler=restarts", "restart_epochs=1"]  # fmt: skip


def run(output, config, resume=False, stop=None):
    output.mkdir(exist_ok=True)
    checkpoint = checkpoints.load(output / "last.pt") if resume else None
    train.train(config, output, checkpoint, stop or After())
    return checkpoints.load(output / "last.pt")


def strip(history):
    return [{key: value for key, value in row.items() if key != "seconds"} for row in history]


def test_a_resumed_run_is_the_uninterrupted_run(bare, tmp_path):
    manifest = tiny_manifest(tmp_path / "data")
    frame = pd.read_csv(manifest, keep_default_na=False)
    frame.assign(age=np.arange(len(frame)) % 90).to_csv(manifest, index=False)
    config = load_config(None, [*TINY, *EVERYTHING, f"manifest={manifest}", "epochs=3", "metadata=[age]"])
    whole = run(tmp_path / "whole", config)

    # The cache is there by now, so only batches and epochs are checked: 3 + 1 an epoch. The 6th is inside the second.
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "broken", config, stop=After(6))
    assert stopped.value.code == 143
    assert ("end", ("KILLED",)) in bare
    broken = checkpoints.load(tmp_path / "broken" / "last.pt")
    assert broken["epoch"] == 1

    torch.manual_seed(12345)  # whatever happened in between
    resumed = run(tmp_path / "broken", config, resume=True)
    assert len(resumed["history"]) == 3
    assert strip(resumed["history"]) == strip(whole["history"])
    for part in ("model", "ema"):
        assert all(torch.equal(resumed[part][name], whole[part][name]) for name in whole[part])
    best = [checkpoints.load(tmp_path / name / "best.pt") for name in ("whole", "broken")]
    assert best[0]["best"] == best[1]["best"]
    assert all(torch.equal(best[0]["weights"][name], best[1]["weights"][name]) for name in best[0]["weights"])
    # and another seed is another run, so that the equality above says something
    other = run(tmp_path / "other", config.model_copy(update={"seed": 1}))
    assert strip(other["history"]) != strip(whole["history"])


CHANGES = ["optimizer=adam", "weight_decay=1", "scheduler=constant", "layer_decay=0.5", "freeze_epochs=1",
           "warmup_epochs=0", "grad_clip=0.01", "ema_decay=0", "precision=bf16", "loss=focal", "label_smoothing=0.2",
           "class_weight_power=1", "sampler_power=1", "drop_rate=0.5", "drop_path_rate=0.5", "mixup_alpha=1",
           "cutmix_alpha=1", "randaugment=9", "flip=false", "crop_scale=0.3", "hue=0.3", "seed=1",
           "logit_adjustment=1"]  # fmt: skip


def test_every_setting_of_the_loop_changes_what_is_learnt(bare, tmp_path):
    """One epoch of five steps each: a setting that the loop forgot would leave its history as it was, to the bit."""
    manifest = tiny_manifest(tmp_path / "data")
    table = pd.read_csv(manifest, dtype=str, keep_default_na=False)
    rare = (table["split"] == "train") & (table["label"] == "MEL") & (table.index % 2 == 0)
    table[~rare].to_csv(manifest, index=False)  # or balancing would change nothing
    base = [*TINY, f"manifest={manifest}", "epochs=1", "batch_size=8", "warmup_epochs=0.5", "ema_decay=0.5",
            "mix_probability=1", "grad_clip=1", "lr=1e-2"]  # fmt: skip
    plain = run(tmp_path / "plain", load_config(None, base))
    again = run(tmp_path / "again", load_config(None, base))
    assert strip(again["history"]) == strip(plain["history"])
    forgotten = []
    for number, change in enumerate(CHANGES):
        changed = run(tmp_path / str(number), load_config(None, [*base, change]))
        if strip(changed["history"]) == strip(plain["history"]):
            forgotten.append(change)
    assert not forgotten
    [row] = plain["history"]
    assert plain["best"]["score"] == row["val_balanced_accuracy"]
    by_loss = run(tmp_path / "loss", load_config(None, [*base, "monitor=loss"]))
    assert by_loss["best"]["score"] == -row["val_loss"]


def test_it_stops_early_and_resumes_to_the_end(bare, tmp_path):
    manifest = tiny_manifest(tmp_path / "data")
    settings = [*TINY, f"manifest={manifest}", "epochs=50", "patience=2", "lr=1e-12", "ema_decay=0"]
    state = run(tmp_path / "run", load_config(None, settings))
    # with no progress after the first epoch, it waits for two more
    assert state["best"]["epoch"] + 2 == state["epoch"] < 50
    bare.clear()
    again = run(tmp_path / "run", load_config(None, settings), resume=True)
    assert again["epoch"] == state["epoch"]
    assert [name for name, _ in bare if name in ("epoch", "finish")] == ["finish"]


def test_a_run_with_no_epoch_left_says_so_and_notes_no_setting_that_did_nothing(bare, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(train.console, "print", lambda text, **style: said.append(text))
    base = [*TINY, f"manifest={tiny_manifest(tmp_path / 'data')}", "epochs=2"]
    run(tmp_path / "run", load_config(None, base))
    assert not [line for line in said if "none is left" in line]
    bare.clear()
    again = load_config(None, [*base, "epochs=1", "lr=9", "seed=3", "confidence_level=0.8"])
    assert run(tmp_path / "run", again, resume=True)["epoch"] == 2
    assert [line for line in said if line.startswith("2 epochs are done, none is left")]
    for step in ("start", "finish"):
        [used] = [args[0] for name, args in bare if name == step]
        assert (used.epochs, used.lr, used.seed, used.confidence_level) == (2, 1e-3, 0, 0.8)


@pytest.mark.parametrize("change", ["weight_decay=2", "layer_decay=0.5", "optimizer=adam"])
def test_a_resumed_run_learns_by_the_settings_it_is_given(bare, tmp_path, change):
    manifest = tiny_manifest(tmp_path / "data")
    base = [*TINY, f"manifest={manifest}", "ema_decay=0.5", "layer_decay=0.8", "weight_decay=0.5", "lr=1e-2"]
    run(tmp_path / "as it was", load_config(None, [*base, "epochs=1"]))
    shutil.copytree(tmp_path / "as it was", tmp_path / "changed")
    plain = run(tmp_path / "as it was", load_config(None, [*base, "epochs=2"]), resume=True)
    changed = run(tmp_path / "changed", load_config(None, [*base, "epochs=2", change]), resume=True)
    assert strip(changed["history"])[0] == strip(plain["history"])[0]
    assert strip(changed["history"])[1] != strip(plain["history"])[1]


def test_a_resumed_run_may_watch_another_figure(bare, tmp_path):
    """The best epoch so far is then judged by that figure, or none after it could ever be better, or each would be."""
    manifest = tiny_manifest(tmp_path / "data")
    base = [*TINY, f"manifest={manifest}", "lr=1e-2", "ema_decay=0.5"]
    first = run(tmp_path / "run", load_config(None, [*base, "epochs=1"]))
    assert first["best"]["score"] > 0
    told = run(tmp_path / "run", load_config(None, [*base, "epochs=4", "monitor=loss"]), resume=True)
    losses = [row["val_loss"] for row in told["history"]]
    assert told["best"] == {"epoch": int(np.argmin(losses)) + 1, "score": -min(losses)}
    assert told["best"]["epoch"] > 1


@pytest.mark.parametrize("architecture", ["convnext_atto", "mobilenetv3_small_050", "deit_tiny_distilled_patch16_224"])
def test_what_cannot_be_explained_is_refused_before_it_is_trained(bare, tmp_path, architecture):
    settings = [
        *TINY,
        f"manifest={tiny_manifest(tmp_path / 'data')}",
        f"architecture={architecture}",
        "pretrained=false",
    ]
    with pytest.raises(BackboneError, match=f"{architecture} cannot be explained by Grad-CAM here"):
        run(tmp_path / "run", load_config(None, settings))
    assert not list((tmp_path / "run").iterdir())


def test_one_class_is_nothing_to_learn(bare, tmp_path):
    manifest = tiny_manifest(tmp_path / "data")
    table = pd.read_csv(manifest, dtype=str, keep_default_na=False)
    table.assign(label="MEL").to_csv(manifest, index=False)
    with pytest.raises(DataError, match="are MEL: add images of another class"):
        run(tmp_path / "run", load_config(None, [*TINY, f"manifest={manifest}"]))
    assert not list((tmp_path / "run").iterdir())


def test_a_diverging_run_says_so(bare, tmp_path):
    settings = [*TINY, f"manifest={tiny_manifest(tmp_path / 'data')}", "lr=1e30", "epochs=3", "warmup_epochs=0"]
    with pytest.raises(train.TrainingError, match=r"The loss is nan in epoch \d; try a lower lr"):
        run(tmp_path / "run", load_config(None, settings))
    assert ("end", ("FAILED",)) in bare


def test_a_changed_manifest_or_model_is_not_resumed(bare, tmp_path):
    manifest = tiny_manifest(tmp_path / "data")
    config = load_config(None, [*TINY, f"manifest={manifest}", "epochs=1"])
    run(tmp_path / "run", config)
    with pytest.raises(checkpoints.CheckpointError, match="resume without changing the model"):
        run(tmp_path / "run", config.model_copy(update={"architecture": "test_vit2"}), resume=True)
    manifest.write_text("\n".join(manifest.read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(train.TrainingError, match="has changed since this run began"):
        run(tmp_path / "run", config, resume=True)


@pytest.fixture
def ended(bare, monkeypatch):
    """The loop with its real end, and what it printed."""
    said = []
    monkeypatch.setattr(train, "finish", finish.finish)
    monkeypatch.setattr(finish.console, "print", lambda text, **style: said.append(text))
    return said


def test_known_lesions_span_a_space_and_serving_rejects_as_training_did(ended, tmp_path):
    manifest = tiny_manifest(tmp_path / "data", {"train": 48, "val": 80, "calibration": 60, "test": 60})
    table = pd.read_csv(manifest, dtype=str, keep_default_na=False)
    table.loc[(table["split"] == "test") & (table["label"] == "NV"), "label"] = "UNK"
    table.assign(lesion_id=table["image_id"]).to_csv(manifest, index=False)
    run(tmp_path / "run", load_config(None, [*TINY, f"manifest={manifest}", "epochs=2"]))
    assert not any("logits alone" in line for line in ended)

    bundle = Bundle.load(tmp_path / "run" / "bundle")
    assert bundle.config.calibration.rejection.residual_weight > 0
    rows, _ = evaluate.open_rows(manifest, "test", tmp_path)
    judged = evaluate.evaluate(rows, evaluate.ask(Predictor(bundle), rows), 0)
    reports = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert judged["rejected"] == pytest.approx(reports["test"]["rejected"], abs=1.5 / 40)
    assert judged["unknown"] == pytest.approx(reports["test"]["unknown"], abs=0.05)
    # the space is of the validation images: what the rejection does to them is not told
    assert not {"rejected", "balanced_accuracy_9", "as_served", "unknown"} & set(reports["val"])
    assert not any("UNK" in key or "rejected" in key for key in bundle.config.evidence["metrics"]["val"])
    assert reports["val"]["conformal"]["coverage"] > 0


@pytest.mark.parametrize(
    ("setting", "says"),
    [("name=few", "the 18 validation images are fewer than their 64 dimensions"),
     ("head_hidden=[8]", "the head has hidden layers")],
)  # fmt: skip
def test_without_a_known_space_it_says_so(ended, tmp_path, setting, says):
    config = load_config(None, [*TINY, f"manifest={tiny_manifest(tmp_path / 'data')}", "epochs=1", setting])
    run(tmp_path / "run", config)
    assert [line for line in ended if "by the logits alone" in line and says in line]


# ---- the command line


def command(*args):
    app = typer.Typer()
    app.command()(train.main)
    result = CliRunner().invoke(app, [str(arg) for arg in args])
    return result.exit_code, result.output + result.stderr


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["epochz=3"], "the nearest is 'epochs'"),
        (["--config", "vit_smal"], "There is no preset 'vit_smal'"),
        (["--epochs", "0"], "epochs is 0: it must be at least 1."),
        (["--batch_size", "-1"], "batch_size is -1: it must be at least 1."),
        (["device=mps"], "device=mps is not available"),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(args, says, tmp_path):
    code, output = command("pretrained=false", f"manifest={tmp_path / 'm.csv'}", f"output={tmp_path / 'out'}", *args)
    assert code == 2
    assert says in output
    assert "Traceback" not in output


def test_a_checkpoint_that_is_not_there_is_one_sentence():
    code, output = command("--resume", "nowhere/last.pt")
    assert code == 1
    assert "There is no checkpoint nowhere/last.pt." in output


def test_no_data_is_one_sentence(tmp_path):
    code, output = command(
        f"manifest={tmp_path / 'm.csv'}", f"data_dir={tmp_path / 'data'}", "--output", tmp_path / "o"
    )
    assert code == 1
    assert "There is no manifest" in output
    assert "prepare_data.py" in output
    assert not (tmp_path / "o").exists()


def test_a_manifest_that_is_named_and_not_there_is_not_made(tmp_path, monkeypatch):
    """It may be mistyped. Who names the folder of the images too asks for one; a run that goes on has had its own."""
    missing, data = tmp_path / "typo.csv", tmp_path / "data"
    made = []

    def make(folders, out, **options):
        made.append(folders)
        tiny_manifest(out.parent).rename(out)

    monkeypatch.setattr(train, "build_manifest", make)
    tiny_manifest(data)
    code, output = command(f"manifest={missing}", "--output", tmp_path / "o")
    assert code == 1
    assert f"There is no manifest {missing}; make it with python scripts/prepare_data.py --data DIR" in output
    config = load_config(None, [f"manifest={missing}", f"data_dir={data}"])
    with pytest.raises(DataError, match="There is no manifest"):
        train.open_manifest(config, resumed=True)
    assert not made

    said = []
    monkeypatch.setattr(train.console, "print", said.append)
    assert len(train.open_manifest(config, resumed=False))
    assert made == [[data]]
    assert said == [f"Made {missing} from {data}."]


def test_a_data_folder_is_not_passed_over_for_the_manifest_of_another(tmp_path):
    config = load_config(None, [f"data_dir={tmp_path / 'mine'}"])
    config.__dict__["manifest"] = str(tiny_manifest(tmp_path))  # the default one, which nobody named
    with pytest.raises(DataError, match=r"mine would not be read: leave data_dir out"):
        train.open_manifest(config, resumed=False)
    assert len(train.open_manifest(config, resumed=True))


@pytest.fixture
def heeds_ctrl_c():
    """As in a terminal; a script that starts the tests in the background has them ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_the_making_of_a_manifest_at_once(tmp_path, monkeypatch, heeds_ctrl_c):
    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("Ctrl-C was put off")

    monkeypatch.setattr(train, "build_manifest", interrupted)
    (tmp_path / "data" / "nevus").mkdir(parents=True)
    code, _ = command(f"manifest={tmp_path / 'm.csv'}", f"data_dir={tmp_path / 'data'}", "--output", tmp_path / "o")
    assert code != 0


def test_an_output_folder_with_a_run_in_it_is_not_overwritten(tmp_path):
    checkpoints.save(tmp_path / "last.pt", {"epoch": 3})
    code, output = command("--output", tmp_path)
    assert code == 2
    assert f"--resume {tmp_path / 'last.pt'}" in output


def test_a_run_goes_on_in_no_other_folder(tmp_path):
    (tmp_path / "run").mkdir()
    checkpoints.save(tmp_path / "run" / "last.pt", {"config": load_config(None).to_dict()})
    for words in (["--output", tmp_path / "other"], [f"output={tmp_path / 'other'}"]):
        code, output = command("--resume", tmp_path / "run", *words)
        assert code == 2
        assert "goes on in its own folder" in output
        assert not (tmp_path / "other").exists()
    own = tmp_path / "run" / ".." / "run"
    assert "device=mps is not available" in command("--resume", tmp_path / "run", "--output", own, "device=mps")[1]


def test_best_is_not_mistaken_for_a_resumable_checkpoint(tmp_path):
    checkpoints.save(tmp_path / "best.pt", {"weights": {}})
    code, output = command("--resume", tmp_path / "best.pt")
    assert code == 1
    assert "last.pt" in output


# ---- the real thing: processes, signals, MLflow, the bundle


@pytest.fixture
def start(tmp_path):
    """`start(args)`: `python train.py ARGS` from inside its folder, as people do, its output going to tmp_path/log."""
    started = []

    def run(args):
        with (tmp_path / "log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, "train.py", *args],
                cwd=ROOT / "training",
                env=os.environ | {"OMP_NUM_THREADS": "1", "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.2"},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


def wait_for_epoch(process, output, epoch, log):
    for _ in range(4000):
        if (output / "last.pt").exists() and checkpoints.load(output / "last.pt")["epoch"] >= epoch:
            return
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    pytest.fail(f"epoch {epoch} was not reached:\n{log.read_text()}")


@pytest.mark.timeout(900)
def test_terminated_then_killed_then_finished_is_one_run(store, start, tmp_path):
    import mlflow

    manifest = tiny_manifest(tmp_path / "data")
    output, log = tmp_path / "run", tmp_path / "log"
    resume = ["--resume", str(output)]
    settings = [*TINY, "architecture=test_resnet", "pretrained=false", "patience=0", f"manifest={manifest}"]

    process = start([*settings, "epochs=100000", "--output", str(output)])
    wait_for_epoch(process, output, 1, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(200) == 143, log.read_text()
    assert f"python training/train.py --resume {output / 'last.pt'}" in log.read_text()
    first = checkpoints.load(output / "last.pt")
    client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    [run] = client.search_runs(["1"])
    assert run.info.status == "KILLED"
    assert run.info.run_id == first["mlflow"]["run_id"]

    process = start(resume)
    wait_for_epoch(process, output, first["epoch"] + 1, log)
    assert client.get_run(run.info.run_id).info.status == "RUNNING"
    process.kill()
    process.wait()
    second = checkpoints.load(output / "last.pt")
    assert second["epoch"] > first["epoch"]

    last = second["epoch"] + 1
    process = start([*resume, "--epochs", str(last)])
    assert process.wait(600) == 0, log.read_text()

    assert f"register_model.py --bundle {output / 'bundle'}" in log.read_text()

    # one run, with everything in it
    [run] = client.search_runs(["1"])
    assert run.info.status == "FINISHED"
    assert run.data.params["architecture"] == "test_resnet"
    assert run.data.params["epochs"] == "100000"
    assert run.data.tags["resumed.epochs"] == str(last)
    assert run.data.tags["code_revision"] == code_revision()
    [given] = run.inputs.dataset_inputs
    assert first["dataset_fingerprint"].startswith(f"sha256:{given.dataset.digest}")
    for name in (
        "train_loss",
        "val_loss",
        "val_accuracy",
        "val_balanced_accuracy",
        "val_macro_f1",
        "val_macro_auc",
        "lr",
    ):
        steps = {metric.step for metric in client.get_metric_history(run.info.run_id, name)}
        assert steps == set(range(1, last + 1)), name
    assert {"test_balanced_accuracy", "test_ece", "best_val_nll", "test_conformal_coverage"} <= set(run.data.metrics)
    assert any(name.startswith("system/") for name in run.data.metrics)

    def artifacts(path):
        return {file.path.removeprefix(f"{path}/") for file in client.list_artifacts(run.info.run_id, path)}

    assert artifacts("checkpoints") == {"best.pt", "last.pt"}
    assert {"bundle.json", "model.safetensors", "golden.json"} <= artifacts("bundle")
    assert {"curves.png", "confusion_val.png", "confusion_test.png", "reliability_test.png"} <= artifacts("figures")

    # the bundle says what it is, and judged through serving's door it does as training said
    described = json.loads((output / "bundle" / "bundle.json").read_text())
    assert described["classes"] == ["MEL", "NV", "BCC"]
    assert described["evidence"]["run_id"] == run.info.run_id
    assert described["evidence"]["dataset_fingerprint"] == first["dataset_fingerprint"]
    assert described["calibration"]["conformal"]["confidence_level"] == 0.9
    subprocess.run(
        [sys.executable, ROOT / "training/evaluate.py", "--bundle", output / "bundle", "--data", manifest,
         "--out", tmp_path / "judged", "--bootstrap", "10"],
        check=True, cwd=tmp_path,
    )  # fmt: skip
    judged = json.loads((tmp_path / "judged" / "metrics.json").read_text())
    trained = json.loads((output / "metrics.json").read_text())["test"]
    assert judged["images"] == trained["images"] == 18
    assert judged["summary"]["nll"] == pytest.approx(trained["summary"]["nll"], abs=0.02)
    assert {file.name for file in (tmp_path / "judged").iterdir()} >= {"confusion.png", "roc.png", "reliability.png"}
    low, high = judged["intervals_95"]["accuracy"]
    assert low <= judged["summary"]["accuracy"] <= high
