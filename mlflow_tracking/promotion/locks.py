"""The two locks on a model store. Both end with their process, even if it is killed.

`lock` is held for one pass or one command, so that promoter and commands take turns. `owned` is held for a promoter's
whole life, because one store cannot follow two registries.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from handlers.errors import UserError

LOCK = ".promotion.lock"
OWNER = ".promoter.lock"  # its text names the promoter
LOCK_SECONDS = 300.0  # how long a command waits for a promoter to finish its step


class StoreBusy(UserError):
    """Another promoter holds the lock."""


class StoreUnwritable(UserError):
    """The model store cannot be written."""


@contextmanager
def lock(store: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold the store for one pass. Raises StoreBusy after `wait` seconds, StoreUnwritable."""
    with _opened(store, LOCK) as file:
        if not _locked(file, wait):
            raise StoreBusy(f"Another promoter is working on the model store {store}. Try again in a minute.")
        yield


@contextmanager
def owned(store: Path, owner: str, wait: float = 0.0) -> Iterator[None]:
    """Hold the store as its only promoter; `owner` names it to other promoters. Raises as `lock`."""
    with _opened(store, OWNER) as file:
        if not _locked(file, wait):
            raise _in_use(store, file)
        with suppress(OSError):  # promotion goes on with a full disk
            file.truncate(0)
            file.write(f"{owner} (pid {os.getpid()} on {socket.gethostname()})")
            file.flush()
        yield


def check_free(store: Path) -> None:
    """Check that no promoter holds the store. Raises StoreBusy or StoreUnwritable."""
    with _opened(store, OWNER) as file:
        if not _locked(file):
            raise _in_use(store, file)


def _opened(store: Path, name: str) -> IO[str]:
    try:
        store.mkdir(parents=True, exist_ok=True)
        return (store / name).open("a+")
    except OSError as error:
        raise StoreUnwritable(f"The model store {store} cannot be written: {error.strerror}.") from error


def _locked(file: IO[str], wait: float = 0.0) -> bool:
    """Lock a file until it is closed; return whether that succeeded within `wait` seconds."""
    end = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.1)


def _in_use(store: Path, file: IO[str]) -> StoreBusy:
    file.seek(0)
    owner = file.read() or "another promoter"
    return StoreBusy(
        f"The model store {store} is in use by {owner}. Stop that promoter, or set MODEL_STORE to another folder."
    )
