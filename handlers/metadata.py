"""Metadata: the patient's age and sex, and the site of the lesion, as inputs besides the picture.

Training and serving encode them here. Any value may be missing. Its part of the input is then zeros, which add nothing
to the logits (handlers.backbone.MetadataHead), so without metadata the answer is that of the picture alone.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from handlers.errors import UserError

FIELDS = ("age", "sex", "site")
OLDEST = 120  # years
MISSING = ("", "unknown")
# Centre and scale of ISIC 2019's ages, and its words. A bundle keeps those of its training.
AGE = (50.0, 20.0)
SEXES = ("female", "male")
SITES = (
    "anterior torso", "head/neck", "lateral torso", "lower extremity", "oral/genital", "palms/soles",
    "posterior torso", "upper extremity",
)  # fmt: skip

Values = Mapping[str, float | str | None]


class MetadataError(UserError):
    """A metadata field or value that a model does not take."""


@dataclass(frozen=True)
class Metadata:
    """The fields and values that a model takes; by default none.

    `age` is the (centre, scale) in years by which ages are standardised; `sex` and `site` are the known words. The
    entry of a field that the model does not take is empty.
    """

    age: tuple[float, ...] = ()
    sex: tuple[str, ...] = ()
    site: tuple[str, ...] = ()

    @classmethod
    def of(cls, fields: Iterable[str]) -> "Metadata":
        """Return the metadata with these fields and ISIC 2019's words."""
        values: dict[str, Any] = {"age": AGE, "sex": SEXES, "site": SITES}
        return cls(**{name: values[name] for name in fields})

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields, in the order of FIELDS."""
        return tuple(name for name in FIELDS if getattr(self, name))

    @property
    def columns(self) -> tuple[int, ...]:
        """The index in `fields` for each of the D inputs."""
        widths = [2 if name == "age" else len(getattr(self, name)) for name in self.fields]
        return tuple(index for index, width in enumerate(widths) for _ in range(width))

    @property
    def choices(self) -> dict[str, list[Any]]:
        """The choices of each field, for forms: the youngest and oldest age in years, or the known words."""
        return {name: [0, OLDEST] if name == "age" else list(getattr(self, name)) for name in self.fields}

    def parse(self, values: Mapping[str, Any]) -> dict[str, float | str | None]:
        """Check untrusted values and return one for each field: years, a known word, or None if it is missing.

        None, NaN, "" and "unknown" are missing.

        Raises:
            MetadataError: a field that the model does not take, or a wrong value.
        """
        for name in values:
            if name not in self.fields:
                raise MetadataError(f"This model takes no {str(name)[:40]}. Leave it out.")
        return {name: self._value(name, values.get(name)) for name in self.fields}

    def understood(self, row: Mapping[Any, Any]) -> dict[str, float | str | None]:
        """Return a table row's values, with None for words that the model does not know."""
        values: dict[str, float | str | None] = {}
        for name in self.fields:
            try:
                values[name] = self._value(name, row.get(name))
            except MetadataError:
                values[name] = None
        return values

    def encode(self, values: Values) -> np.ndarray:
        """Encode checked values as the network's input, float32 (D,).

        Age gives two numbers, 1 and the standardised years; sex and site give a 1 in the place of the word. Missing
        values give zeros.
        """
        parts: list[list[float]] = []
        for name in self.fields:
            value = values.get(name)
            if name == "age":
                centre, scale = self.age
                parts.append([0.0, 0.0] if value is None else [1.0, (float(value) - centre) / scale])
            else:
                parts.append([float(word == value) for word in getattr(self, name)])
        return np.array([number for part in parts for number in part], np.float32)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Metadata":
        """Return the metadata in bundle.json, which has the dataclass's fields."""
        return cls(**{name: tuple(entries) for name, entries in values.items()})

    def _value(self, name: str, value: Any) -> float | str | None:
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return None
        text = str(value).strip().lower()
        if text in MISSING:
            return None
        if name == "age":
            # Stricter than float(), which also reads 1_0, 1e1 and infinity.
            if re.fullmatch(r"[0-9]{1,3}(\.[0-9]*)?", text) and float(text) <= OLDEST:
                return float(text)
            raise MetadataError(f"age is {str(value)[:40]!r}: it must be years from 0 to {OLDEST}, or unknown.")
        if text in getattr(self, name):
            return text
        words = ", ".join(getattr(self, name))
        raise MetadataError(f"{name} is {str(value)[:40]!r}: it must be one of {words}, or unknown.")
