"""What training tells MLflow, and nothing else of the project speaks to MLflow during training.

A tracking server that goes away must not cost a training run: every call may fail, the first failure is said once,
epochs that could not be told are told when the server is back.
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
from mlflow_tracking.settings import ROOT, Settings, quiet_client, reach_directly


class TrackingError(UserError):
    """The tracking store that was asked for cannot be used, with a sentence saying what to do."""


class Tracker:
    """One MLflow run. Make it with `start`; `run_id` and `uri` are kept in checkpoints to resume the same run.

    Args:
        warn: shows a sentence to the user.
    """

    def __init__(self, uri: str, warn: Callable[[str], None]) -> None:
        self.uri = uri
        self.run_id = ""
        self.url = ""  # of the run's page, if a server keeps it
        self._warn = warn
        self._mlflow = _import_mlflow(uri)
        self.failed = False
        self._untold: list[tuple[int, dict[str, float]]] = []

    def start(
        self,
        experiment: str,
        name: str,
        settings: Mapping[str, object],
        run_id: str = "",
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Start a run, or continue run `run_id` if the store knows it; log the settings as its parameters.

        Raises:
            TrackingError: the store does not answer. Before an hour of training is the time to say so.
        """
        mlflow = self._mlflow
        try:
            mlflow.set_tracking_uri(self.uri)
            if mlflow.get_experiment_by_name(experiment) is None:
                mlflow.create_experiment(experiment, artifact_location=_artifacts_beside(self.uri))
            mlflow.set_experiment(experiment)
            if run_id and not self._knows(run_id):
                self._warn(f"{self.uri} does not know run {run_id}; going on in a new run.")
                run_id = ""
            run = mlflow.start_run(run_id=run_id or None, run_name=name, tags=dict(tags or {}), log_system_metrics=True)
        except Exception as error:  # of MLflow, SQLAlchemy, requests: the user needs one sentence for all of them
            raise TrackingError(
                f"The MLflow store {self.uri} cannot be used ({_first_line(error)}); start the server, "
                "or set MLFLOW_TRACKING_URI=sqlite:///runs.db to log to a file."
            ) from error
        self.run_id = run.info.run_id
        if self.uri.startswith("http"):
            self.url = f"{self.uri}/#/experiments/{run.info.experiment_id}/runs/{self.run_id}"
        with self._forgiving():
            # a resumed run may change a few, such as epochs, which MLflow would refuse as a parameter
            known = mlflow.get_run(self.run_id).data.params
            values = {key: str(value)[:6000] for key, value in settings.items()}
            mlflow.log_params({key: value for key, value in values.items() if key not in known})
            changed = {f"resumed.{key}": value for key, value in values.items() if known.get(key, value) != value}
            mlflow.set_tags(changed)

    def dataset(self, frame: pd.DataFrame, manifest: Path, fingerprint: str) -> None:
        """Log the manifest as the run's data set, known by its fingerprint."""
        with self._forgiving():
            digest = fingerprint.removeprefix("sha256:")[:32]  # MLflow takes at most 36 characters
            columns = frame[["image_id", "label", "lesion_id", "split", "sha256"]].astype(str)
            with warnings.catch_warnings():
                # a local path fits two of MLflow's source types, both with the same name and meaning
                warnings.filterwarnings("ignore", message="The specified dataset source can be interpreted")
                data = self._mlflow.data.from_pandas(columns, source=str(manifest), name="manifest", digest=digest)
            self._mlflow.log_input(data, context="training")
            self._mlflow.set_tag("dataset_fingerprint", fingerprint)

    def epoch(self, step: int, values: Mapping[str, float]) -> None:
        """Log the metrics of one epoch, and of those before it that did not get through."""
        self._untold.append((step, dict(values)))
        self._catch_up()

    def _catch_up(self) -> None:
        with self._forgiving():
            while self._untold:
                self._mlflow.log_metrics(self._untold[0][1], step=self._untold[0][0])
                self._untold.pop(0)

    def tags(self, values: Mapping[str, str]) -> None:
        """Set tags of the run."""
        with self._forgiving():
            self._mlflow.set_tags(dict(values))

    def metrics(self, values: Mapping[str, float | None]) -> None:
        """Log final metrics; undefined ones are left out."""
        with self._forgiving():
            self._mlflow.log_metrics({key: value for key, value in values.items() if value is not None})

    def figure(self, figure: Figure, name: str) -> None:
        """Log a figure as `figures/NAME`."""
        with self._forgiving():
            self._mlflow.log_figure(figure, f"figures/{name}")

    def artifact(self, path: Path, folder: str) -> None:
        """Log a file, or what a folder holds, under the artifact path `folder`."""
        with self._forgiving():
            log = self._mlflow.log_artifacts if path.is_dir() else self._mlflow.log_artifact
            log(str(path), folder)

    def end(self, status: str) -> None:
        """Close the run as FINISHED, FAILED or KILLED, with the epochs that did not get through before."""
        self._catch_up()
        with self._forgiving():
            self._mlflow.end_run(status)

    def _knows(self, run_id: str) -> bool:
        try:
            self._mlflow.get_run(run_id)
        except self._mlflow.exceptions.MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return True

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever the client raises, it is not worth a training run
            if not self.failed:
                self.failed = True
                self._warn(
                    f"MLflow at {self.uri} does not take the run's data ({_first_line(error)}); training goes on."
                )


