"""Headless Chromium for the tests of pages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start a browser without background requests; $CHROMIUM names another program."""
    candidates = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser"]
    program = next(filter(None, (shutil.which(name) for name in candidates if name)), None)
    assert program, "Install Chromium first: apt-get install chromium"
    switches = ["no-sandbox", "disable-dev-shm-usage", "disable-gpu", "disable-background-networking"]
    switches += ["disable-component-update", "disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[f"--{switch}" for switch in switches])
        yield browser
        browser.close()
