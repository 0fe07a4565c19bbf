"""Search data folders, and join the rows of all tables to the images.

A row finds its image by the ISIC identifier wherever the image lies, so the ISIC 2019 truth also describes the same
photos in a copy of HAM10000. Any other name ("img_001.jpg") counts only inside its own data set: below the table's
folder, or below the whole data folder if no name of the table is found there. Folders before a name count, except
those that all rows share, which may be folders of another machine.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from handlers.identifiers import isic_id
from training.data import vocabulary
from training.data.data_sets import FOLDER, authorities
from training.data.image_files import Faults, SourceError, scan
from training.data.label_tables import Row, Table, read_table

_TEST_FOLDERS = frozenset({"test", "testing"})
# Parts of one data set, each perhaps with its own table. A lesion's or patient's id holds in all of them.
_PARTS = _TEST_FOLDERS | {"train", "training", "val", "valid", "validation"}


@dataclass(frozen=True)
class Identifier:
    """The id of a lesion or a patient. `scope` is the folder in which it is valid, "" for everywhere.

    `numbering` is the series that it belongs to: two ids of one series are two lesions.
    """

    scope: str
    name: str
    numbering: str

    @property
    def key(self) -> tuple[str, str]:
        """Equal for two statements of the same lesion or patient."""
        return self.scope, self.name


@dataclass
class SourceImage:
    """One image file and all statements on it, not yet weighed."""

    path: Path
    root: Path
    isic_id: str | None
    source: str | None = None
    claims: set[tuple[str, str]] = field(default_factory=set)  # (authority, class code; "" for an unknown one)
    unknown_labels: set[str] = field(default_factory=set)
    lesions: set[Identifier] = field(default_factory=set)
    patients: set[Identifier] = field(default_factory=set)
    image_types: set[str] = field(default_factory=set)
    photographs: str = ""  # the kind of picture, if its whole data set is no dermoscopy
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
    """All images of all folders, and the tables that were recognised."""

    images: list[SourceImage]
    tables: list[Table]
    faults: Faults
    ignored_files: dict[str, str]


def read_sources(directories: Sequence[Path]) -> Sources:
    """Look through the folders. Raises SourceError for one that is missing, empty, or cannot be listed."""
    faults, ignored = Faults(), {}
    images: list[SourceImage] = []
    tables: list[tuple[Table, Path]] = []
    seen: set[Path] = set()
    # The outermost first: an image below several of the folders belongs to the outermost, in any order of options.
    for root in sorted(directories, key=lambda directory: len(directory.parts)):
        image_paths, table_paths = scan(root, faults)
        recognised = 0
        for path in table_paths:
            if path in seen:  # --data X --data X/part
                recognised += str(path) not in ignored
                continue
            seen.add(path)
            table = read_table(path)
            if isinstance(table, str):
                ignored[str(path)] = table
                continue
            recognised += 1
            tables.append((table, root))
            for kind, example in table.faults:
                faults.add(kind, example)
        if not image_paths and not recognised:
            raise SourceError(f"{root} holds neither images nor a table of images. Check that it is the right folder.")
        for path in image_paths:
            if path not in seen:
                seen.add(path)
                images.append(SourceImage(path, root, isic_id(path.stem)))

    # Metadata first, then the best authority, so that the first age, sex and site are the ones to keep.
    rank = {name: number for number, name in enumerate(("metadata", *(a for a in authorities() if a != "metadata")))}
    tables.sort(key=lambda pair: (rank[pair[0].kind], str(pair[0].path)))
    listed_by = _join(images, tables, faults)
    _read_folders(images)
    for image in images:
        image.source = _source(image, listed_by[image.path])
    return Sources(images, [table for table, _ in tables], faults, ignored)


def _join(
    images: list[SourceImage], tables: list[tuple[Table, Path]], faults: Faults
) -> dict[Path, list[tuple[Table, Path]]]:
    """Apply every row to its images. Returns the tables that list each image's path."""
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
        rows = [row for row in table.rows if row.image]
        local, shared = scope(table.path.parent), _shared_folders(rows)
        if not any(_find(row.image, local, shared) for row in rows):
            local = scope(root)
        labels: dict[str, set[str]] = defaultdict(set)
        for row in rows:
            identifier = isic_id(Path(row.image.replace("\\", "/")).name.partition(".")[0])
            key = identifier or row.image
            matches = by_isic_id.get(identifier, []) if identifier else _find(row.image, local, shared)
            before = len(labels[key])
            if row.label:
                labels[key].add(row.code or row.label)
            if len(labels[key]) == 2 > before:
                faults.add("table gives one image two diagnoses", f"{table.path.name}: {key}")
            if not matches:
                faults.add(f"row without an image in {table.path.name}", row.image)
            elif not identifier and len(matches) > 1:
                faults.add("row fits several images; give the path as well as the name", f"{table.path.name}: {key}")
            else:
                for image in matches:
                    _apply(row, table, image, faults)
                    listed_by[image.path].append((table, root))
    _join_by_lesion(images, tables, listed_by, faults)
    return listed_by


