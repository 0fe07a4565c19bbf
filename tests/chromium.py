"""Debian's Chromium, headless, for the tests of pages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from playwright.sync_api import Browser, sync_playwright


@contextmanager
def chromium() -> Iterator[Browser]:
    """A browser that asks nobody but the page; $CHROMIUM names another program."""
    candidates = [os.environ.get("CHROMIUM"), "chromium", "chromium-browser"]
    program = next(filter(None, (shutil.which(name) for name in candidates if name)), None)
    assert program, "Chromium is needed: apt-get install chromium"
    switches = ["no-sandbox", "disable-dev-shm-usage", "disable-gpu", "disable-background-networking"]
    switches += ["disable-component-update", "disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[f"--{switch}" for switch in switches])
        yield browser
        browser.close()
