"""Reads the prediction log and its rotated files from a stored position.

TorchServe renames a full file to `.1` and starts a new one. A file is recognised by its first line, which holds a
request id and a time, because names move and inodes are used again. Only whole lines are read.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from monitoring.log_lines import parse_line

CHUNK = 4 << 20  # bytes for one transaction; no line is longer


class Batch(NamedTuple):
    """The rows between two positions of a file. `begin` is the stored position, None for a new file."""

    fingerprint: str
    begin: int | None
    end: int
    rows: list[dict[str, Any]]
    unreadable: int


def read_batches(paths: list[Path], positions: Mapping[str, int], chunk: int = CHUNK) -> Iterator[Batch]:
    """Yield at most one batch of each file, in the order of the paths. A vanished file gives none."""
    for path in paths:
        try:
            batch = _read_batch(path, positions, chunk)
        except FileNotFoundError:
            continue  # rotated now; the next pass finds its new name
        if batch:
            yield batch


def _read_batch(path: Path, positions: Mapping[str, int], chunk: int) -> Batch | None:
    with path.open("rb") as file:
        first = file.readline(chunk)
        if not first.endswith(b"\n") and len(first) < chunk:
            return None
        fingerprint = hashlib.sha256(first).hexdigest()
        begin = positions.get(fingerprint)
        start = begin or 0
        file.seek(start)
        data = file.read(chunk)
    length = data.rfind(b"\n") + 1
    if not length:
        if len(data) < chunk:
            return None
        length = chunk  # a line without an end: its parts are unreadable
    rows, unreadable, offset = [], 0, start
    for line in data[:length].splitlines(keepends=True):
        row = parse_line(line, f"{fingerprint[:16]}-{offset}") if line.strip() else {}
        offset += len(line)
        if row:
            rows.append(row)
        unreadable += row is None
    return Batch(fingerprint, begin, start + length, rows, unreadable)


def bytes_behind(paths: list[Path], positions: Mapping[str, int]) -> int:
    """Return how many bytes of the files are not read yet."""
    behind = 0
    for path in paths:
        try:
            with path.open("rb") as file:
                first, size = file.readline(CHUNK), path.stat().st_size
        except FileNotFoundError:
            continue
        behind += max(0, size - positions.get(hashlib.sha256(first).hexdigest(), 0))
    return behind
