"""A prediction: the answer to one request, and its JSON in the REST contract."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from handlers.decoding import DecodedImage
from handlers.suspicion import MALIGNANT, MELANOMA, Suspicion
from handlers.taxonomy import BY_CODE, TAXONOMY

DISCLAIMER = "Research use only. Not a medical device."


@dataclass(frozen=True)
class Prediction:
    """The answer to one request. `probabilities` has nine entries summing to 1; `grid` holds rows of values in [0, 1].

    `target` is the code of the map's class. `metadata` are the values that were used, None for missing ones; it is
    empty for a model without metadata. `statistics` are for the log: those of handlers/picture_statistics.py, and how
    familiar the picture is to the model.
    """

    probabilities: dict[str, float]
    grid: list[list[float]] | None
    target: str | None
    overlay_png: bytes | None
    picture_jpeg: bytes | None
    entropy: float
    malignant: Suspicion | None
    melanoma: Suspicion | None
    conformal_set: list[str] | None
    confidence_level: float | None
    image: DecodedImage
    statistics: dict[str, float]
    model: dict[str, Any]
    metadata: Mapping[str, float | str | None]

    @property
    def code(self) -> str:
        """The most probable of the nine classes."""
        return max(self.probabilities, key=self.probabilities.__getitem__)

    @property
    def suspicion(self) -> dict[str, Any] | None:
        """The JSON of both alarms; None for a model without."""
        if self.malignant is None:
            return None
        melanoma = None
        if self.melanoma is not None:
            melanoma = {MELANOMA: self.melanoma.share, **self.melanoma.to_dict()}
        return {MALIGNANT: self.malignant.share, **self.malignant.to_dict(), MELANOMA: melanoma}

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON of the REST answer (schema 1)."""
        top = BY_CODE[self.code]
        return {
            "schema": 1,
            "model": self.model,
            "prediction": {
                "code": top.code,
                "name": top.name,
                "probability": self.probabilities[top.code],
                "malignant": top.malignant,
            },
            "probabilities": self.probabilities,
            "classes": {
                c.code: {"name": c.name, "malignant": c.malignant, "description": c.description} for c in TAXONOMY
            },
            "suspicion": self.suspicion,
            "uncertainty": {
                "entropy": self.entropy,
                "conformal_set": self.conformal_set,
                "confidence_level": self.confidence_level,
            },
            "gradcam": None
            if self.grid is None
            else {
                "target": self.target,
                "grid": self.grid,
                "overlay_png": base64.b64encode(self.overlay_png).decode() if self.overlay_png else None,
            },
            "image": {
                "width": self.image.width,
                "height": self.image.height,
                "sha256": self.image.sha256,
                "converted": list(self.image.converted),
                **({"picture_jpeg": base64.b64encode(self.picture_jpeg).decode()} if self.picture_jpeg else {}),
            },
            **({"metadata": dict(self.metadata)} if self.metadata else {}),
            "disclaimer": DISCLAIMER,
        }
