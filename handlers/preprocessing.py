"""Preprocessing: a decoded picture to the network's uint8 input, the same in training, evaluation and serving."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from handlers.decoding import DecodedImage, decode
from handlers.errors import ImageError

# Grey levels of 255. Photographs of plain skin have a spread of several levels.
LEAST_SPREAD = 1.0
DARKEST, BRIGHTEST = 12, 250  # a picture that is darker or brighter everywhere shows nothing


@dataclass(frozen=True)
class Preprocessing:
    """The way from an upright RGB picture to a network's input; part of the bundle.

    The whole picture is resized to a square of `image_size` pixels. It is not cropped, so the Grad-CAM grid covers
    exactly the picture that was sent. `mean` and `std` are per channel for values in [0, 1]; the defaults are
    ImageNet's, which timm's pretrained backbones expect.
    """

    image_size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"

    def resize(self, image: Image.Image) -> np.ndarray:
        """Resize an RGB picture with antialiasing to uint8 (image_size, image_size, 3)."""
        filter_ = Image.Resampling[self.interpolation.upper()]
        # reducing_gap shrinks by whole boxes first, down to three times the target. It looks the same but is faster.
        return np.asarray(image.resize((self.image_size, self.image_size), filter_, reducing_gap=3.0))

    @property
    def standardisation(self) -> tuple[list[float], list[float]]:
        """Scale and offset per channel: for a uint8 x, x * scale + offset is (x / 255 - mean) / std.

        The serving graph and the training device apply it to batches.
        """
        scale = [1 / (255 * std) for std in self.std]
        return scale, [-mean / std for mean, std in zip(self.mean, self.std, strict=True)]

    def __call__(self, data: bytes) -> tuple[np.ndarray, DecodedImage]:
        """Decode and resize. Returns uint8 (S, S, 3) and the decoded picture. Raises ImageError."""
        decoded = decode(data, self.image_size)
        pixels = self.resize(decoded.image)
        _check_content(pixels, decoded.image)
        return pixels, decoded

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """Return the preprocessing in bundle.json, which has the dataclass's fields."""
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def _check_content(pixels: np.ndarray, image: Image.Image) -> None:
    """Refuse a black, white or single-coloured picture with an ImageError.

    A few of the resized pixels decide for nearly all pictures. Resizing averages noise away, so the picture itself
    decides for the rest.
    """
    for sample in (pixels[::8, ::8], pixels):
        low, high = sample.min((0, 1)), sample.max((0, 1))
        shows_something = high.max() > DARKEST and low.min() < BRIGHTEST
        if shows_something and (high - low).max() > 12 * LEAST_SPREAD:
            return
    if shows_something and np.asarray(image).std((0, 1)).max() >= LEAST_SPREAD:
        return
    raise ImageError(
        400, "no_content", "The picture is black, white or of a single colour. Send a photograph of the lesion."
    )


def fingerprint(pixels: np.ndarray, cells: int = 4) -> np.ndarray:
    """Return the mean colour of each cell of a grid over pixels uint8 (S, S, 3), as float (cells, cells, 3) in 0..255.

    Training keeps it for the golden pictures, and promotion compares. Another interpolation, channel order or crop
    changes it; another version of a decoder hardly does.
    """
    edges = np.linspace(0, len(pixels), cells + 1).astype(int)
    sums = np.add.reduceat(np.add.reduceat(pixels.astype(float), edges[:-1], 0), edges[:-1], 1)
    return np.asarray(sums / np.outer(np.diff(edges), np.diff(edges))[:, :, None])
