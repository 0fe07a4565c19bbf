"""training/train.py as a command.

A user's mistake is one sentence and an exit code. A run that could not finish is refused before it begins. Terminated,
killed and resumed, it is one run in MLflow, and ends with a bundle.
"""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mlflow_tracking.runs import code_revision
from tests.commands import invoke
from tests.tiny_lesions import printed, tiny_manifest
from training import checkpoints, train, training_data
from training.config import ROOT, load_config
from training.data.image_cache import DataError

pytest_plugins = ["tests.fixtures_training"]
pytestmark = [
    pytest.mark.usefixtures("only_the_loop"),
    # MLflow's database models use an option that SQLAlchemy will drop.
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated"),
]

# timm's smallest vision transformer, made for tests
TINY = ["architecture=test_vit", "image_size=32", "batch_size=16", "lr=1e-3", "warmup_epochs=1", "bootstrap=10",
        "threads=1"]  # fmt: skip


# ---- the command line


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["epochz=3"], "the nearest is 'epochs'"),
        (["--config", "vit_smal"], "There is no preset 'vit_smal'"),
        (["--epochs", "0"], "epochs is 0: it must be greater than or equal to 1."),
        (["--batch_size", "-1"], "batch_size is -1: it must be greater than or equal to 1."),
        (["device=mps"], "device=mps is not available"),
    ],
)
def test_a_wrong_setting_is_one_sentence_and_exit_2(args, message, tmp_path):
    settings = ["pretrained=false", f"manifest={tmp_path / 'm.csv'}", f"output={tmp_path / 'out'}", *args]
    code, output = invoke(train.main, *settings)
    assert code == 2
    assert message in output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--resume", "nowhere/last.pt"], "There is no checkpoint nowhere/last.pt."),
        (["--resume", "run/best.pt"], "resume from run/last.pt."),
        (["manifest=m.csv", "data_dir=data", "--output", "o"], "There is no manifest m.csv and no data in data"),
        (["manifest=typo.csv", "--output", "o"], "There is no manifest typo.csv; make it with python scripts/prepare"),
    ],
)
def test_a_missing_file_is_one_sentence_and_exit_1(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, output = invoke(train.main, *args)
    assert code == 1
    assert message in output
    assert not (tmp_path / "o").exists()


def test_a_manifest_is_made_only_if_its_data_folder_is_set(tmp_path, monkeypatch, calls):
    missing, data, made = tmp_path / "missing.csv", tmp_path / "data", []

    def build(folders, out, **options):
        made.append(folders)
        tiny_manifest(out.parent, {"train": 2}).rename(out)

    monkeypatch.setattr(training_data, "build_manifest", build)
    tiny_manifest(data, {"train": 2})
    config = load_config(None, [f"manifest={missing}", f"data_dir={data}"])
    with pytest.raises(DataError, match="There is no manifest"):
        training_data.open_manifest(config, resumed=True)
    assert not made
    assert len(training_data.open_manifest(config, resumed=False)) == 2
    assert made == [[data]]
    assert printed(calls, f"Made {missing} from {data}.")


def test_an_existing_manifest_is_not_used_for_another_data_folder(manifest, tmp_path):
    config = load_config(None, [f"data_dir={tmp_path / 'mine'}"])
    config.__dict__["manifest"] = str(manifest)  # the default manifest, which the settings do not name
    with pytest.raises(DataError, match=r"mine would not be read; leave data_dir out"):
        training_data.open_manifest(config, resumed=False)
    assert len(training_data.open_manifest(config, resumed=True))


def test_ctrl_c_stops_the_preparation_of_data_at_once(tmp_path, monkeypatch):
    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGINT)
        pytest.fail("Ctrl-C was ignored")

    monkeypatch.setattr(training_data, "build_manifest", interrupted)
    (tmp_path / "data" / "nevus").mkdir(parents=True)
    # As in a terminal: a script that starts the tests in the background makes them ignore Ctrl-C.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        code, _ = invoke(
            train.main, f"manifest={tmp_path / 'm.csv'}", f"data_dir={tmp_path / 'data'}", "--output", tmp_path / "o"
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 130


