"""One checked table of all training images, made from whatever data sets are given: manifest.csv.

Columns: `image` (path, relative to the manifest's folder if below it, else absolute), `image_id`, `label` (class
code), `lesion_id` (the group that a split never divides: lesion ids joined with duplicates), `source`, `age`, `sex`,
`site` (blank if unknown), `split`, `sha256`, `phash`. One row is one photograph: of several files with the same ISIC
identifier or the same bytes one is kept. Beside it stands manifest.report.json: what was counted, dropped and why.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from handlers.errors import UserError
from handlers.files import atomic_file
from handlers.taxonomy import CODES
from training.data import duplicates
from training.data.duplicates import ImageDigest
from training.data.manifest_report import make_report, summary
from training.data.photos import Photo, group_photos, labelled, merge_copies, near_pairs, settle_labels
from training.data.sources import AUTHORITIES, Faults, SourceError, SourceImage, read_sources
from training.data.splits import DEFAULT_FRACTIONS, DEFAULT_SEED, SPLITS, assign_splits

REPORT_SCHEMA = 1
COLUMNS = (
    "image", "image_id", "label", "lesion_id", "source", "age", "sex", "site", "split", "sha256", "phash",
)  # fmt: skip


class ManifestError(UserError):
    """The manifest cannot be made or read; the message says why and what to do."""


class SharesError(ManifestError):
    """The splits' shares are no shares."""


def build_manifest(
    data_dirs: Sequence[str | Path],
    out: str | Path,
    *,
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
    seed: int = DEFAULT_SEED,
    workers: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Any]:
    """Recognise, check, join and split the data sets in `data_dirs`; write `out` and its report.

    Args:
        data_dirs: folders in any known layout (see training.data.label_tables and training.data.sources).
        out: path of manifest.csv to write; the report goes beside it as <stem>.report.json.
        fractions: share of the images for each of train, val, calibration and test.
        seed: of the split.
        workers: threads that read images; default one a core.
        progress: called with (done, total) as images are read.

    Returns:
        The report, as written.

    Raises:
        SharesError: the `fractions` are no shares.
        ManifestError: nothing usable is there, or the files cannot be written.
    """
    out = _absolute(out)
    _check_fractions(fractions)
    if not data_dirs:
        raise ManifestError("No data directory was given.")
    roots = list(dict.fromkeys(Path(directory).expanduser().resolve() for directory in data_dirs))
    try:
        sources = read_sources(roots)
    except SourceError as error:
        raise ManifestError(str(error)) from error
    if not sources.images:
        tables = ", ".join(sorted({table.kind for table in sources.tables}))
        raise ManifestError(f"Tables were found ({tables}), but no image; give the folder with the images as well.")
    if not any(image.claims for image in sources.images):
        raise ManifestError(
            f"{len(sources.images):,} images were found, but nothing that names their diagnosis: no ISIC or HAM10000 "
            "table, no labels.csv with columns image,label, and no folders named after classes (give the folder above "
            "them)."
        )

    dropped = Faults()
    described = _read_images(sources.images, dropped, workers, progress)
    photos = merge_copies(described, sources.faults, dropped)
    near = near_pairs(photos)
    settled = settle_labels(photos, near, sources.faults, dropped)
    group_photos(photos, near)
    test_groups = {photo.group for photo in photos if photo.is_test}
    photos, near = labelled(photos, near)
    if not photos:
        raise ManifestError("No image is left: " + summary(dropped) + ".")
    codes: dict[str, list[str]] = defaultdict(list)
    for photo in photos:
        codes[photo.group].append(photo.label)
    fixed_test = frozenset(test_groups & codes.keys())
    splits = assign_splits(codes, fixed_test, fractions, seed)

    frame = _frame(photos, splits, out)
    report = {
        "schema": REPORT_SCHEMA,
        "fingerprint": fingerprint(frame),
        "seed": seed,
        "fractions": dict(fractions),
        **make_report(frame, roots, sources, photos, near, settled, dropped, len(fixed_test)),
    }
    _write(out, frame, report)
    return report


