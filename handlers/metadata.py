"""What a model may be told beside the picture: the patient's age and sex, and where on the body the lesion is.

The one way from values to the network's input, for training and serving alike. Any value may be missing: then its part
of the input is zeros, to which the network adds nothing (handlers.backbone.MetadataHead), so a picture of which nothing
is known gets the answer of the picture alone. Imports no torch.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from handlers.errors import UserError

FIELDS = ("age", "sex", "site")
OLDEST = 120  # years
MISSING = ("", "unknown")  # what a form may say instead of nothing
# Centre and scale of ISIC 2019's ages, and its words; a bundle keeps those that it was trained with.
AGE = (50.0, 20.0)
SEXES = ("female", "male")
SITES = (
    "anterior torso", "head/neck", "lateral torso", "lower extremity", "oral/genital", "palms/soles",
    "posterior torso", "upper extremity",
)  # fmt: skip

Values = Mapping[str, float | str | None]


class MetadataError(UserError):
    """A value that a model cannot be told, with a sentence saying what it may be."""


@dataclass(frozen=True)
class Metadata:
    """Which values a model takes; the default takes none.

    Each entry belongs to the field of its name and is empty if the model does not take it: `age` is the (centre, scale)
    in years by which ages are standardised, `sex` and `site` are the words that are known.
    """

    age: tuple[float, ...] = ()
    sex: tuple[str, ...] = ()
    site: tuple[str, ...] = ()

    @classmethod
    def of(cls, fields: Iterable[str]) -> "Metadata":
        """A model that takes these fields, with ISIC 2019's words."""
        known: dict[str, Any] = {"age": AGE, "sex": SEXES, "site": SITES}
        return cls(**{name: known[name] for name in fields})

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of what it takes, in the order of FIELDS."""
        return tuple(name for name in FIELDS if getattr(self, name))

    @property
    def columns(self) -> tuple[int, ...]:
        """For each of the D inputs the index of its field in `fields`."""
        widths = [2 if name == "age" else len(getattr(self, name)) for name in self.fields]
        return tuple(index for index, width in enumerate(widths) for _ in range(width))

    @property
    def choices(self) -> dict[str, list[Any]]:
        """What each field may be, for people and forms: the youngest and oldest age in years, or all the words."""
        return {name: [0, OLDEST] if name == "age" else list(getattr(self, name)) for name in self.fields}

    def parse(self, given: Mapping[str, Any]) -> dict[str, float | str | None]:
        """Values from anybody, checked: one for each field, years or a known word, None where it is missing.

        None, NaN, "" and "unknown" are missing.

        Raises:
            MetadataError: a field that the model does not take, or a value that it cannot be.
        """
        for name in given:
            if name not in self.fields:
                raise MetadataError(f"This model takes no {str(name)[:40]}; leave it out.")
        return {name: self._value(name, given.get(name)) for name in self.fields}

    def understood(self, given: Mapping[Any, Any]) -> dict[str, float | str | None]:
        """Those of a table's values that the model takes and knows, the others None: other people's tables have other
        words."""
        values: dict[str, float | str | None] = {}
        for name in self.fields:
            try:
                values[name] = self._value(name, given.get(name))
            except MetadataError:
                values[name] = None
        return values

    def encode(self, values: Values) -> np.ndarray:
        """Checked values to the network's input, float32 (D,).

        Age gives two numbers, 1 and the standardised years; sex and site a 1 in the place of the word. Missing values
        give zeros.
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

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as kept in bundle.json."""
        return {name: list(values) for name, values in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Metadata":
        """The inverse of to_dict."""
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
            raise MetadataError(f"age must be years from 0 to {OLDEST}, or unknown, not {str(value)[:40]!r}.")
        if text in getattr(self, name):
            return text
        words = ", ".join(getattr(self, name))
        raise MetadataError(f"{name} must be one of {words}, or unknown, not {str(value)[:40]!r}.")