def test_a_run_is_not_overwritten_and_not_continued_elsewhere(tmp_path):
    run_folder, other = tmp_path / "run", tmp_path / "other"
    run_folder.mkdir()
    checkpoints.save(run_folder / "last.pt", {"config": load_config(None).to_dict()})
    code, output = invoke(train.main, "--output", run_folder)
    assert code == 2
    assert f"--resume {run_folder / 'last.pt'}" in output
    for words in (["--output", other], [f"output={other}"]):
        code, output = invoke(train.main, "--resume", run_folder, *words)
        assert code == 2
        assert "writes to its own folder" in output
        assert not other.exists()
    same = other / ".." / "run"
    assert "device=mps is not" in invoke(train.main, "--resume", run_folder, "--output", same, "device=mps")[1]


# ---- processes, signals, MLflow, the bundle


@pytest.fixture
def start(tmp_path):
    """`start(args)`: `python train.py ARGS` from inside its folder, with its output in tmp_path/log."""
    processes = []

    def run(*args):
        environment = {"OMP_NUM_THREADS": "1", "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "0.2"}
        command = [sys.executable, "train.py", *map(str, args)]
        with (tmp_path / "log").open("a") as log:
            process = subprocess.Popen(
                command, cwd=ROOT / "training", env=os.environ | environment, stdout=log, stderr=subprocess.STDOUT
            )
        processes.append(process)
        return process

    yield run
    for process in processes:
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
def test_a_run_terminated_killed_and_finished_is_one_mlflow_run(manifest, start, mlflow_store, tmp_path):
    import mlflow

    output, log = tmp_path / "run", tmp_path / "log"
    settings = [*TINY, "architecture=test_resnet", "pretrained=false", "patience=0", f"manifest={manifest}"]

    process = start(*settings, "epochs=100000", "--output", output)
    wait_for_epoch(process, output, 1, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(200) == 143, log.read_text()
    assert f"python training/train.py --resume {output / 'last.pt'}" in log.read_text()
    first = checkpoints.load(output / "last.pt")
    client = mlflow.MlflowClient(mlflow_store)
    [run] = client.search_runs(["1"])
    assert run.info.status == "KILLED"
    assert run.info.run_id == first["mlflow"]["run_id"]

    process = start("--resume", output)
    wait_for_epoch(process, output, first["epoch"] + 1, log)
    assert client.get_run(run.info.run_id).info.status == "RUNNING"
    process.kill()
    process.wait()
    last = checkpoints.load(output / "last.pt")["epoch"] + 1
    assert last > first["epoch"] + 1

    process = start("--resume", output, "--epochs", last)
    assert process.wait(600) == 0, log.read_text()
    assert f"register_model.py --bundle {output / 'bundle'}" in log.read_text()
    [run] = client.search_runs(["1"])
    assert_run_is_complete(client, run, first, last)

    described = json.loads((output / "bundle" / "bundle.json").read_text())
    assert described["classes"] == ["MEL", "NV", "BCC"]
    assert described["evidence"]["run_id"] == run.info.run_id
    assert described["evidence"]["dataset_fingerprint"] == first["dataset_fingerprint"]
    assert described["calibration"]["conformal"]["confidence_level"] == 0.9


def assert_run_is_complete(client, run, first, last):
    """The MLflow run holds parameters, data set, metrics of every epoch, checkpoints, bundle and figures."""
    assert run.info.status == "FINISHED"
    assert run.data.params["architecture"] == "test_resnet"
    assert run.data.params["epochs"] == "100000"
    assert run.data.tags["resumed.epochs"] == str(last)
    assert run.data.tags["code_revision"] == code_revision()
    [dataset] = [item.dataset for item in run.inputs.dataset_inputs]
    assert first["dataset_fingerprint"].startswith(f"sha256:{dataset.digest}")
    for name in ("train_loss", "lr", *(f"val_{figure}" for figure in (
        "loss", "accuracy", "balanced_accuracy", "macro_f1", "macro_auc"))):  # fmt: skip
        steps = {metric.step for metric in client.get_metric_history(run.info.run_id, name)}
        assert steps == set(range(1, last + 1)), name
    assert {"test_balanced_accuracy", "test_ece", "best_val_nll", "test_conformal_coverage"} <= set(run.data.metrics)
    assert any(name.startswith("system/") for name in run.data.metrics)

    def artifacts(path):
        return {file.path.removeprefix(f"{path}/") for file in client.list_artifacts(run.info.run_id, path)}

    assert artifacts("checkpoints") == {"best.pt", "last.pt"}
    assert {"bundle.json", "model.safetensors", "golden.json"} <= artifacts("bundle")
    assert {"curves.png", "confusion_val.png", "confusion_test.png", "reliability_test.png"} <= artifacts("figures")
