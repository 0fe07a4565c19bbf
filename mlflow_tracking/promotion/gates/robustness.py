"""The gate of robustness: stability under small changes of a picture."""

import io
from collections.abc import Callable
from typing import ClassVar

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
from pydantic import Field

from handlers.decoding import SHRINK_SIDE, decode
from mlflow_tracking.promotion.answers import ask, metadata_of
from mlflow_tracking.promotion.evaluation_set import EvaluationSet
from mlflow_tracking.promotion.gates.base import Candidate, SetGate, Verdict


def _compressed(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=50)
    return Image.open(buffer)


# Changes that another camera or hand makes to a picture of the same lesion. None of them changes the diagnosis.
CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "mirrored": ImageOps.mirror,
    "turned by a quarter": lambda image: image.transpose(Image.Transpose.ROTATE_90),
    "darker by 15 %": lambda image: ImageEnhance.Brightness(image).enhance(0.85),
    "compressed": _compressed,
}


class StressGate(SetGate):
    """Small changes of a picture seldom flip the answer between malignant and benign."""

    name: ClassVar[str] = "stress"

    ceiling: float = Field(0.15, ge=0, le=1)
    images: int = Field(48, ge=1)

    def judge(self, candidate: Candidate, evaluation: EvaluationSet) -> Verdict:
        """Compare the mean share of flipped answers with the ceiling."""
        number = min(self.images, len(evaluation))  # the set is in random order
        # Decoded small: changed pictures are sent as PNG, whose files are several times as large.
        originals = [decode(image, SHRINK_SIDE).image for image in evaluation.images(range(number))]
        before = candidate.answers.malignant[:number]
        torchserve, release = candidate.torchserve, candidate.release
        metadata = metadata_of(torchserve, release, evaluation)[:number]
        flips = {}
        for change, apply in CHANGES.items():
            candidate.progress(f"version {release.version} answers pictures that are {change}")
            changed = [_png(apply(image)) for image in originals]
            after = ask(torchserve, release, changed, lambda done: candidate.progress(""), metadata=metadata)
            flips[change] = float((before != after.malignant).mean())
        share = float(np.mean(list(flips.values())))
        worst = max(flips, key=flips.__getitem__)
        reason = (
            f"{share:.3f} of the answers flip between malignant and benign; the ceiling is {self.ceiling:g}. "
            f"The worst change is '{worst}' with {flips[worst]:.3f}."
        )
        return self.verdict(share <= self.ceiling, reason, share=share, ceiling=self.ceiling, images=number, **flips)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
