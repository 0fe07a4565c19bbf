"""Fixtures for the tests of registry and promotion: one real MLflow server and one tiny model for them all.

Test modules ask for these by `pytest_plugins`; tests/live.py holds what they import.
"""

import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from handlers.bundle import Bundle
from mlflow_tracking.registry import Registry
from tests.conftest import ROOT, free_ports
from tests.live import Server, run_script
from tests.models import tiny_bundle


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """A folder whose path is short enough for sockets, which pytest's own are not everywhere."""
    with tempfile.TemporaryDirectory(prefix="reg-", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server with an empty registry."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MLflow warns of its own type hints when it is imported
        import mlflow.pyfunc  # noqa: F401
    folder = tmp_path_factory.mktemp("mlflow")
    [port] = free_ports(1)
    # Empty: whatever the caller's environment has, this server keeps to its folder.
    own = ("MLFLOW_BACKEND_STORE_URI", "MLFLOW_ARTIFACTS_DESTINATION", "MLFLOW_SERVER_ALLOWED_HOSTS")
    env = {"STACK_STATE": str(folder), "MLFLOW_PORT": str(port), **dict.fromkeys(own, "")}
    script = ROOT / "mlflow_tracking" / "mlflow_server.sh"
    server = Server(script, env, folder / "mlflow.log", f"http://127.0.0.1:{port}/health").start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop()


@pytest.fixture(scope="session")
def registry(mlflow_uri: str) -> Registry:
    return Registry(mlflow_uri)


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
