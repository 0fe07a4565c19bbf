"""Fixtures for the tests of registry and promotion: one real MLflow server and one tiny model for them all.

Test modules ask for these by `pytest_plugins`; tests/live.py holds what they import.
"""

import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from handlers.bundle import Bundle
from mlflow_tracking.registry import HEAD_TAG, Registry
from mlflow_tracking.stack_settings import MODEL_NAME
from tests.live import Server, mlflow_server, run_script
from tests.models import tiny_bundle


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """A folder whose path is short enough for sockets, which pytest's own are not everywhere."""
    with tempfile.TemporaryDirectory(prefix="reg-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def quiet_mlflow() -> None:
    """MLflow, imported: it warns of its own type hints when that happens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow.pyfunc  # noqa: F401


@pytest.fixture(scope="session")
def mlflow(quiet_mlflow: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real MLflow server with an empty registry."""
    server = mlflow_server(tmp_path_factory.mktemp("mlflow")).start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="session")
def mlflow_uri(mlflow: Server) -> str:
    return mlflow.health.removesuffix("/health")


@pytest.fixture(scope="module")
def registry(mlflow_uri: str) -> Registry:
    """The registry, which has forgotten the audit log of the module before: each has a model store of its own."""
    from mlflow.exceptions import MlflowException

    registry = Registry(mlflow_uri)
    with suppress(MlflowException):  # it remembers none
        registry.client.delete_registered_model_tag(MODEL_NAME, HEAD_TAG)
    return registry


@pytest.fixture(scope="session")
def full_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A tiny model's bundle with its graph."""
    return tiny_bundle(tmp_path_factory.mktemp("full") / "bundle")


@pytest.fixture(scope="session")
def first_registration(mlflow_uri: str, full_bundle: Bundle) -> subprocess.CompletedProcess[str]:
    """What register_model.py did and said when it registered the bundle in the empty registry as champion."""
    args = ("--bundle", str(full_bundle.path), "--alias", "champion")
    done = run_script("register_model.py", *args, MLFLOW_TRACKING_URI=mlflow_uri)
    assert done.returncode == 0, done.stderr
    return done
