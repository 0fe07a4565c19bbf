"""Kept pictures: copies without metadata that wait for review, one JPEG for each uploaded file, named by its SHA-256.

Nothing is kept unless the operator sets KEEP_IMAGES_DAYS. The worker writes the copies
(handlers/kept_image_writer.py); the monitor reads and deletes them. Standard library only: the monitor's image has no
libraries for pictures.
"""

import re
from contextlib import suppress
from pathlib import Path

from handlers.files import TEMPORARY

SHA256 = re.compile(r"[0-9a-f]{64}")
SUFFIX = ".jpg"


def kept_path(folder: Path, sha256: str) -> Path:
    """Return the path of an upload's copy, whether or not there is one. Raises ValueError for another name."""
    if not SHA256.fullmatch(sha256):
        raise ValueError(f"{sha256[:80]!r} is not a SHA-256: it must have 64 hexadecimal digits in lower case.")
    return folder / f"{sha256}{SUFFIX}"


def kept(folder: Path) -> dict[str, float]:
    """Return the SHA-256 of every upload whose copy is kept, with the time of its last upload."""
    times: dict[str, float] = {}
    with suppress(FileNotFoundError):
        for path in folder.iterdir():
            with suppress(FileNotFoundError):  # deleted meanwhile
                if path.suffix == SUFFIX and SHA256.fullmatch(path.stem):
                    times[path.stem] = path.stat().st_mtime
    return times


def delete(folder: Path, sha256: str) -> bool:
    """Delete the copy of an upload; return whether there was one."""
    try:
        kept_path(folder, sha256).unlink()
    except FileNotFoundError:
        return False
    return True


def delete_older(folder: Path, before: float) -> int:
    """Delete the copies of pictures that were last uploaded before a time; return how many.

    Half-written files of a killed worker go as well.
    """
    count = 0
    for sha256, seconds in kept(folder).items():
        count += seconds < before and delete(folder, sha256)
    for path in folder.glob(f".*{TEMPORARY}"):
        with suppress(FileNotFoundError):
            if path.stat().st_mtime < before:
                path.unlink()
    return count
