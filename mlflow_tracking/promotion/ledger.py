"""The ledger of a model store, `ledger.json`: its archives, the one that serves, and the last good one.

Only promoters write it, under the store's lock (locks.py). TorchServe reads it at every start and returns to the same
version without registry or promoter. A reader sees the old ledger or the new one, never a part.
"""

from dataclasses import field, replace
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from handlers.errors import UserError
from handlers.files import atomic_file, file_sha256
from mlflow_tracking.promotion.plan import Release, take_over
from mlflow_tracking.stack_settings import MODEL_NAME

LEDGER = "ledger.json"


class LedgerError(UserError):
    """A ledger that cannot be read."""


@dataclass(frozen=True)
class Entry:
    """One archive: SHA-256 of the file, its release, and the `settings` that TorchServe needs to load it."""

    sha256: str
    version: str
    digest: str
    settings: dict[str, int] = field(default_factory=dict)

    @property
    def release(self) -> Release:
        """The release in the archive."""
        return Release(self.version, self.digest)


@dataclass(frozen=True)
class Ledger:
    """The archives by file name. All other fields name archives.

    `default` serves, `last_good` served before it, `loaded` passed their gates and belong in TorchServe, and a person
    rolled back from `withdrawn`.
    """

    archives: dict[str, Entry] = field(default_factory=dict)
    default: str | None = None
    last_good: str | None = None
    loaded: tuple[str, ...] = ()
    withdrawn: tuple[str, ...] = ()
    schema: Literal[1] = 1
    model: str = MODEL_NAME

    def release(self, archive: str | None) -> Release | None:
        """Return the release in an archive; None if the ledger lacks the archive."""
        entry = self.archives.get(archive or "")
        return entry.release if entry else None

    def stored(self, archive: str, entry: Entry) -> "Ledger":
        """Return the ledger with an archive added or replaced."""
        return replace(self, archives={**self.archives, archive: entry})

    def approved(self, archive: str) -> "Ledger":
        """Return the ledger with an archive that passed its gates."""
        return replace(self, loaded=tuple(sorted({*self.loaded, archive})))

    def serving(self, archive: str) -> "Ledger":
        """Return the ledger with another default (plan.take_over)."""
        last_good, withdrawn = take_over(archive, self.default, self.last_good, self.withdrawn)
        changed = replace(self.approved(archive), default=archive, last_good=last_good)
        return replace(changed, withdrawn=tuple(sorted(withdrawn)))

    def rolled_back(self, archive: str) -> "Ledger":
        """Return the ledger after a roll-back from an archive, which then is no last good one."""
        last_good = None if self.last_good == archive else self.last_good
        return replace(self, last_good=last_good, withdrawn=tuple(sorted({*self.withdrawn, archive})))

    def reinstated(self, archive: str) -> "Ledger":
        """Return the ledger after a roll-back from an archive was cancelled."""
        return replace(self, withdrawn=tuple(name for name in self.withdrawn if name != archive))

    def retired(self, archive: str) -> "Ledger":
        """Return the ledger with an archive that no longer belongs in TorchServe; its file stays."""
        return replace(self, loaded=tuple(name for name in self.loaded if name != archive))

    def pruned(self, archive: str) -> "Ledger":
        """Return the ledger without an archive."""
        archives = {name: entry for name, entry in self.archives.items() if name != archive}
        return replace(self.retired(archive).reinstated(archive), archives=archives)


_JSON = TypeAdapter(Ledger)


def read(store: Path) -> Ledger:
    """Return the store's ledger; an empty one if there is none. Raises LedgerError."""
    path = store / LEDGER
    try:
        return _JSON.validate_json(path.read_bytes())
    except FileNotFoundError:
        return Ledger()
    except ValidationError as error:
        raise LedgerError(f"The ledger {path} cannot be read ({error.errors()[0]['msg']}).") from error


def set_aside(store: Path) -> None:
    """Rename a damaged ledger. The promoter writes a new one from the registry."""
    (store / LEDGER).replace(store / f"{LEDGER}.damaged")


def write(store: Path, ledger: Ledger) -> None:
    """Replace the store's ledger."""
    with atomic_file(store / LEDGER) as file:
        file.write(_JSON.dump_json(ledger, indent=1) + b"\n")


class Verifier:
    """Compares archives with the ledger's SHA-256; reads a file again only after it changed."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._hashes: dict[str, tuple[tuple[int, ...], str]] = {}

    def intact(self, archive: str, entry: Entry) -> bool:
        """Whether the file exists and has the ledger's hash."""
        path = self._store / archive
        try:
            stat = path.stat()
            mark = (stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
            if self._hashes.get(archive, ((), ""))[0] != mark:
                self._hashes[archive] = (mark, file_sha256(path))
        except OSError:
            return False
        return self._hashes[archive][1] == entry.sha256
