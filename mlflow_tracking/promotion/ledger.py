"""What the model store is known to hold: `ledger.json`, written by promoters alone and read at every TorchServe start.

With it TorchServe comes back to the same versions while registry and promoter are away. It is written whole: temporary
file, fsync, rename; a reader sees the old one or the new one. Who promotes holds a lock on the store meanwhile, so that
commands and promoter take turns; the promoter holds another as long as it lives, as no store can follow two registries.
"""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from handlers.errors import UserError
from handlers.files import atomic_file, file_sha256
from mlflow_tracking.promotion.plan import Release
from mlflow_tracking.settings import MODEL_NAME

SCHEMA = 1
LEDGER = "ledger.json"
LOCK = ".promotion.lock"
OWNER = ".promoter.lock"  # held for as long as a promoter lives; the text in it says which one
LOCK_SECONDS = 300.0  # how long a command waits for a promoter that is in the middle of a step


class LedgerError(UserError):
    """A ledger that cannot be read; a sentence."""


class StoreBusy(UserError, TimeoutError):
    """Another promoter is at work on this store."""


@dataclass(frozen=True)
class Entry:
    """One archive: the hash of the file, what it holds, and the `settings` TorchServe must be given with it."""

    sha256: str
    version: str
    digest: str
    settings: Mapping[str, int] = field(default_factory=dict)

    @property
    def release(self) -> Release:
        """The release in the archive."""
        return Release(self.version, self.digest)


