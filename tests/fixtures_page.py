"""Fixtures for the tests of the page: a fake TorchServe, and pictures."""

from collections.abc import Iterator

import pytest

from streamlit_app import client
from tests.browser_page import ROOT, streamlit
from tests.fake_torchserve import FakeTorchServe


@pytest.fixture(scope="module")
def fake_server() -> Iterator[FakeTorchServe]:
    with FakeTorchServe() as fake:
        yield fake


@pytest.fixture
def server(fake_server, monkeypatch) -> FakeTorchServe:
    """The fake server as new; the client retries at once."""
    monkeypatch.setattr(client, "BUSY_WAITS", (0.0, 0.0, 0.0))
    fake_server.reset()
    return fake_server


@pytest.fixture(scope="module")
def page_address(fake_server, address) -> Iterator[str]:
    """The page with the monitor of the module's fixture `address`."""
    with streamlit(ROOT / "streamlit_app", "app.py", fake_server.url, address) as running:
        yield running


@pytest.fixture(scope="module")
def jpegs(drawn_image) -> list[bytes]:
    return [drawn_image("NV", seed) for seed in range(3)]
