"""The data sets that are recognised, as data_sets.yaml describes them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from training.data import vocabulary

DESCRIPTIONS = Path(__file__).with_name("data_sets.yaml")
FOLDER = "folder"  # the source of images that only a class folder describes
ROLES = ("image", "label", "lesion", "patient", "age", "sex", "site", "image_type")
MIN_CLASS_COLUMNS = 3


@dataclass(frozen=True)
class DataSet:
    """The description of one data set's tables. data_sets.yaml explains every field."""

    name: str
    title: str
    needs: frozenset[str]
    lacks: frozenset[str]
    or_lesions: str
    needs_label: bool
    columns: Mapping[str, tuple[str, ...]]
    images: Mapping[str, str]
    one_hot: bool | Mapping[str, str]
    otherwise: str
    labels: Mapping[str, str]
    qualified: bool
    photographs: str
    test: frozenset[str]
    header: tuple[str, ...]
    first_row: str
    sources: Mapping[str, str]
    several_labels: bool = field(default=False)

    def class_columns(self, columns: Mapping[str, str]) -> dict[str, str]:
        """Return the one-hot columns of a table (normalised name -> header), as header -> class code."""
        if isinstance(self.one_hot, Mapping):
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
    return {name: _data_set(name, entry, document["columns"]) for name, entry in document["data_sets"].items()}


def authorities() -> tuple[str, ...]:
    """Return whose diagnosis counts, best first: the data sets in the order of their descriptions, then folders."""
    return (*data_sets(), FOLDER)


@cache
def source_names() -> tuple[str, ...]:
    """Return all names that the manifest's `source` may have."""
    collections = (name for data_set in data_sets().values() for name in data_set.sources.values())
    return tuple(dict.fromkeys([*authorities(), *collections]))


def _data_set(name: str, entry: dict[str, Any], shared: dict[str, list[str]]) -> DataSet:
    own = entry.get("columns", {})
    one_hot = entry.get("one_hot", False)
    return DataSet(
        name=name,
        title=entry["title"],
        needs=frozenset(entry.get("needs", ())),
        lacks=frozenset(entry.get("lacks", ())),
        or_lesions=entry.get("or_lesions", ""),
        needs_label=entry.get("needs_label", False),
        columns={role: tuple(own.get(role, shared[role])) for role in ROLES},
        images=entry.get("images", {}),
        one_hot=one_hot,
        otherwise=entry.get("otherwise", ""),
        labels={text.casefold(): code for text, code in entry.get("labels", {}).items()},
        qualified=entry.get("qualified", False),
        photographs=entry.get("photographs", ""),
        test=frozenset(entry.get("test", ())),
        header=tuple(entry.get("header", ())),
        first_row=entry.get("first_row", ""),
        sources=entry.get("sources", {}),
        several_labels="label" in own,
    )