def choose_store(output: Path, remembered: str = "") -> tuple[str, str]:
    """Where to log: (uri, a sentence to show or "").

    MLFLOW_TRACKING_URI if it is set; the store of the run being resumed; the stack's server if it answers; otherwise a
    database in the output folder. Raises SettingsError.
    """
    settings = Settings.load()
    if uri := settings.mlflow_tracking_uri or remembered:
        return uri, ""
    server = settings.registry_uri
    reach_directly(server)
    try:
        with urllib.request.urlopen(f"{server}/health", timeout=2) as answer:
            if answer.status == 200:
                return server, ""
    except OSError:
        pass
    uri = f"sqlite:///{(output / 'mlflow.db').resolve()}"
    return uri, f"No MLflow server at {server}: logging to {output / 'mlflow.db'}."


def log_evaluation(run_id: str, folder: Path, name: str, values: Mapping[str, float | None]) -> str:
    """Log an evaluation's files (under the artifact path `name`) and figures to the run that made the model.

    Returns a sentence on whether it was; a store that is away, or does not know the run, is no fault of the evaluation.
    """
    uri, notice = choose_store(folder)
    if notice:  # a database of its own would know no run
        server = Settings.load().registry_uri
        return f"Not logged: no MLflow server at {server}; set MLFLOW_TRACKING_URI to name another store."
    mlflow = _import_mlflow(uri)
    client = mlflow.MlflowClient(uri)
    try:
        client.get_run(run_id)
        for key, value in values.items():
            if value is not None:
                client.log_metric(run_id, f"{name}_{key}", value)
        client.log_artifacts(run_id, str(folder), name)
    except Exception as error:  # of MLflow, SQLAlchemy, requests
        return f"Not logged: {uri} did not take it for run {run_id} ({_first_line(error)})."
    return f"Logged to run {run_id} of {uri}."


def code_revision() -> str:
    """Commit of the code that runs, with "-dirty" if files differ from it; outside git $CODE_REVISION, or "unknown"."""
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        status = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("CODE_REVISION") or "unknown"
    return f"{commit}-dirty" if status.strip() else commit


def _import_mlflow(uri: str) -> ModuleType:
    """MLflow, told to be quiet and brief before it is imported, as it reads some of that then."""
    quiet_client(uri)
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return mlflow


def _artifacts_beside(uri: str) -> str | None:
    """Artifacts of a database store go beside the database, not into the working directory."""
    if not uri.startswith("sqlite:///"):
        return None
    return (Path(uri.removeprefix("sqlite:///")).resolve().parent / "mlartifacts").as_uri()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}" if str(error).strip() else repr(error)
