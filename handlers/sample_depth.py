"""Samples of 16 bits: the range of values that they use, and their scaling to 8 bits.

Cameras and microscopes store 10, 12 or 14 bits in 16. Taken for 16 bits, such a picture is nearly black.
"""

import io
import sys
from typing import Any

import numpy as np
from PIL import Image

from handlers.errors import InvalidImage

_DEPTHS = (10, 12, 14, 16)
_LEAST = 255  # of a picture whose brightest value is no larger, the range cannot be decided
_MAXIMUM_TAGS = (341, 281)  # of a TIFF: SMaxSampleValue, MaxSampleValue
# Pillow's unpackers of 16-bit colours keep one byte of each sample; the other byte order gives the low bytes.
_LOW_BYTES = {"L": "B", "B": "L", "N": "B" if sys.byteorder == "little" else "L"}


def sample_bits(highest: int, declared: int = 0) -> int:
    """Return the bits of samples whose largest value is `highest`; `declared` by the file, 0 for unknown.

    Raises InvalidImage if the values decide nothing.
    """
    if declared and highest < 1 << declared:
        return declared
    if highest <= _LEAST:
        raise InvalidImage(
            f"The image has 16 bits per channel, but its largest value is {highest}, so its brightness is undefined. "
            "Save it with 8 bits per channel."
        )
    if highest > 65535:
        raise InvalidImage("The image has values above 65,535. Save it with 8 or 16 bits per channel.")
    return next(bits for bits in _DEPTHS if highest < 1 << bits)


def declared_bits(image: Any, png_bits: int = 0) -> int:
    """Return the bits that a file declares: a TIFF's BitsPerSample or largest value, a PNG's sBIT; 0 for none or 16."""
    tags = getattr(image, "tag_v2", {})
    stored = tags.get(258, (16,))
    numbers = [max(stored) if isinstance(stored, tuple) else stored, png_bits]
    for tag in _MAXIMUM_TAGS:
        value = tags.get(tag, 0)
        largest = max(value, default=0) if isinstance(value, tuple) else value
        numbers.append(largest.bit_length() if isinstance(largest, int) and largest > _LEAST else 0)
    return min((bits for bits in numbers if isinstance(bits, int) and 8 < bits < 16), default=0)


def note(bits: int) -> str:
    """Say in plain words what was scaled."""
    return f"{bits}-bit values scaled to 8 bits"


def grey_levels(values: np.ndarray, bits: int) -> np.ndarray:
    """Scale whole numbers of `bits` bits to uint8."""
    largest = (1 << bits) - 1
    clipped = np.clip(values, 0, largest)
    return (clipped // 257 if bits == 16 else (clipped * 255 + largest // 2) // largest).astype(np.uint8)


def is_deep_colour(image: Any) -> bool:
    """Return whether a file that is open, but not yet decoded, has colours of 16 bits per channel."""
    return image.mode in ("RGB", "RGBA", "LA") and any(";16" in _raw_mode(tile) for tile in image.tile)


def prepare_planes(image: Any) -> None:
    """Correct Pillow's tiles of an uncompressed TIFF with separate planes of 16 bits, which it reads as 8 bits."""
    tags: Any = getattr(image, "tag_v2", {})
    bits = tags.get(258, ())
    if tags.get(284) == 2 and set(bits) == {16} and any(tile[0] == "raw" for tile in image.tile):
        order = "L" if tags.prefix == b"II" else "B"
        image.tile = [tile._replace(args=(f"{tile.args[0]};16{order}", *tile.args[1:])) for tile in image.tile]


def scale_deep_colour(image: Image.Image, data: bytes, declared: int) -> tuple[Image.Image, int]:
    """Return the decoded colours with their full range, and their bits.

    Args:
        image: as decoded by Pillow, which keeps the high byte of each sample.
        data: the file, which is decoded once more if the range is below 16 bits.
        declared: bits that the file declares, 0 for unknown.

    Raises:
        InvalidImage: the values decide nothing.
    """
    bands = image.split()
    colours = list(bands[: -1 if image.mode in ("RGBA", "LA") else None])
    highest = max(int(band.getextrema()[1]) for band in colours)  # type: ignore[arg-type]
    if highest >= 1 << 6:
        return image, 16
    low = _low_bytes(data, image.format or "").split()
    values = [
        np.asarray(high).astype(np.uint16) << 8 | np.asarray(rest) for high, rest in zip(colours, low, strict=False)
    ]
    bits = sample_bits(max(int(value.max()) for value in values), declared)
    levels = grey_levels(np.arange(1 << bits, dtype=np.int64), bits)
    scaled = [Image.fromarray(levels[value]) for value in values]
    if len(bands) > len(colours):
        alpha = bands[-1]
        scaled.append(alpha if alpha.getextrema()[1] >= 1 << 6 else Image.new("L", image.size, 255))  # type: ignore[operator]
    return Image.merge(image.mode, scaled), bits


def _low_bytes(data: bytes, format_: str) -> Image.Image:
    """Decode the low byte of each sample."""
    with Image.open(io.BytesIO(data), formats=(format_,)) as opened:
        image: Any = opened
        prepare_planes(image)
        if image.mode == "LA" or (image.tile[0][0] == "libtiff" and image.tag_v2.get(284) == 2):
            raise InvalidImage("The 16-bit values of this image are too dark to be read. Save it as a 16-bit RGB PNG.")
        if format_ == "TIFF":
            image.is_animated = True  # as for the high bytes: Exif is not unpacked
        image.info.pop("xmp", None)
        image.tile = [tile._replace(args=_swapped(tile)) for tile in image.tile]
        image.load()
        return image


def _raw_mode(tile: Any) -> str:
    return tile.args if isinstance(tile.args, str) else str(tile.args[0])


def _swapped(tile: Any) -> Any:
    raw = _raw_mode(tile)
    swapped = raw[:-1] + _LOW_BYTES[raw[-1]]
    return swapped if isinstance(tile.args, str) else (swapped, *tile.args[1:])