@dataclass(frozen=True)
class Ledger:
    """The archives by file name; the others name archives: `default` serves, `last_good` did before it.

    `loaded` passed their gates and are to be in TorchServe; from `withdrawn` a person has rolled back.
    """

    archives: Mapping[str, Entry] = field(default_factory=dict)
    default: str | None = None
    last_good: str | None = None
    loaded: tuple[str, ...] = ()
    withdrawn: tuple[str, ...] = ()

    def release(self, archive: str | None) -> Release | None:
        """What an archive holds, if the ledger knows it."""
        entry = self.archives.get(archive or "")
        return entry.release if entry else None

    def stored(self, archive: str, entry: Entry) -> "Ledger":
        """With an archive added or renewed."""
        return replace(self, archives={**self.archives, archive: entry})

    def approved(self, archive: str) -> "Ledger":
        """With an archive that passed its gates."""
        return replace(self, loaded=tuple(sorted({*self.loaded, archive})))

    def serving(self, archive: str) -> "Ledger":
        """With another default; the one before it becomes the last good one, unless it was withdrawn."""
        if archive == self.default:
            return self.approved(archive)
        withdrawn = tuple(name for name in self.withdrawn if name != archive)
        last_good = self.last_good if self.last_good != archive else None
        if self.default not in withdrawn:
            last_good = self.default
        return replace(self.approved(archive), default=archive, last_good=last_good, withdrawn=withdrawn)

    def rolled_back(self, archive: str) -> "Ledger":
        """With an archive that a person has taken back: it is nobody's last good version."""
        last_good = None if self.last_good == archive else self.last_good
        return replace(self, last_good=last_good, withdrawn=tuple(sorted({*self.withdrawn, archive})))

    def reinstated(self, archive: str) -> "Ledger":
        """With an archive that is asked for again: taken back once, it never left."""
        return replace(self, withdrawn=tuple(name for name in self.withdrawn if name != archive))

    def retired(self, archive: str) -> "Ledger":
        """With an archive that no longer belongs in TorchServe; the file stays in the store."""
        return replace(self, loaded=tuple(name for name in self.loaded if name != archive))

    def pruned(self, archive: str) -> "Ledger":
        """Without an archive whose file is to go."""
        archives = {name: entry for name, entry in self.archives.items() if name != archive}
        withdrawn = tuple(name for name in self.withdrawn if name != archive)
        return replace(self.retired(archive), archives=archives, withdrawn=withdrawn)

    def to_json(self) -> str:
        """The file's text."""
        values = {"schema": SCHEMA, "model": MODEL_NAME, **asdict(self)}
        return json.dumps(values, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Ledger":
        """The inverse of to_json. Raises LedgerError."""
        try:
            values: dict[str, Any] = json.loads(text)
            if values["schema"] != SCHEMA:
                raise LedgerError(f"it has schema {values['schema']}, and this version reads {SCHEMA}")
            return cls(
                archives={name: Entry(**entry) for name, entry in values["archives"].items()},
                default=values["default"],
                last_good=values["last_good"],
                loaded=tuple(values["loaded"]),
                withdrawn=tuple(values.get("withdrawn", ())),  # not in ledgers from before there was a roll-back
            )
        except LedgerError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise LedgerError(f"it is damaged ({type(error).__name__}: {error})") from error


def read(store: Path) -> Ledger:
    """The store's ledger; an empty one if there is none. Raises LedgerError."""
    path = store / LEDGER
    try:
        return Ledger.from_json(path.read_text())
    except FileNotFoundError:
        return Ledger()
    except (LedgerError, UnicodeDecodeError) as error:
        raise LedgerError(f"The ledger {path} cannot be used: {error}.") from error


def set_aside(store: Path) -> None:
    """Rename a ledger that cannot be read, so that a new one takes its place: the registry knows all that was in it."""
    (store / LEDGER).replace(store / f"{LEDGER}.damaged")


def write(store: Path, ledger: Ledger) -> None:
    """Replace the store's ledger."""
    with atomic_file(store / LEDGER) as file:
        file.write(ledger.to_json().encode())


@contextmanager
def lock(store: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold the store for one promoter. The lock goes with the process, however that ends.

    Raises:
        StoreBusy: somebody else still holds it after `wait` seconds.
    """
    store.mkdir(parents=True, exist_ok=True)
    with (store / LOCK).open("a") as file:
        if not _locked(file, wait):
            raise StoreBusy(f"Another promoter is at work on {store}; try again in a minute.")
        yield


@contextmanager
def owned(store: Path, who: str, wait: float = 0.0) -> Iterator[None]:
    """Be the promoter of a store, until the block or the process ends; `who` tells others which one that is.

    Raises:
        StoreBusy: another promoter still is after `wait` seconds.
        OSError: the folder cannot be written.
    """
    store.mkdir(parents=True, exist_ok=True)
    with (store / OWNER).open("a+") as file:
        if not _locked(file, wait):
            raise StoreBusy(_in_use(store, file))
        with suppress(OSError):  # a full disk is no reason not to promote
            file.truncate(0)
            file.write(f"{who} (pid {os.getpid()} on {socket.gethostname()})")
            file.flush()
        yield


def check_free(store: Path) -> None:
    """See that no promoter lives on a store. Raises StoreBusy, and OSError for a folder that cannot be written."""
    with (store / OWNER).open("a+") as file:
        if not _locked(file):
            raise StoreBusy(_in_use(store, file))


def _locked(file: IO[str], wait: float = 0.0) -> bool:
    """Lock a file until it is closed; whether that could be done within `wait` seconds."""
    end = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.1)


def _in_use(store: Path, file: IO[str]) -> str:
    file.seek(0)
    who = file.read() or "another promoter"
    return f"The model store {store} is in use by {who}: stop that one first, or name another folder in MODEL_STORE."


class Verifier:
    """Whether archives are what the ledger says; a file that has not changed since is not read again."""

    def __init__(self, store: Path) -> None:
        self.store = store
        self._known: dict[str, tuple[tuple[int, ...], str]] = {}

    def intact(self, archive: str, entry: Entry) -> bool:
        """Whether the file is there with the ledger's hash."""
        path = self.store / archive
        try:
            stat = path.stat()
            mark = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            if self._known.get(archive, ((), ""))[0] != mark:
                self._known[archive] = (mark, file_sha256(path))
        except OSError:
            return False
        return self._known[archive][1] == entry.sha256
