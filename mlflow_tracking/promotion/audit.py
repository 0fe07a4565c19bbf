"""The audit log: one JSON line for every act of promotion, each with the hash of the line before it.

    {"seq": 7, "at": "2026-…Z", "event": "serve", "by": "promoter", "version": "3", …, "before": "…", "hash": "…"}

`hash` is the SHA-256 of the line without this field, `before` the hash of the line above. A changed, inserted or
missing line breaks this chain. Missing lines at the end do not, so the registry keeps the newest hash (`Head`) as well.
Only the holder of the store's lock writes the log, and it is never rewritten.
"""

import getpass
import hashlib
import json
import os
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_tracking.promotion.plan import Actual, Release

if TYPE_CHECKING:  # the monitor reads audit logs and has no libraries for pictures
    from mlflow_tracking.registry import RegisteredVersion

AUDIT = "audit.jsonl"
START = "0" * 64  # `before` of the first line
ALWAYS = {"seq": int, "at": str, "event": str, "by": str, "before": str, "hash": str}  # fields of every line


@dataclass(frozen=True)
class Head:
    """The number (from 1) and hash of the newest line; 0 and START for an empty log."""

    seq: int = 0
    hash: str = START

    def __str__(self) -> str:
        return f"{self.seq}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> "Head | None":
        """Invert str(); None for anything else."""
        seq, _, digest = text.partition(":")
        return cls(int(seq), digest) if seq.isdigit() and len(digest) == 64 else None


class AuditLog:
    """The log of one model store. Lines are cached until the file changes."""

    def __init__(self, store: Path) -> None:
        self.path = store / AUDIT
        self._mark: tuple[int, int] | None = None
        self._rows: list[dict[str, Any]] = []
        # Bytes of whole lines, and whether an incomplete line follows.
        self._whole, self._torn = 0, False

    def append(self, event: str, by: str, **fields: Any) -> None:
        """Append one line and sync it to disk. Fields that are None are left out."""
        head = self.head()
        row = {"seq": head.seq + 1, "at": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
        row |= {"by": by, **{name: value for name, value in fields.items() if value is not None}, "before": head.hash}
        row["hash"] = line_hash(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if self._torn:
                # A writer died in the middle of a line, which therefore does not count.
                file.truncate(self._whole)
            file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def head(self) -> Head:
        """Return the head: the newest undamaged line."""
        whole = (row for row in reversed(self.rows()) if "damaged" not in row)
        return next((Head(row["seq"], row["hash"]) for row in whole), Head())

    def rows(self) -> list[dict[str, Any]]:
        """Return all lines, oldest first; a damaged line is {"damaged": its text}."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            self._mark, self._rows, self._torn, self._whole = None, [], False, 0
            return []
        if (stat.st_size, stat.st_mtime_ns) != self._mark:
            data = self.path.read_bytes()
            self._whole = data.rfind(b"\n") + 1
            self._torn = self._whole < len(data)
            self._rows = [_parse(line) for line in data[: self._whole].splitlines()]
            self._mark = (stat.st_size, stat.st_mtime_ns)
        return self._rows

    def newest(self, event: str, **fields: Any) -> dict[str, Any] | None:
        """Return the newest line of an event with these field values, or None."""
        for row in reversed(self.rows()):
            if row.get("event") == event and all(row.get(name) == value for name, value in fields.items()):
                return row
        return None

    def verify(self, anchor: Head | None = None) -> list[str]:
        """Return a sentence for each fault in the chain. The log must contain `anchor`, the head in the registry."""
        rows = self.rows()
        faults = list(chain_faults(rows))
        if anchor and anchor.seq and not faults:
            if len(rows) < anchor.seq:
                faults.append(f"Lines {len(rows) + 1} to {anchor.seq} are missing at the end: the registry knows them.")
            elif rows[anchor.seq - 1]["hash"] != anchor.hash:
                faults.append(f"Line {anchor.seq} is not the one that the registry knows: the log was rewritten.")
        return faults


class AuditEvents:
    """Writes what the promoter does, and the aliases that it sees, into an audit log in the name of `by`."""

    def __init__(self, audit: AuditLog, by: str) -> None:
        self._audit = audit
        self._by = by

    def aliases(self, versions: Mapping[str, "RegisteredVersion | None"]) -> None:
        """Record the aliases that have moved since the last record. MLflow keeps neither the time nor the person."""
        for alias, version in versions.items():
            last = self._audit.newest("alias seen", alias=alias) or {}
            previous = {"previous": last.get("version", ""), "previous_digest": last.get("digest", "")}
            number, digest = (version.version, version.digest or "") if version else ("", "")
            if [number, digest] != list(previous.values()):
                self._audit.append("alias seen", self._by, alias=alias, version=number, digest=digest, **previous)

    def serving(self, actual: Actual) -> None:
        """Record the serving release if a promoter died between the step and its record."""
        last = self._audit.newest("serve") or {}
        if actual.serving and last.get("digest") != actual.serving.digest:
            self.step("serve", actual.serving, "noticed afterwards: a promoter has died")

    def step(self, event: str, release: Release, remark: str) -> None:
        """Record a step that has ended; a `serve` also names the release before it."""
        last = (self._audit.newest("serve") if event == "serve" else None) or {}
        previous = {"previous": last.get("version"), "previous_digest": last.get("digest")}
        self._audit.append(event, self._by, **vars(release), **previous, remark=remark or None)

    def pruned(self, archive: str) -> None:
        """Record an archive that was deleted."""
        self._audit.append("prune", self._by, archive=archive)


def line_hash(row: dict[str, Any]) -> str:
    """Return the SHA-256 of a line without its hash; keys are sorted, so that the layout does not matter."""
    bare = {name: value for name, value in row.items() if name != "hash"}
    return hashlib.sha256(json.dumps(bare, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def chain_faults(rows: Iterable[dict[str, Any]]) -> Iterable[str]:
    """Yield a sentence for each break in the chain; each line is compared with the line above as it is."""
    before, expected = START, 1
    for number, row in enumerate(rows, 1):
        if "damaged" in row:
            yield f"Line {number} is not a line of an audit log: {row['damaged'][:60]!r}."
            return
        if row["hash"] != line_hash(row):
            yield f"Line {number} was changed: its hash does not fit its content."
        elif row["seq"] != expected:
            yield f"Line {number} has the number {row['seq']} instead of {expected}: lines are missing or were moved."
        elif row["before"] != before:
            yield f"Line {number} does not follow the line above: one of them was replaced."
        before, expected = row["hash"], row["seq"] + 1


def person() -> str:
    """Return the user of this process as user@host."""
    name = str(os.getuid())
    with suppress(OSError, KeyError):  # a user id without a name, as in containers
        name = getpass.getuser()
    return f"{name}@{socket.gethostname()}"


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if isinstance(row, dict) and all(isinstance(row.get(name), kind) for name, kind in ALWAYS.items()):
        return row
    return {"damaged": line.decode(errors="replace")}
