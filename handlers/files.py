"""Files: hash them, and write them so that readers and crashes see either the old content or the new.

Standard library only: MLflow's image copies this module and errors.py alone.
"""

import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from handlers.errors import UserError

TEMPORARY = ".tmp"


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open a binary file that replaces `path`, synced to disk, when the block succeeds, and is removed otherwise.

    Until then it is a hidden file next to `path`, whose name ends in TEMPORARY.
    """
    # A random name, as containers that share a folder also share process ids.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Sync a file's content, or a folder's renames, to disk, so that they survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, values: Any) -> None:
    """Write JSON atomically, with sorted keys, so that the same values give the same bytes."""
    with atomic_file(path) as file:
        file.write((json.dumps(values, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())


def file_sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_folder(out: Path, marker: str) -> Iterator[Path]:
    """Make a temporary folder that replaces `out`, synced to disk, when the block succeeds, and is removed otherwise.

    The old content of `out` is moved aside and then removed. After a crash in between, it is in a hidden folder next
    to `out`.

    Raises UserError if `out` exists and is neither empty nor a folder with a file `marker`.
    """
    if out.exists() and not (out / marker).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and holds no {marker}. Choose another folder.")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        new, old = folder / "new", folder / "old"
        new.mkdir(mode=0o755)
        yield new
        for file in new.rglob("*"):
            if file.is_file():
                sync(file)
        if out.exists():
            out.rename(old)
        try:
            new.rename(out)
        except OSError:
            if old.exists():
                old.rename(out)
            raise
        sync(out.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
