"""Fixtures for the tests of training."""

import pytest

from tests.tiny_lesions import RecordingTracker, tiny_manifest, without_mlflow
from training import train


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return tiny_manifest(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def only_the_loop():
    """Neither MLflow nor the steps after the last epoch; calls are recorded."""
    with without_mlflow() as patch:
        patch.setattr(train, "finish", lambda *args: RecordingTracker.calls.append(("finish", args)))
        patch.setattr(train.console, "print", lambda *texts, **style: RecordingTracker.calls.append(("print", texts)))
        yield


@pytest.fixture
def calls():
    """The calls of `RecordingTracker` during this test."""
    RecordingTracker.calls.clear()
    return RecordingTracker.calls
