"""Pictures in an answer: the decoded picture as a JPEG, and the Grad-CAM heatmap drawn over it as a PNG."""

import functools
import struct

import cv2
import numpy as np
from isal import isal_zlib
from PIL import Image

SHOWN_SIDE = 640  # pixels, the longer side: enough for a page, and quick to encode
SHOWN_MIN_SIDE = SHOWN_SIDE * 3 // 4  # the shorter side to decode for it: cameras' 4:3
JPEG_QUALITY = 90
EVEN = 0xFE  # without the lowest bit, which is noise and takes a quarter of a PNG's bytes
OPACITY = 0.6  # where the map is 1; where it is 0 the skin stays as it is

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
EIGHT_BIT_RGB = (8, 2, 0, 0, 0)  # bits, colour type, compression, filter method, no interlacing
UP = 2  # the filter of a row: the difference from the row above


def overlay(image: Image.Image, grid: np.ndarray) -> bytes:
    """Draw a grid (h, w) in [0, 1] over an RGB picture. Returns a PNG of at most SHOWN_SIDE pixels a side.

    The heat has 256 levels, so that two look-ups and 8-bit arithmetic draw it.
    """
    pixels = _small(image)
    cells = np.round(255 * np.asarray(grid)).astype(np.uint8)
    levels = cv2.resize(cells, pixels.shape[1::-1], interpolation=cv2.INTER_CUBIC)
    skin, colour = (cv2.applyColorMap(levels, table) for table in _tables())
    drawn = cv2.add(cv2.multiply(pixels, skin, scale=1 / 255), colour)
    return _png(np.bitwise_and(drawn, EVEN, dtype=np.uint8))


def picture_jpeg(image: Image.Image) -> bytes:
    """Encode an RGB picture, without any metadata. Returns a JPEG of at most SHOWN_SIDE pixels a side."""
    pixels = cv2.cvtColor(_small(image), cv2.COLOR_RGB2BGR)
    return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def _small(image: Image.Image) -> np.ndarray:
    """Return a copy of at most SHOWN_SIDE pixels a side, uint8 (h, w, 3)."""
    picture = image.copy()
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return np.asarray(picture)


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Return uint8 (256, 1, 3) by level of heat: the share of the skin, in 255ths, and what the colour adds in RGB."""
    levels = np.arange(256, dtype=np.uint8)[:, None]
    opacity = OPACITY * levels[..., None] / 255
    colours = cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1]
    shares = np.broadcast_to(255 * (1 - opacity), colours.shape)
    return np.round(shares).astype(np.uint8), np.round(opacity * colours).astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    """Encode pixels uint8 (h, w, 3), RGB, in a quarter of the time of libpng (https://www.w3.org/TR/png-3/)."""
    rows = pixels.reshape(len(pixels), -1)
    filtered = np.empty((len(rows), 1 + rows.shape[1]), np.uint8)
    filtered[:, 0] = UP
    filtered[0, 1:] = rows[0]
    np.subtract(rows[1:], rows[:-1], out=filtered[1:, 1:])
    header = struct.pack(">II5B", pixels.shape[1], pixels.shape[0], *EIGHT_BIT_RGB)
    chunks = ((b"IHDR", header), (b"IDAT", isal_zlib.compress(filtered, 1)), (b"IEND", b""))
    return PNG_SIGNATURE + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", isal_zlib.crc32(kind + content))
