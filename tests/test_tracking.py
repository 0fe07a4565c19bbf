"""What training tells MLflow: in which store, also when a server dies or a proxy is set, and of which code."""

import subprocess

import pytest

from mlflow_tracking import runs as tracking
from mlflow_tracking.runs import Tracker, TrackingError, choose_store, code_revision
from tests.http_stub import Answer, serve
from training.config import load_config

# MLflow's own models of its database use an option that SQLAlchemy will drop.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated")


def test_a_store_that_does_not_answer_is_refused_before_training():
    tracker = Tracker("http://127.0.0.1:9", print)
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_URI=sqlite"):
        tracker.start("skin_vit", "skin_vit", load_config(None).to_dict())


def test_a_dying_server_is_told_once_and_caught_up_with_later(mlflow_store):
    warnings = []
    tracker = Tracker(mlflow_store, warnings.append)
    tracker.start("skin_vit", "skin_vit", load_config(None).to_dict())
    mlflow, real = tracker._mlflow, tracker._mlflow.log_metrics

    def refusing(*args, **kwargs):
        raise ConnectionError("refused")

    try:
        mlflow.log_metrics = refusing
        tracker.epoch(1, {"loss": 3.0})
        tracker.epoch(2, {"loss": 2.0})
        assert len(warnings) == 1
        assert "Training continues" in warnings[0]
        mlflow.log_metrics = real
        tracker.epoch(3, {"loss": 1.0})
        mlflow.log_metrics = refusing
        tracker.epoch(4, {"loss": 0.5})  # the last one: nothing but the end comes after it
    finally:
        mlflow.log_metrics = real
    tracker.end("FINISHED")
    history = mlflow.MlflowClient().get_metric_history(tracker.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 3.0), (2, 2.0), (3, 1.0), (4, 0.5)]
    assert len(warnings) == 1


def test_no_proxy_stands_before_the_server_on_this_machine(tmp_path, monkeypatch):
    with serve(lambda *_: Answer()) as url:
        monkeypatch.setenv("MLFLOW_PORT", url.rpartition(":")[2])
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "")
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert choose_store(tmp_path) == (url, "")


def test_where_it_logs(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://named:1")
    assert choose_store(tmp_path, "http://remembered:1") == ("http://named:1", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert choose_store(tmp_path, "http://remembered:1") == ("http://remembered:1", "")
    monkeypatch.setenv("MLFLOW_PORT", "9")
    uri, notice = choose_store(tmp_path)
    assert uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert "No MLflow server at http://127.0.0.1:9" in notice


def test_the_code_revision_is_honest(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert code_revision() == "unknown"
    (tmp_path / "file").write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for words in (["init", "-q"], ["add", "file"], ["commit", "-qm", "one"]):
        subprocess.run([*git, *words], check=True)
    clean = code_revision()
    assert len(clean) == 40
    (tmp_path / "file").write_text("2")
    assert code_revision() == f"{clean}-dirty"
