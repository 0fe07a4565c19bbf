"""Looks through data directories: which images are there, and what each table and folder says of them.

A row finds its image by the ISIC identifier wherever the image lies, so that the ISIC 2019 truth also speaks of the
same photos in a copy of HAM10000 or in class folders. Any other name ("img_001.jpg") means nothing outside its own
data set: it is looked up under the table's folder, or, if none of the table's names is found there, in the whole data
directory that holds the table. Folders before a name count, but for those that all rows begin with, which may be those
of another machine.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from handlers.errors import UserError
from handlers.identifiers import isic_id
from training.data import vocabulary
from training.data.label_tables import ENDINGS, Row, Table, read_table

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
# Whose word on a diagnosis counts: the first that says anything of an image settles it. ISIC 2019's experts looked
# at HAM10000's images again and told AK from SCC; folders are somebody's sorting of a download.
AUTHORITIES = ("isic2019", "isic2018", "ham10000", "labels", "folder")

_TEST_FOLDERS = frozenset({"test", "testing"})
# Parts of one data set, each perhaps with a table of its own: a lesion's id holds in all of them.
_PARTS = _TEST_FOLDERS | {"train", "training", "val", "valid", "validation"}


class SourceError(UserError):
    """A data directory cannot be used at all; the message says which and why."""


@dataclass
class Faults:
    """Everything odd that was met, by kind; keeps every example, in the order met."""

    found: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))

    def add(self, kind: str, example: str) -> None:
        """Note one more case of `kind`."""
        self.found[kind].append(example)


@dataclass
class SourceImage:
    """One image file and what is said of it, not yet weighed."""

    path: Path
    root: Path
    isic_id: str | None
    source: str | None = None
    claims: set[tuple[str, str]] = field(default_factory=set)  # (authority, class code; "" for one that is not known)
    unknown_labels: set[str] = field(default_factory=set)
    lesions: set[tuple[str, str]] = field(default_factory=set)  # (folder where the id is valid: "" everywhere, id)
    age: float | None = None
    sex: str = ""
    site: str = ""
    is_test: bool = False

    @property
    def name(self) -> str:
        """The ISIC identifier, or else the file's name without its ending."""
        return self.isic_id or self.path.stem


@dataclass
class Sources:
    """All images of all directories, and how they were recognised."""

    images: list[SourceImage]
    tables: list[Table]
    faults: Faults
    ignored_files: dict[str, str]


def read_sources(directories: Sequence[Path]) -> Sources:
    """Look through the directories. Raises SourceError for one that is missing, empty, or cannot be listed."""
    faults, ignored = Faults(), {}
    images: list[SourceImage] = []
    tables: list[tuple[Table, Path]] = []
    seen: set[Path] = set()
    # The outermost first: what lies in several of them belongs to that one, in whatever order they are named.
    for root in sorted(directories, key=lambda directory: len(directory.parts)):
        image_paths, table_paths = _scan(root, faults)
        found_tables = 0
        for path in table_paths:
            if path in seen:  # --data X --data X/part
                found_tables += str(path) not in ignored
                continue
            seen.add(path)
            table = read_table(path)
            if isinstance(table, str):
                ignored[str(path)] = table
                continue
            found_tables += 1
            tables.append((table, root))
            for kind, example in table.faults:
                faults.add(kind, example)
        if not image_paths and not found_tables:
            raise SourceError(f"{root} holds neither images nor a table of images; is it the right folder?")
        for path in image_paths:
            if path not in seen:
                seen.add(path)
                images.append(SourceImage(path, root, isic_id(path.stem)))

    # The best authority comes first, so that the first age, sex and site met are the ones to keep.
    order = {kind: rank for rank, kind in enumerate(("metadata", *AUTHORITIES))}
    tables.sort(key=lambda pair: (order[pair[0].kind], str(pair[0].path)))
    listed_by = _join(images, tables, faults)
    _read_folders(images)
    for image in images:
        _settle_source(image, listed_by[image.path])
    return Sources(images, [table for table, _ in tables], faults, ignored)


def _scan(root: Path, faults: Faults) -> tuple[list[Path], list[Path]]:
    if not root.exists():
        raise SourceError(f"There is no {root}; give the folder that holds the data set.")
    if not root.is_dir():
        raise SourceError(f"{root} is a file; give the folder that holds the data set.")
    images, tables = [], []
    for path in _files(root):
        ending = path.suffix.casefold()
        if any("\udc80" <= letter <= "\udcff" for letter in str(path)):  # how Python shows bytes that are no UTF-8
            faults.add("file name is not valid UTF-8; rename the file", ascii(str(path)))
        elif ending in IMAGE_ENDINGS:
            images.append(path)
        elif ending in ENDINGS or path.name == "HAM10000_metadata":  # Dataverse's name has no ending
            tables.append(path)
    return images, tables


