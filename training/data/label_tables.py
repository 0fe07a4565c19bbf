"""Read the CSV files of dermoscopy data sets, and recognise each by its columns, not by its name.

data_sets.yaml describes the columns and labels of each data set. Only a challenge's official test set is recognised by
the name of its truth file.
"""

import csv
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from training.data import vocabulary
from training.data.data_sets import DataSet, data_sets

ENDINGS = (".csv", ".tsv", ".tab")
_MANIFEST_COLUMNS = {"split", "sha256", "phash"}
# A truth file may have some rows that are no plain 0 / 1 choice. A file with mostly such rows is a submission's scores.
_MIN_ONE_HOT_SHARE = 0.5
# Plain UTF-8, without the byte order mark that Excel writes. Other encodings spoil no more than a letter in a site.
_ENCODING = "utf-8-sig"
DERMOSCOPY = "dermoscopy"


class Row(NamedTuple):
    """One table's statement on one image, or on one lesion where `image` is "". "" and None: no statement.

    `label` is the diagnosis as written, `code` its class code ("": none that is known). `image_type` is
    DERMOSCOPY or the type as written.
    """

    image: str
    label: str
    code: str
    lesion_id: str
    patient_id: str
    age: float | None
    sex: str
    site: str
    image_type: str


@dataclass(frozen=True)
class Table:
    """One recognised file. `faults` are (kind, example) of rows that were left out."""

    path: Path
    data_set: DataSet
    official_test: bool
    rows: tuple[Row, ...]
    faults: tuple[tuple[str, str], ...]

    @property
    def kind(self) -> str:
        """The data set's name."""
        return self.data_set.name


def read_table(path: Path) -> Table | str:
    """Read one file. Returns a phrase instead if it is no table of images; never raises for the file's content."""
    try:
        header, separator, first_line = _header(path)
    except (OSError, csv.Error) as error:
        return f"cannot be read ({error})"
    columns = {re.sub(r"[^a-z0-9]+", "_", name.strip().casefold()).strip("_"): name for name in reversed(header)}
    if columns.keys() >= _MANIFEST_COLUMNS:
        return "is a manifest made earlier"
    data_set = _recognise(columns, first_line)
    if data_set is None:
        return "has no columns of an image and its diagnosis, lesion, patient, age, sex or site"
    if data_set.header:
        columns = {name: name for name in data_set.header}

    surplus: list[list[str]] = []
    try:
        frame = pd.read_csv(
            path, sep=separator, encoding=_ENCODING, encoding_errors="replace", dtype=str, keep_default_na=False,
            index_col=False, engine="python", on_bad_lines=surplus.append,
            names=list(data_set.header) or None, header=None if data_set.header else 0,
        ).fillna("")  # fmt: skip
    except (OSError, ValueError, csv.Error) as error:  # pandas' ParserError is a ValueError
        return f"cannot be read ({error})"
    faults = [("row has more fields than the header", f"{path.name}: {line[0]}") for line in surplus]

    classes = data_set.class_columns(columns)
    if classes:
        codes = _one_hot(frame, classes, data_set.otherwise)
        if len(codes) and codes.notna().mean() < _MIN_ONE_HOT_SHARE:
            return "holds scores (a submission?), not a truth with one class per image"
        key = data_set.column("image", columns) or data_set.column("lesion", columns)
        faults += [("truth row does not name exactly one class", f"{path.name}: {k}") for k in frame[key][codes.isna()]]
        frame, codes = frame[codes.notna()], codes[codes.notna()]
        diagnoses = [(header, code) for header, _, code in (text.rpartition(":") for text in codes)]
    else:
        labels = data_set.label_columns(columns)
        diagnoses = [_diagnosis(data_set, levels) for levels in frame[labels].itertuples(index=False)]
    if data_set.needs_label:
        data_set = _by_lesions(data_set, frame, columns)

    rows = []
    for line, row in enumerate(_rows(data_set, frame, columns, diagnoses)):
        if row.image or (row.lesion_id and not data_set.images and not data_set.column("image", columns)):
            rows.append(row)
        elif not data_set.images:
            faults.append(("row names no image", f"{path.name}: line {frame.index[line] + 2}"))
    words = set(re.split(r"[^a-z]+", path.stem.casefold()))
    is_test = bool(data_set.test) and words >= data_set.test
    return Table(path, data_set, is_test, tuple(rows), tuple(faults))


