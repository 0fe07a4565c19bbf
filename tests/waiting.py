"""Waiting for what another process will do."""

import time
from collections.abc import Callable
from typing import TypeVar

import httpx

T = TypeVar("T")


def eventually(what: Callable[[], T], seconds: float = 60, state: Callable[[], object] = lambda: "") -> T:
    """The first true value of `what()`; HTTP that fails counts as not yet. `state()` is told when time is up."""
    end = time.monotonic() + seconds
    while True:
        try:
            if value := what():
                return value
        except httpx.HTTPError:
            pass
        assert time.monotonic() < end, f"still not so after {seconds} s\n{state()}"
        time.sleep(0.1)