def _files(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """All files below a folder; links are followed, unless they lead back to a folder above."""
    real = folder.resolve()
    if real in above:
        return
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise SourceError(f"{folder} cannot be listed: {error.strerror}.") from error
    for entry in entries:
        # What archive programs leave behind: .DS_Store, ._photo.jpg, __MACOSX.
        if entry.name.startswith((".", "__MACOSX")):
            continue
        if entry.is_dir():
            yield from _files(entry, above | {real})
        else:
            yield entry


def _join(
    images: list[SourceImage], tables: list[tuple[Table, Path]], faults: Faults
) -> dict[Path, list[tuple[Table, Path]]]:
    """Put every row's word on its images. Returns, for each image's path, the tables that list it."""
    by_isic_id: dict[str, list[SourceImage]] = defaultdict(list)
    for image in images:
        if image.isic_id:
            by_isic_id[image.isic_id].append(image)
    listed_by: dict[Path, list[tuple[Table, Path]]] = defaultdict(list)
    scopes: dict[Path, dict[str, list[SourceImage]]] = {}

    def scope(folder: Path) -> dict[str, list[SourceImage]]:
        if folder not in scopes:
            scopes[folder] = _index(image for image in images if image.path.is_relative_to(folder))
        return scopes[folder]

    for table, root in tables:
        local, shared = scope(table.path.parent), _shared_folders(table.rows)
        if not any(_find(row.image, local, shared) for row in table.rows):
            local = scope(root)
        labels: dict[str, set[str]] = defaultdict(set)
        for row in table.rows:
            known = isic_id(Path(row.image.replace("\\", "/")).name.partition(".")[0])
            key = known or row.image
            found = by_isic_id.get(known, []) if known else _find(row.image, local, shared)
            before = len(labels[key])
            if label := vocabulary.text_or_blank(row.label):
                labels[key].add(vocabulary.class_code(label) or label)
            if len(labels[key]) == 2 > before:
                faults.add("table gives one image two diagnoses", f"{table.path.name}: {key}")
            if not found:
                faults.add(f"row without an image in {table.path.name}", row.image)
            elif not known and len(found) > 1:
                faults.add("row fits several images; give the path as well as the name", f"{table.path.name}: {key}")
            else:
                for image in found:
                    _apply(row, table, image, faults)
                    listed_by[image.path].append((table, root))
    return listed_by


def _index(images: Iterable[SourceImage]) -> dict[str, list[SourceImage]]:
    """Images by every ending of their path, with and without the file's ending: c.jpg, c, b/c.jpg, b/c, ..."""
    index: dict[str, list[SourceImage]] = defaultdict(list)
    for image in images:
        depth = len(image.root.parts) - 1  # a row's path may begin with the data directory's own name
        parts = [part.casefold() for part in image.path.parts[depth:]]
        for start in range(len(parts)):
            path = "/".join(parts[start:])
            index[path].append(image)
            index[path.removesuffix(image.path.suffix.casefold())].append(image)
    return index


def _parts(name: str) -> list[str]:
    return [part for part in name.replace("\\", "/").casefold().split("/") if part not in ("", ".", "..")]


def _shared_folders(rows: Sequence[Row]) -> int:
    """How many folders the names of all rows begin with: those may be left out, others tell two files apart."""
    levels = zip(*(_parts(row.image)[:-1] for row in rows), strict=False)  # as many as the shortest name has
    return sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, levels))


def _find(name: str, index: dict[str, list[SourceImage]], shared: int) -> list[SourceImage]:
    """The images a row's name may mean: by as much of its path as fits, leaving out `shared` folders at most."""
    parts = _parts(name)
    for start in range(min(shared + 1, len(parts))):
        if found := index.get("/".join(parts[start:])):
            return found
    return []


def _apply(row: Row, table: Table, image: SourceImage, faults: Faults) -> None:
    if label := vocabulary.text_or_blank(row.label):
        code = vocabulary.class_code(label)
        # One that is not known is a word on the image all the same: a lesser authority must not have the last one.
        image.claims.add((table.kind, code or ""))
        if not code:
            image.unknown_labels.add(label)
            faults.add(f"unknown diagnosis {label!r} in {table.path.name}", row.image)
    if row.lesion_id:
        folder = table.path.parent
        while folder.name.casefold() in _PARTS:
            folder = folder.parent
        image.lesions.add((str(folder), row.lesion_id))
        if image.isic_id:
            image.lesions.add(("", row.lesion_id))
    image.age = row.age if image.age is None else image.age
    image.sex = image.sex or row.sex
    image.site = image.site or row.site
    image.is_test |= table.official_test


def _read_folders(images: list[SourceImage]) -> None:
    """Class folders: the nearest folder between data directory and image that names a class.

    The data directory's own name may say Test, but no class: "melanoma" is also what people call a whole collection.
    """
    folders_above: dict[tuple[Path, Path], list[Path]] = {(image.path.parent, image.root): [] for image in images}
    for (folder, root), above in folders_above.items():
        above.extend(place for place in (folder, *folder.parents) if place.is_relative_to(root))
    codes = {
        place: vocabulary.class_code(place.name) if place != root else None
        for (_, root), above in folders_above.items()
        for place in above
    }
    beside_classes = {place.parent for place, code in codes.items() if code}  # folders that hold class folders

    for image in images:
        above = folders_above[image.path.parent, image.root]
        image.is_test |= any(place.name.casefold() in _TEST_FOLDERS for place in above)
        if code := next((codes[place] for place in above if codes[place]), None):
            image.claims.add(("folder", code))
        else:
            image.unknown_labels |= {place.name for place in above if place.parent in beside_classes}


def _settle_source(image: SourceImage, listed_by: list[tuple[Table, Path]]) -> None:
    """The data set an image is counted under: the one whose table lies in a folder above it (the nearest, then the
    best authority), else class folders, else the best authority that lists it from elsewhere."""
    above = [
        (-len(table.path.parent.parts), AUTHORITIES.index(table.kind), table.kind)
        for table, _ in listed_by
        if table.kind in AUTHORITIES and image.path.is_relative_to(table.path.parent)
    ]
    if above:
        image.source = min(above)[2]
    elif image.claims:
        authorities = {authority for authority, _ in image.claims}
        image.source = "folder" if "folder" in authorities else min(authorities, key=AUTHORITIES.index)
