"""Find the pictures and tables below a folder. Bytes identify pictures; names identify masks."""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from handlers.errors import UserError
from training.data.label_tables import ENDINGS

# Files with these endings are opened as pictures. All others are, if their first bytes are a picture's.
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
_OTHER_ENDINGS = (".txt", ".md", ".json", ".yaml", ".yml", ".xml", ".html", ".pdf", ".py", ".ipynb", ".npy", ".npz",
                  ".xlsx", ".docx", ".log")  # fmt: skip
_PICTURES = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"BM", b"II*\0", b"MM\0*", b"GIF8", b"\0\0\0\x0cjP  ")
_CONTAINERS = {b"PK\x03\x04": "archive", b"\x1f\x8b": "archive", b"7z\xbc\xaf": "archive", b"Rar!": "archive",
               b"BZh": "archive", b"\xfd7zXZ": "archive", b"\x89HDF": "HDF5"}  # fmt: skip
# What the ISIC challenges put next to the pictures: ISIC_0000000_segmentation.png, _superpixels, _attribute_streaks.
_NO_PICTURE = re.compile(r"_(segmentation|superpixels|attribute_\w+|mask)(_\w+)?$", re.IGNORECASE)


class SourceError(UserError):
    """A data folder cannot be used."""


@dataclass
class Faults:
    """Everything odd, by kind, with every example in the order met."""

    examples: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, example: str) -> None:
        """Add one more case of `kind`."""
        self.examples[kind].append(example)


def scan(root: Path, faults: Faults) -> tuple[list[Path], list[Path]]:
    """Return the pictures and the tables below a folder, links followed.

    Raises:
        SourceError: the folder is missing, no folder, cannot be listed, or has only archives or HDF5 files.
    """
    if not root.exists():
        raise SourceError(f"There is no {root}. Give the folder that holds the data set.")
    if not root.is_dir():
        raise SourceError(f"{root} is a file. Give the folder that holds the data set.")
    images, tables = [], []
    containers: dict[str, list[str]] = defaultdict(list)
    for path in files(root):
        ending = path.suffix.casefold()
        if any("\udc80" <= letter <= "\udcff" for letter in str(path)):  # Python's form of bytes that are no UTF-8
            faults.add("file name is not valid UTF-8; rename the file", ascii(str(path)))
        elif ending in ENDINGS or path.name == "HAM10000_metadata":  # Dataverse's name has no ending
            tables.append(path)
        elif (kind := "picture" if ending in IMAGE_ENDINGS else _kind(path)) == "picture":
            if is_mask(path):
                faults.add("segmentation mask or superpixels: no picture", str(path))
            else:
                images.append(path)
        elif kind:
            containers[kind].append(str(path))
            faults.add(f"{kind} file: not read", str(path))
    if not images and containers:
        kinds = ", ".join(f"{kind}: {len(paths):,}" for kind, paths in sorted(containers.items()))
        raise SourceError(
            f"{root} has no pictures, but other files ({kinds}), such as {min(min(containers.values()))}. Unpack "
            "archives, and convert HDF5 files to PNG."
        )
    return images, tables


def is_mask(path: Path) -> bool:
    """Return whether a file's name says that it holds a mask or superpixels."""
    return bool(_NO_PICTURE.search(path.stem))


def is_picture(path: Path) -> bool:
    """Return whether a file is opened as a picture: by its ending, or else by its first bytes."""
    return not is_mask(path) and (path.suffix.casefold() in IMAGE_ENDINGS or _kind(path) == "picture")


def _kind(path: Path) -> str:
    """Return "picture", "archive", "HDF5" or "" by a file's first bytes."""
    if path.suffix.casefold() in _OTHER_ENDINGS:
        return ""
    try:
        with path.open("rb") as file:
            head = file.read(262)
    except OSError:
        return ""
    if head.startswith(_PICTURES) or head[8:12] == b"WEBP" or head[4:8] == b"ftyp" or head[128:132] == b"DICM":
        return "picture"
    if head[257:262] == b"ustar":
        return "archive"
    return next((kind for start, kind in _CONTAINERS.items() if head.startswith(start)), "")


def files(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Yield all files below a folder, sorted in each folder. Links are followed, unless they lead back to one above."""
    real = folder.resolve()
    if real in above:
        return
    try:
        names = sorted(entry.name for entry in folder.iterdir())  # texts are a third of the size of paths
    except OSError as error:
        raise SourceError(f"{folder} cannot be listed: {error.strerror}. Check its permissions.") from error
    for name in names:
        # Left behind by archive programs: .DS_Store, ._photo.jpg, __MACOSX.
        if name.startswith((".", "__MACOSX")):
            continue
        entry = folder / name
        if entry.is_dir():
            yield from files(entry, above | {real})
        else:
            yield entry
