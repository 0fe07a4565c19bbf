"""Fixtures for the tests that are rough with one TorchServe: the shipped model, from the store alone, without MLflow.

Test modules ask for these by `pytest_plugins`.
"""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from handlers.bundle import Bundle
from handlers.graph_export import complete
from mlflow_tracking.promotion import ledger as ledgers
from mlflow_tracking.promotion import model_archive
from tests.conftest import ROOT
from tests.live import torchserve_server
from tests.serving import Serving
from tests.waiting import eventually


@pytest.fixture(scope="session")
def shipped_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The shipped model with its graph, which takes ten seconds."""
    return complete(Bundle.load(ROOT / "model_store" / "skin_vit"), tmp_path_factory.mktemp("shipped") / "bundle")


@pytest.fixture(scope="session")
def shipped_store(shipped_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model store as the promoter leaves it once version 1, the shipped model, serves."""
    store = tmp_path_factory.mktemp("store")
    name = f"skin_vit-1-{shipped_bundle.digest.removeprefix('sha256:')[:12]}.mar"
    made = model_archive.build(shipped_bundle.path, store / name, version="1")
    entry = ledgers.Entry(made.sha256, "1", shipped_bundle.digest, made.settings)
    ledgers.write(store, ledgers.Ledger().stored(name, entry).serving(name))
    return store


@pytest.fixture(scope="session")
def serving(shipped_store: Path) -> Iterator[Serving]:
    """TorchServe with the shipped model, answering."""
    with tempfile.TemporaryDirectory(prefix="srv-", dir="/tmp") as folder:
        server = torchserve_server(Path(folder), shipped_store).start()
        try:
            running = Serving(server)
            eventually(lambda: running.ask(running.good).status == 200, 120, server.text)
            yield running
        finally:
            server.stop()