def read_manifest(path: str | Path) -> pd.DataFrame:
    """Read and check a manifest. `age` is float (NaN if unknown), all other columns are text; a column `path` with
    each image's absolute path is added. Raises ManifestError."""
    path = _absolute(path)
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ManifestError(f"There is no manifest {path}; make it with scripts/prepare_data.py.") from error
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path} cannot be read as a manifest: {error}") from error
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes the first columns for names of the rows
        raise ManifestError(
            f"{path} has rows of more fields than the header; make it anew with scripts/prepare_data.py."
        )
    missing = [column for column in COLUMNS if column not in frame]
    if missing:
        raise ManifestError(f"{path} lacks the column {', '.join(missing)}; make it anew with scripts/prepare_data.py.")
    if frame.empty:
        raise ManifestError(f"{path} has no rows; make it anew with scripts/prepare_data.py.")

    _check_values(path, frame, "label", frame["label"].isin(CODES), f"must be one of {', '.join(CODES)}")
    _check_values(path, frame, "split", frame["split"].isin(SPLITS), f"must be one of {', '.join(SPLITS)}")
    _check_values(path, frame, "source", frame["source"].isin(AUTHORITIES), f"must be one of {', '.join(AUTHORITIES)}")
    _check_values(path, frame, "lesion_id", frame["lesion_id"] != "", "must not be blank")
    _check_values(path, frame, "sha256", frame["sha256"].str.fullmatch("[0-9a-f]{64}"), "must be 64 hex digits")
    _check_values(path, frame, "phash", frame["phash"].str.fullmatch("[0-9a-f]{16}"), "must be 16 hex digits")
    _check_values(path, frame, "image_id", ~frame["image_id"].duplicated(), "must be unique")
    age = pd.to_numeric(frame["age"], errors="coerce")
    _check_values(path, frame, "age", age.notna() | (frame["age"] == ""), "must be a number or blank")
    frame["age"] = age
    divided = frame.groupby("lesion_id")["split"].nunique()
    if (divided > 1).any():
        raise ManifestError(
            f"{path} puts the lesion {divided[divided > 1].index[0]} into more than one split, so its measures would "
            "be too good; make it anew with scripts/prepare_data.py."
        )
    frame["path"] = [str(path.parent / image) for image in frame["image"]]
    absent = [image for image in frame["path"] if not Path(image).is_file()]
    if absent:
        raise ManifestError(
            f"{len(absent):,} of the {len(frame):,} images in {path} are not there, the first {absent[0]}; if the data "
            "has moved, make the manifest anew with scripts/prepare_data.py."
        )
    return frame


def fingerprint(frame: pd.DataFrame) -> str:
    """Identify a manifest's content: "sha256:" over every image's digest, label, group, split, age, sex and site.

    Neither the order of rows nor where the files lie has any influence.
    """
    age = ["" if pd.isna(years) else f"{float(years):g}" for years in frame["age"]]
    columns = [frame[name] for name in ("sha256", "label", "lesion_id", "split", "sex", "site")]
    lines = sorted(json.dumps(row, ensure_ascii=True) for row in zip(*columns, age, strict=True))
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def report_path(manifest: Path) -> Path:
    """Where a manifest's report stands."""
    return manifest.with_name(manifest.stem + ".report.json")


def _absolute(path: str | Path) -> Path:
    """Absolute, but a manifest that is a link itself stays where its link is."""
    path = Path(path).expanduser()
    return path.parent.resolve() / path.name


def _check_fractions(fractions: Mapping[str, float]) -> None:
    if set(fractions) != set(SPLITS) or min(fractions.values()) < 0 or not 0.999 < sum(fractions.values()) < 1.001:
        given = ", ".join(f"{name} {share:g}" for name, share in fractions.items())
        raise SharesError(f"The shares of {', '.join(SPLITS)} must be 0 or more and sum to 1; they are {given}.")
    if fractions["train"] == 0:
        raise SharesError("The train split's share is 0; leave something to learn from.")


def _check_values(path: Path, frame: pd.DataFrame, column: str, good: pd.Series, rule: str) -> None:
    if not good.all():
        line = int(np.argmin(good.to_numpy()))
        raise ManifestError(f"{path}, line {line + 2}: {column} is {frame[column].iloc[line]!r}; it {rule}.")


def _read_images(
    images: list[SourceImage], dropped: Faults, workers: int | None, progress: Callable[[int, int], object]
) -> list[tuple[SourceImage, ImageDigest]]:
    results = duplicates.read_images([image.path for image in images], workers, progress)
    described = []
    for image, result in zip(images, results, strict=True):
        if isinstance(result, str):
            dropped.add("image cannot be used", f"{image.path}: {result}")
        else:
            described.append((image, result))
    return described


def _frame(photos: list[Photo], splits: Mapping[str, str], out: Path) -> pd.DataFrame:
    folder = out.parent
    rows = []
    for photo in photos:
        path = photo.kept.path
        images = [image for image, _ in photo.copies]
        age = next((image.age for image in images if image.age is not None), None)
        rows.append(
            (
                path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path),
                photo.name,
                photo.label,
                photo.group,
                photo.kept.source,
                "" if age is None else f"{age:g}",
                next((image.sex for image in images if image.sex), ""),
                next((image.site for image in images if image.site), ""),
                splits[photo.group],
                photo.digest.sha256,
                duplicates.hash_text(photo.digest.phash),
            )
        )
    frame = pd.DataFrame(rows, columns=list(COLUMNS), dtype=str)
    frame["age"] = pd.to_numeric(frame["age"])
    return frame


def _write(out: Path, frame: pd.DataFrame, report: dict[str, Any]) -> None:
    """Both files are written in full before either takes its place, the report first."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as table, atomic_file(report_path(out)) as beside:
            table.write(frame.to_csv(index=False, float_format="%g", lineterminator="\n").encode())
            table.flush()
            beside.write((json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise ManifestError(f"{out} cannot be written: {error.strerror or error}.") from error
