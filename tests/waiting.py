"""Wait for another process."""

import time
from collections.abc import Callable
from typing import TypeVar

import httpx

T = TypeVar("T")


def eventually(what: Callable[[], T], seconds: float = 60, state: Callable[[], object] = lambda: "") -> T:
    """Return the first true value of `what()`; an HTTP error counts as false. A timeout fails with `state()`."""
    end = time.monotonic() + seconds
    while True:
        try:
            if value := what():
                return value
        except httpx.HTTPError:
            pass
        assert time.monotonic() < end, f"no result after {seconds} s\n{state()}"
        time.sleep(0.1)
