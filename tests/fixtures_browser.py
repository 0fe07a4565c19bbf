"""Fixtures for the tests of the page in Chromium.

Test modules ask for these by `pytest_plugins`.
"""

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import BrowserContext, ConsoleMessage, Page, expect

from tests.browser_page import PATIENCE, WINDOWS
from tests.chromium import chromium


@pytest.fixture(scope="module")
def context() -> Iterator[BrowserContext]:
    """One context for all tests, so that Streamlit's scripts are compiled once."""
    expect.set_options(timeout=PATIENCE)
    with chromium() as browser, browser.new_context(viewport=WINDOWS["wide"], accept_downloads=True) as context:
        context.set_default_timeout(PATIENCE)
        yield context


@pytest.fixture
def window(context) -> Iterator[Page]:
    """A browser window; in the end its console must be clean and its requests local."""
    page = context.new_page()
    complaints: list[str] = []
    hosts: set[str | None] = set()

    def complain(message: ConsoleMessage) -> None:
        # Streamlit forgets a picture when it shows the next one, and a late browser asks in vain.
        is_replaced = "404" in message.text and "/media/" in message.location["url"]
        if message.type == "error" and not is_replaced:
            complaints.append(f"{message.text} {message.location}")

    page.on("console", complain)
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda r: hosts.add(urlsplit(r.url).hostname) if r.url.startswith(("http", "ws")) else None)
    page.on("websocket", lambda socket: hosts.add(urlsplit(socket.url).hostname))
    yield page
    page.close()
    assert hosts <= {"127.0.0.1"}, f"requests left this machine: {hosts}"
    assert not complaints
