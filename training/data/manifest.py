"""The manifest: one checked table of all training images.

Columns: `image` (path, relative to the manifest's folder if below it, else absolute), `image_id`, `label` (class
code), `lesion_id` (a lesion with its near-duplicates), `patient_id` (blank if unknown), `source`, `age`, `sex`, `site`
(blank if unknown), `split`, `sha256`, `phash`. No split divides a lesion or a patient. One row is one photograph.
Next to it stands manifest.report.json.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from handlers.errors import UserError
from handlers.files import atomic_file
from handlers.taxonomy import CODES
from training.data.data_sets import source_names
from training.data.splits import SPLITS

COLUMNS = (
    "image", "image_id", "label", "lesion_id", "patient_id", "source", "age", "sex", "site", "split", "sha256", "phash",
)  # fmt: skip


class ManifestError(UserError):
    """The manifest cannot be made, read or written."""


def read_manifest(path: str | Path) -> pd.DataFrame:
    """Read and check a manifest.

    `age` is float (NaN if unknown); all other columns are text. The column `path` is added: each image's absolute path.

    Raises:
        ManifestError: the file cannot be read, a value is wrong, an image is missing, or a split divides a group.
    """
    path = absolute(path)
    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise ManifestError(f"There is no manifest {path}. Make it with scripts/prepare_data.py.") from error
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path} cannot be read as a manifest: {error}. Run prepare_data.py again.") from error
    if not isinstance(frame.index, pd.RangeIndex):  # pandas takes the first columns for names of the rows
        raise ManifestError(f"{path} has rows with more fields than the header. Run prepare_data.py again.")
    missing = [column for column in COLUMNS if column not in frame]
    if missing:
        raise ManifestError(f"{path} lacks the column {', '.join(missing)}. Run prepare_data.py again.")
    if frame.empty:
        raise ManifestError(f"{path} has no rows. Run prepare_data.py again.")

    age = pd.to_numeric(frame["age"], errors="coerce")
    _check_values(path, frame, age)
    frame["age"] = age
    if lesion := _divided(frame, "lesion_id"):
        raise ManifestError(f"{path} puts the lesion {lesion} into several splits. Run prepare_data.py again.")
    if patient := _divided(frame, "patient_id"):
        raise ManifestError(f"{path} puts the patient {patient} into several splits. Run prepare_data.py again.")
    frame["path"] = [str(path.parent / image) for image in frame["image"]]
    absent = [image for image in frame["path"] if not Path(image).is_file()]
    if absent:
        raise ManifestError(
            f"{len(absent):,} of the {len(frame):,} images in {path} are missing, the first is {absent[0]}. If the "
            "data has moved, run prepare_data.py again."
        )
    return frame


def write_manifest(path: str | Path, frame: pd.DataFrame, report: dict[str, Any] | None = None) -> None:
    """Write a manifest, and its report if there is one. Both are complete before either gets its name.

    `frame` has a manifest's columns except `image`, which follows from the column `path`. Raises ManifestError.
    """
    path = absolute(path)
    images = [Path(image) for image in frame["path"]]
    relative = [
        image.relative_to(path.parent).as_posix() if image.is_relative_to(path.parent) else str(image)
        for image in images
    ]
    table = frame.assign(image=relative)[list(COLUMNS)]
    text = table.to_csv(index=False, float_format="%g", lineterminator="\n")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(text.encode())
            if report is not None:
                file.flush()
                with atomic_file(report_path(path)) as report_file:
                    report_file.write((json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise ManifestError(
            f"{path} cannot be written: {error.strerror or error}. Choose another --out, or free the disk."
        ) from error


def fingerprint(frame: pd.DataFrame) -> str:
    """Return "sha256:" and the hash of every image's digest, label, lesion, split, age, sex and site.

    Neither the order of the rows nor the place of the files matters.
    """
    age = ["" if pd.isna(years) else f"{float(years):g}" for years in frame["age"]]
    columns = [frame[name] for name in ("sha256", "label", "lesion_id", "split", "sex", "site")]
    lines = sorted(json.dumps(row, ensure_ascii=True) for row in zip(*columns, age, strict=True))
    return "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def report_path(manifest: Path) -> Path:
    """Return the path of a manifest's report."""
    return manifest.with_name(manifest.stem + ".report.json")


def absolute(path: str | Path) -> Path:
    """Return the absolute path. A manifest that is itself a link stays in its link's folder."""
    path = Path(path).expanduser()
    return path.parent.resolve() / path.name


def _divided(frame: pd.DataFrame, column: str) -> str:
    """Return the first value of a column that several splits share, "" if there is none."""
    splits = frame[frame[column] != ""].groupby(column)["split"].nunique()
    several = splits[splits > 1].index
    return str(several[0]) if len(several) else ""


def _check_values(path: Path, frame: pd.DataFrame, age: "pd.Series[float]") -> None:
    """Raise ManifestError for the first wrong value of a column; `age` is NaN where it is no number."""
    classes, splits, sources = ", ".join(CODES), ", ".join(SPLITS), ", ".join(source_names())
    checks: list[tuple[str, pd.Series[bool], str]] = [
        ("label", frame["label"].isin(CODES), f"The column label holds one of {classes}."),
        ("split", frame["split"].isin(SPLITS), f"The column split holds one of {splits}."),
        ("source", frame["source"].isin(source_names()), f"The column source holds one of {sources}."),
        ("lesion_id", frame["lesion_id"] != "", "The column lesion_id is never blank."),
        ("sha256", frame["sha256"].str.fullmatch("[0-9a-f]{64}"), "The column sha256 holds 64 hex digits."),
        ("phash", frame["phash"].str.fullmatch("[0-9a-f]{16}"), "The column phash holds 16 hex digits."),
        ("image_id", ~frame["image_id"].duplicated(), "Each image_id occurs once."),
        ("age", age.notna() | (frame["age"] == ""), "The column age holds a number, or is blank."),
    ]
    for column, good, rule in checks:
        if not good.all():
            row = int(np.argmin(good.to_numpy()))
            value = frame[column].iloc[row]
            raise ManifestError(
                f"Line {row + 2} of {path} has the wrong {column} {value!r}. {rule} Run prepare_data.py again."
            )
