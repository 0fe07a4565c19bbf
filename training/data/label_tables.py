"""Reads the CSV files that come with dermoscopy data sets, recognising each by its columns, not by its name.

| kind       | recognised by                                             | says                                  |
| ---------- | --------------------------------------------------------- | ------------------------------------- |
| isic2019   | an image column and at least three class columns of 0 / 1 | diagnosis                             |
| isic2018   | the same with AKIEC in place of AK and SCC                | diagnosis                             |
| ham10000   | an image and a diagnosis column, and `dx` or HAM_ lesions | diagnosis, lesion, age, sex, site     |
| labels     | any other image and diagnosis column                      | diagnosis, and the others if present  |
| metadata   | an image column and a lesion, age, sex or site            | these (ISIC metadata, 2018 groupings) |

The one thing told from a name: a truth file with the word "test" in it is a challenge's official test set, also in the
columns of HAM10000, with which it comes.
"""

import csv
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from training.data import vocabulary

ENDINGS = (".csv", ".tsv", ".tab")

# Spellings of the columns, best first, after lower-casing and turning everything else into "_".
_COLUMNS = {
    "image": ("image", "image_id", "isic_id", "image_name", "image_path", "filename", "file_name", "file", "path",
              "img", "img_id", "name", "id"),
    "label": ("label", "dx", "diagnosis", "diagnostic", "class", "target", "category"),
    "lesion_id": ("lesion_id", "lesion", "lesionid"),
    "age": ("age", "age_approx", "age_years"),
    "sex": ("sex", "gender"),
    "site": ("site", "anatom_site_general", "anatom_site_general_challenge", "localization", "localisation",
             "anatom_site", "location"),
}  # fmt: skip
_MANIFEST_COLUMNS = {"split", "sha256", "phash"}
# A truth file may have rows that are no plain 0 / 1 choice; a file in which most are not is a submission's scores.
_MIN_ONE_HOT_SHARE = 0.5
# Plain UTF-8, without the byte order mark that Excel writes. Other encodings spoil no more than a letter in a site.
_ENCODING = "utf-8-sig"


class Row(NamedTuple):
    """What one table says of one image; "" or None where it says nothing. `label` is as written in the file."""

    image: str
    label: str
    lesion_id: str
    age: float | None
    sex: str
    site: str


@dataclass(frozen=True)
class Table:
    """One recognised file. `faults` are (what is wrong, an example) of rows that were left out."""

    path: Path
    kind: str
    official_test: bool
    rows: tuple[Row, ...]
    faults: tuple[tuple[str, str], ...]


def read_table(path: Path) -> Table | str:
    """Read one file. Returns a sentence instead where it is no table of images (never raises for its content)."""
    try:
        header, separator = _header(path)
    except (OSError, csv.Error) as error:
        return f"cannot be read ({error})"
    columns = {re.sub(r"[^a-z0-9]+", "_", name.strip().casefold()).strip("_"): name for name in reversed(header)}
    if columns.keys() >= _MANIFEST_COLUMNS:
        return "is a manifest made earlier"
    roles = {
        role: next((columns[alias] for alias in aliases if alias in columns), None)
        for role, aliases in _COLUMNS.items()
    }
    classes = {name: code for name in header if name not in roles.values() and (code := vocabulary.class_code(name))}
    says_something = any(name is not None for role, name in roles.items() if role != "image")
    if roles["image"] is None or not (says_something or len(classes) >= 3):
        return "has no columns of an image and its diagnosis, lesion, age, sex or site"

    surplus: list[list[str]] = []
    try:
        frame = pd.read_csv(
            path, sep=separator, encoding=_ENCODING, encoding_errors="replace", dtype=str, keep_default_na=False,
            index_col=False, engine="python", on_bad_lines=surplus.append,
        ).fillna("")  # fmt: skip
    except (OSError, ValueError, csv.Error) as error:  # pandas' ParserError is a ValueError
        return f"cannot be read ({error})"
    faults = [("row has more fields than the header", f"{path.name}: {line[0]}") for line in surplus]
    cells = {role: frame[name].str.strip() if name else pd.Series("", frame.index) for role, name in roles.items()}

    if len(classes) >= 3:
        labels = _one_hot(frame, classes)
        if len(labels) and (labels != "").mean() < _MIN_ONE_HOT_SHARE:
            return "holds scores (a submission?), not a truth of one class an image"
        faults += [
            ("truth row does not name exactly one class", f"{path.name}: {image}")
            for image in cells["image"][labels == ""]
        ]
        kind = "isic2018" if "akiec" in columns and "ak" not in columns else "isic2019"
        cells["label"], keep = labels, labels != ""
    else:
        keep = pd.Series(True, frame.index)
        kind = "metadata"
        if roles["label"] is not None:
            is_ham = "dx" in columns or cells["lesion_id"].str.startswith("HAM_").any()
            kind = "ham10000" if is_ham else "labels"

    blank = cells["image"] == ""
    faults += [("row names no image", f"{path.name}: line {line + 2}") for line in frame.index[blank]]
    rows = tuple(
        Row(
            image,
            label,
            vocabulary.text_or_blank(lesion),
            vocabulary.age(age),
            vocabulary.sex(sex),
            vocabulary.site(site),
        )
        for image, label, lesion, age, sex, site, kept in zip(
            *(cells[role] for role in _COLUMNS), keep & ~blank, strict=True
        )
        if kept
    )
    words = set(re.split(r"[^a-z]+", path.stem.casefold()))
    is_test = "test" in words and (kind in ("isic2019", "isic2018") or (kind == "ham10000" and "isic" in words))
    return Table(path, kind, is_test, rows, tuple(faults))


def _header(path: Path) -> tuple[list[str], str]:
    """Column names and separator; only the first line is read, as tables of pixels run to gigabytes."""
    with path.open(encoding=_ENCODING, errors="replace", newline="") as file:
        line = file.readline(1 << 20)
    separator = max(",;\t", key=line.count)
    return next(csv.reader([line], delimiter=separator), []), separator


def _one_hot(frame: pd.DataFrame, classes: dict[str, str]) -> pd.Series:
    """The class code of each row, "" for a row that is not one 1 and otherwise 0s."""
    values = frame[list(classes)].apply(pd.to_numeric, errors="coerce")
    exact = values.isin([0, 1]).all(axis=1) & (values.sum(axis=1) == 1)
    return values.fillna(0.0).idxmax(axis=1).map(classes).where(exact, "")
