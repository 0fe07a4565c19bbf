"""The data sets that are recognised, as data_sets.yaml describes them."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict

from training.data import vocabulary

DESCRIPTIONS = Path(__file__).with_name("data_sets.yaml")
FOLDER = "folder"  # the source of images that only a class folder describes
CORRECTIONS = "corrections"  # the source of pictures whose class readers or pathology have settled
ROLES = ("image", "label", "lesion", "patient", "age", "sex", "site", "image_type")
MIN_CLASS_COLUMNS = 3


class DataSet(BaseModel):
    """The description of one data set's tables. data_sets.yaml explains every field."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    title: str
    needs: frozenset[str] = frozenset()
    lacks: frozenset[str] = frozenset()
    or_lesions: str = ""
    needs_label: bool = False
    columns: dict[str, tuple[str, ...]]
    images: dict[str, str] = {}
    one_hot: bool | dict[str, str] = False
    otherwise: str = ""
    labels: dict[str, str] = {}
    qualified: bool = False
    photographs: str = ""
    test: frozenset[str] = frozenset()
    header: tuple[str, ...] = ()
    first_row: str = ""
    sources: dict[str, str] = {}
    several_labels: bool = False

    def class_columns(self, columns: Mapping[str, str]) -> dict[str, str]:
        """Return the one-hot columns of a table (normalised name -> header), as header -> class code."""
        if isinstance(self.one_hot, dict):
            return {columns[name]: code for name, code in self.one_hot.items() if name in columns}
        if not self.one_hot:
            return {}
        roles = {name for role in ("image", "lesion") if (name := self.column(role, columns))}
        return {
            header: code
            for header in columns.values()
            if header not in roles and (code := vocabulary.class_code(header))
        }

    def column(self, role: str, columns: Mapping[str, str]) -> str | None:
        """Return the header of the column with this role, or None."""
        return next((columns[name] for name in self.columns[role] if name in columns), None)

    def label_columns(self, columns: Mapping[str, str]) -> list[str]:
        """Return the headers of the diagnosis: all levels, the deepest first, or the best spelling alone."""
        headers = [columns[name] for name in self.columns["label"] if name in columns]
        return headers if self.several_labels else headers[:1]

    def fits(self, columns: Mapping[str, str]) -> bool:
        """Tell whether a table with these columns (normalised name -> header) is of this data set, by columns alone."""
        if self.header or not columns.keys() >= self.needs or columns.keys() & self.lacks:
            return False
        has_key = bool(self.images) or self.column("image", columns) or self.column("lesion", columns)
        if not has_key:
            return False
        if self.one_hot is True:
            return len(self.class_columns(columns)) >= MIN_CLASS_COLUMNS
        if self.one_hot:
            return True
        if self.needs_label or self.needs:
            return bool(self.label_columns(columns))
        said = [role for role in ROLES if role not in ("image", "label", "image_type") and self.column(role, columns)]
        return bool(self.column("image", columns) and said)

    def class_code(self, text: str) -> str | None:
        """Return the code of a diagnosis in this data set's words; "" for none of the classes, None if unknown."""
        words = text.strip().casefold()
        if words in self.labels:
            return self.labels[words]
        code = vocabulary.class_code(text)
        if code is None and self.qualified:
            code = vocabulary.class_code(re.split(r"[,(]", text, maxsplit=1)[0])
        return code


@cache
def data_sets() -> dict[str, DataSet]:
    """Return all descriptions by name. The first that fits a table reads it; the upper of two is believed."""
    document = yaml.safe_load(DESCRIPTIONS.read_text(encoding="utf-8"))
    sets = {}
    for name, entry in document["data_sets"].items():
        own = entry.get("columns", {})
        columns = {"columns": document["columns"] | own, "several_labels": "label" in own}
        labels = {text.casefold(): code for text, code in entry.get("labels", {}).items()}
        sets[name] = DataSet(**entry | columns | {"name": name, "labels": labels})
    return sets


def authorities() -> tuple[str, ...]:
    """Return whose diagnosis counts, best first: the data sets in the order of their descriptions, then folders."""
    return (*data_sets(), FOLDER)


@cache
def source_names() -> tuple[str, ...]:
    """Return all names that the manifest's `source` may have."""
    collections = (name for data_set in data_sets().values() for name in data_set.sources.values())
    return tuple(dict.fromkeys([*authorities(), *collections, CORRECTIONS]))