def _join_by_lesion(
    images: list[SourceImage],
    tables: list[tuple[Table, Path]],
    listed_by: dict[Path, list[tuple[Table, Path]]],
    faults: Faults,
) -> None:
    """Apply the rows that name a lesion in place of an image: other tables say which images show that lesion."""
    by_lesion: dict[tuple[str, str], list[SourceImage]] = defaultdict(list)
    for image in images:
        for key in {lesion.key for lesion in image.lesions}:
            by_lesion[key].append(image)
    for table, root in tables:
        for row in (row for row in table.rows if not row.image):
            shown = [*by_lesion[_folder(table), row.lesion_id], *by_lesion["", row.lesion_id]]
            if not shown:
                faults.add(f"lesion without an image in {table.path.name}", row.lesion_id)
            for image in {image.path: image for image in shown}.values():
                _apply(row, table, image, faults)
                listed_by[image.path].append((table, root))


def _index(images: Iterable[SourceImage]) -> dict[str, list[SourceImage]]:
    """Images by every ending of their path, with and without the file's ending: c.jpg, c, b/c.jpg, b/c, ..."""
    index: dict[str, list[SourceImage]] = defaultdict(list)
    for image in images:
        depth = len(image.root.parts) - 1  # a row's path may begin with the data folder's own name
        parts = [part.casefold() for part in image.path.parts[depth:]]
        for start in range(len(parts)):
            path = "/".join(parts[start:])
            for key in {path, path.removesuffix(image.path.suffix.casefold())}:
                index[key].append(image)
    return index


def _parts(name: str) -> list[str]:
    return [part for part in name.replace("\\", "/").casefold().split("/") if part not in ("", ".", "..")]


def _shared_folders(rows: Sequence[Row]) -> int:
    """Count the folders that the names of all rows begin with. Only those may be left out of a path."""
    levels = zip(*(_parts(row.image)[:-1] for row in rows), strict=False)  # as many as the shortest name has
    return sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, levels))


def _find(name: str, index: dict[str, list[SourceImage]], shared: int) -> list[SourceImage]:
    """Return the images that a row's name may mean, leaving out at most `shared` folders of its path."""
    parts = _parts(name)
    for start in range(min(shared + 1, len(parts))):
        if matches := index.get("/".join(parts[start:])):
            return matches
    return []


def _folder(table: Table) -> str:
    """Return the folder in which a table's lesion and patient ids are valid: train/ and test/ share theirs."""
    folder = table.path.parent
    while folder.name.casefold() in _PARTS:
        folder = folder.parent
    return str(folder)


def _identifiers(name: str, table: Table, image: SourceImage) -> set[Identifier]:
    """Return a row's lesion or patient id. That of an ISIC image is valid everywhere."""
    folder = _folder(table)
    scopes = (folder, "") if image.isic_id else (folder,)
    return {Identifier(scope, name, f"{table.kind} {folder}") for scope in scopes}


def _apply(row: Row, table: Table, image: SourceImage, faults: Faults) -> None:
    if row.label:
        # An unknown diagnosis is a statement all the same: a lesser authority must not have the last word.
        image.claims.add((table.kind, row.code))
        if not row.code:
            image.unknown_labels.add(row.label)
            faults.add(f"unknown diagnosis {row.label!r} in {table.path.name}", row.image or row.lesion_id)
    if row.lesion_id:
        image.lesions |= _identifiers(row.lesion_id, table, image)
    if row.patient_id:
        image.patients |= _identifiers(row.patient_id, table, image)
    if row.image_type:
        image.image_types.add(row.image_type)
    image.photographs = image.photographs or table.data_set.photographs
    image.age = row.age if image.age is None else image.age
    image.sex = image.sex or row.sex
    image.site = image.site or row.site
    image.is_test |= table.official_test


def _read_folders(images: list[SourceImage]) -> None:
    """Read class folders: the nearest folder between data folder and image that names a class.

    The data folder's own name may say Test, but no class: "melanoma" is also a name for a whole collection.
    """
    folders_above: dict[tuple[Path, Path], list[Path]] = {(image.path.parent, image.root): [] for image in images}
    for (folder, root), above in folders_above.items():
        above.extend(place for place in (folder, *folder.parents) if place.is_relative_to(root))
    codes = {
        place: vocabulary.class_code(place.name) if place != root else None
        for (_, root), above in folders_above.items()
        for place in above
    }
    parents_of_classes = {place.parent for place, code in codes.items() if code}

    for image in images:
        above = folders_above[image.path.parent, image.root]
        image.is_test |= any(place.name.casefold() in _TEST_FOLDERS for place in above)
        if code := next((codes[place] for place in above if codes[place]), None):
            image.claims.add((FOLDER, code))
        else:
            image.unknown_labels |= {place.name for place in above if place.parent in parents_of_classes}


def _source(image: SourceImage, listed_by: list[tuple[Table, Path]]) -> str | None:
    """Return the data set an image is counted under.

    The collection that its lesion id names; else the data set whose table lies in a folder above it (the nearest, then
    the best authority); else its class folder; else the best authority that lists it from elsewhere.
    """
    order = authorities()
    above = [
        (-len(table.path.parent.parts), order.index(table.kind), table.kind)
        for table, _ in listed_by
        if table.kind != "metadata" and image.path.is_relative_to(table.path.parent)
    ]
    if above:
        best = min(above)[2]
    elif any(authority == FOLDER for authority, _ in image.claims):
        best = FOLDER
    elif image.claims:
        best = min((authority for authority, _ in image.claims), key=order.index)
    else:
        return None
    prefixes = next((table.data_set.sources for table, _ in listed_by if table.kind == best), {})
    lesions = sorted(lesion.name for lesion in image.lesions)
    return next((name for prefix, name in prefixes.items() if any(i.startswith(prefix) for i in lesions)), best)