def _recognise(columns: Mapping[str, str], first_line: str) -> DataSet | None:
    for data_set in data_sets().values():
        if data_set.fits(columns) or (data_set.header and re.fullmatch(data_set.first_row, first_line.strip())):
            return data_set
    return None


def _by_lesions(labels: DataSet, frame: pd.DataFrame, columns: Mapping[str, str]) -> DataSet:
    """Return the data set whose lesion ids the table has, for a table whose columns were renamed."""
    header = labels.column("lesion", columns)
    for data_set in data_sets().values():
        if header and data_set.or_lesions and frame[header].str.strip().str.startswith(data_set.or_lesions).any():
            return data_set
    return labels


def _diagnosis(data_set: DataSet, levels: tuple[str, ...]) -> tuple[str, str]:
    """Return the diagnosis as written and its class code: of several levels, the deepest that has a code.

    Where no level has one, or a level says that it is none of the classes, the code is "".
    """
    texts = [text for level in levels if (text := vocabulary.text_or_blank(level))]
    for text in texts:
        if (code := data_set.class_code(text)) is not None:
            return text, code
    return (texts[0] if texts else ""), ""


def _rows(
    data_set: DataSet, frame: pd.DataFrame, columns: Mapping[str, str], diagnoses: list[tuple[str, str]]
) -> Iterator[Row]:
    def cells(role: str) -> list[str]:
        header = data_set.column(role, columns)
        return frame[header].str.strip().tolist() if header else [""] * len(frame)

    pictures = {columns[name]: kind for name, kind in data_set.images.items() if name in columns}
    if not pictures:
        header = data_set.column("image", columns)
        pictures = {header: ""} if header else {}
    images = {kind: frame[header].str.strip().tolist() for header, kind in pictures.items()} or {"": [""] * len(frame)}
    for index, (lesion, patient, age, sex, site, image_type) in enumerate(
        zip(*(cells(role) for role in ("lesion", "patient", "age", "sex", "site", "image_type")), strict=True)
    ):
        label, code = diagnoses[index] if diagnoses else ("", "")
        lesion = vocabulary.text_or_blank(lesion)
        if len(images) > 1 and not lesion:  # two pictures in one row show one lesion
            lesion = Path(next(names[index] for names in images.values())).stem
        for kind, names in images.items():
            yield Row(
                names[index],
                label,
                code,
                lesion,
                vocabulary.text_or_blank(patient),
                vocabulary.age(age),
                vocabulary.sex(sex),
                vocabulary.site(site),
                kind or _image_type(image_type),
            )


def _image_type(text: str) -> str:
    """Return DERMOSCOPY for its spellings, else the type as written; "" for a blank."""
    text = vocabulary.text_or_blank(text)
    return DERMOSCOPY if text.casefold().startswith("dermoscop") else text


def _header(path: Path) -> tuple[list[str], str, str]:
    """Return column names, separator and the first line. Only that line is read: tables of pixels have gigabytes."""
    with path.open(encoding=_ENCODING, errors="replace", newline="") as file:
        line = file.readline(1 << 20)
    separator = max(",;\t", key=line.count)
    return next(csv.reader([line], delimiter=separator), []), separator, line


def _one_hot(frame: pd.DataFrame, classes: dict[str, str], otherwise: str) -> "pd.Series[str]":
    """Return "column:code" of each row; NaN for a row that is not one 1 and otherwise 0s."""
    values = frame[list(classes)].apply(pd.to_numeric, errors="coerce")
    plain = values.isin([0, 1]).all(axis=1)
    names = {header: f"{header}:{code}" for header, code in classes.items()}
    chosen = values.fillna(0.0).idxmax(axis=1).map(names).where(plain & (values.sum(axis=1) == 1))
    return chosen.where(~(plain & (values.sum(axis=1) == 0)), f"{otherwise}:{otherwise}") if otherwise else chosen
