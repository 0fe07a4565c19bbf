"""Runs: what training and evaluation log to MLflow.

A tracking server that goes away must not end a training run. After the start every call may fail: the first failure is
reported once, and epochs that were not logged are logged when the server is back.
"""

import logging
import os
import subprocess
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pandas as pd
from matplotlib.figure import Figure

from handlers.errors import UserError
from mlflow_tracking.stack_settings import ROOT, Settings, quiet_client, reach_directly


class TrackingError(UserError):
    """The MLflow store does not accept a run."""


class Tracker:
    """One MLflow run. `run_id` and `uri` are kept in checkpoints, so that a resumed training continues the run.

    Args:
        warn: shows a sentence to the user.
    """

    def __init__(self, uri: str, warn: Callable[[str], None]) -> None:
        self.uri = uri
        self.run_id = ""
        self.url = ""  # of the run's page, if a server has one
        self.failed = False
        self._warn = warn
        self._mlflow = _import_mlflow(uri)
        self._pending: list[tuple[int, dict[str, float]]] = []  # epochs that are not logged yet

    def start(
        self,
        experiment: str,
        name: str,
        settings: Mapping[str, object],
        run_id: str = "",
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Start a run, or continue run `run_id` if the store has it, and log the settings as parameters.

        Raises:
            TrackingError: the store does not answer. Only the start raises, so that no training time is lost.
        """
        mlflow = self._mlflow
        try:
            mlflow.set_tracking_uri(self.uri)
            if mlflow.get_experiment_by_name(experiment) is None:
                mlflow.create_experiment(experiment, artifact_location=_artifacts_next_to(self.uri))
            mlflow.set_experiment(experiment)
            if run_id and not self._has_run(run_id):
                self._warn(f"{self.uri} has no run {run_id}. Training continues in a new run.")
                run_id = ""
            run = mlflow.start_run(run_id=run_id or None, run_name=name, tags=dict(tags or {}), log_system_metrics=True)
        except Exception as error:  # from MLflow, SQLAlchemy or requests
            raise TrackingError(
                f"The MLflow store {self.uri} cannot be used ({_first_line(error)}). Start the server, "
                "or set MLFLOW_TRACKING_URI=sqlite:///runs.db to log to a file."
            ) from error
        self.run_id = run.info.run_id
        if self.uri.startswith("http"):
            self.url = f"{self.uri}/#/experiments/{run.info.experiment_id}/runs/{self.run_id}"
        with self._forgiving():
            # MLflow refuses a changed parameter, so the changed settings of a resumed run become tags.
            logged = mlflow.get_run(self.run_id).data.params
            values = {key: str(value)[:6000] for key, value in settings.items()}
            mlflow.log_params({key: value for key, value in values.items() if key not in logged})
            changed = {f"resumed.{key}": value for key, value in values.items() if logged.get(key, value) != value}
            mlflow.set_tags(changed)

    def dataset(self, frame: pd.DataFrame, manifest: Path, fingerprint: str) -> None:
        """Log the manifest as the run's data set under its fingerprint."""
        with self._forgiving():
            digest = fingerprint.removeprefix("sha256:")[:32]  # MLflow takes at most 36 characters
            columns = frame[["image_id", "label", "lesion_id", "split", "sha256"]].astype(str)
            with warnings.catch_warnings():
                # A local path fits two of MLflow's source types, which mean the same.
                warnings.filterwarnings("ignore", message="The specified dataset source can be interpreted")
                data = self._mlflow.data.from_pandas(columns, source=str(manifest), name="manifest", digest=digest)
            self._mlflow.log_input(data, context="training")
            self._mlflow.set_tag("dataset_fingerprint", fingerprint)

    def epoch(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of one epoch, after those of earlier epochs that failed to be logged."""
        self._pending.append((step, dict(values)))
        self._log_pending()

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run."""
        with self._forgiving():
            self._mlflow.set_tags(dict(values))

    def metrics(self, values: Mapping[str, float | None]) -> None:
        """Log final metrics, without those that are None."""
        with self._forgiving():
            self._mlflow.log_metrics(_defined(values))

    def figure(self, figure: Figure, name: str) -> None:
        """Log a figure as `figures/NAME`."""
        with self._forgiving():
            self._mlflow.log_figure(figure, f"figures/{name}")

    def artifact(self, path: Path, folder: str) -> None:
        """Log a file, or the content of a folder, under the artifact path `folder`."""
        with self._forgiving():
            log = self._mlflow.log_artifacts if path.is_dir() else self._mlflow.log_artifact
            log(str(path), folder)

    def end(self, status: str) -> None:
        """Log pending epochs and close the run as FINISHED, FAILED or KILLED."""
        self._log_pending()
        with self._forgiving():
            self._mlflow.end_run(status)

    def _log_pending(self) -> None:
        with self._forgiving():
            while self._pending:
                step, values = self._pending[0]
                self._mlflow.log_metrics(values, step=step)
                self._pending.pop(0)

    def _has_run(self, run_id: str) -> bool:
        try:
            self._mlflow.get_run(run_id)
        except self._mlflow.exceptions.MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return True

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        """Report the first failure, and go on after each."""
        try:
            yield
        except Exception as error:  # no error of the client is worth a training run
            if not self.failed:
                self.failed = True
                self._warn(f"MLflow at {self.uri} refuses the run's data ({_first_line(error)}). Training continues.")


def choose_store(output: Path, previous: str = "") -> tuple[str, str]:
    """Return the URI of the store to log to, and a sentence to show or "".

    The first of: MLFLOW_TRACKING_URI; `previous`, the store of a resumed run; the stack's server if it answers; a
    database in the output folder. Raises SettingsError.
    """
    settings = Settings.load()
    if uri := settings.mlflow_tracking_uri or previous:
        return uri, ""
    server = settings.registry_uri
    reach_directly(server)
    try:
        with urllib.request.urlopen(f"{server}/health", timeout=2) as answer:
            if answer.status == 200:
                return server, ""
    except OSError:
        pass
    database = output / "mlflow.db"
    return f"sqlite:///{database.resolve()}", f"No MLflow server at {server}: logging to {database}."


def log_evaluation(run_id: str, folder: Path, name: str, values: Mapping[str, float | None]) -> str:
    """Log an evaluation's figures and files, under the artifact path `name`, to the run that made the model.

    Returns a sentence about the result. A store that is away or lacks the run is no error of the evaluation.
    """
    uri, notice = choose_store(folder)
    if notice:  # a new database has no runs
        server = Settings.load().registry_uri
        return f"Not logged: no MLflow server at {server}. Set MLFLOW_TRACKING_URI to use another store."
    client = _import_mlflow(uri).MlflowClient(uri)
    try:
        client.get_run(run_id)
        for key, value in _defined(values).items():
            client.log_metric(run_id, f"{name}_{key}", value)
        client.log_artifacts(run_id, str(folder), name)
    except Exception as error:  # from MLflow, SQLAlchemy or requests
        return f"Not logged: {uri} refused the data of run {run_id} ({_first_line(error)})."
    return f"Logged to run {run_id} of {uri}."


def code_revision() -> str:
    """Return the running code's commit, with "-dirty" if files differ; without git CODE_REVISION, or "unknown"."""
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("CODE_REVISION") or "unknown"
    return f"{commit}-dirty" if changes else commit


def _import_mlflow(uri: str) -> ModuleType:
    """Import mlflow after its settings, which it reads during the import."""
    quiet_client(uri)
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return mlflow


def _artifacts_next_to(uri: str) -> str | None:
    """Return the artifact folder next to a database; None for a server, which has its own."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()


def _defined(values: Mapping[str, float | None]) -> dict[str, float]:
    return {key: value for key, value in values.items() if value is not None}


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else repr(error)
