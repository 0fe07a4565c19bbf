"""Colour profiles, and samples of 16 bits in every way of storing them."""

import struct

import cv2
import numpy as np
from PIL import Image, ImageCms

from tests.hostile.images import encode

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
# Primaries (adapted to D50) and gamma, from the specifications of the two spaces.
WIDE = {
    "Adobe RGB": ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457), 2.19921875),
    "Display P3": ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407), 2.2),
}


def profile(
    space: bytes = b"RGB ", primaries: tuple = WIDE["Adobe RGB"][:3], gamma: float = 2.2, kind: bytes = b"mntr"
) -> bytes:
    """A minimal ICC profile: three primaries and one gamma, or one gamma for grey."""

    def number(value: float) -> bytes:
        return struct.pack(">i", round(value * 65536))

    def xyz(values: tuple) -> bytes:
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = [(b"wtpt", xyz((0.9642, 1, 0.8249)))]
    if space == b"GRAY":
        tags += [(b"kTRC", curve)]
    else:
        tags += [(name + b"XYZ", xyz(values)) for name, values in zip((b"r", b"g", b"b"), primaries, strict=True)]
        tags += [(name + b"TRC", curve) for name in (b"r", b"g", b"b")]
    offset, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags:
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    head = struct.pack(">I4sI4s4s4s", 128 + len(table) + len(body), b"none", 0x02200000, kind, space, b"XYZ ")
    head += b"\x07\xe0\0\x01\0\x01\0\0\0\0\0\0acsp" + b"\0" * 28 + number(0.9642) + number(1) + number(0.8249)
    return head.ljust(128, b"\0") + table + body


def planes_apart(values: np.ndarray, order: str) -> bytes:
    """An uncompressed 16-bit TIFF whose red, green and blue lie one behind the other."""
    height, width, bands = values.shape
    size = 2 * width * height
    body = np.moveaxis(values, 2, 0).astype(f"{order}u2").tobytes()
    lists = struct.pack(f"{order}3H3I3I", *[16] * 3, *(8 + size * band for band in range(3)), *[size] * 3)
    at = 8 + len(body)
    fields = {256: width, 257: height, 258: (3, at), 259: 1, 262: 2, 273: (4, at + 6), 277: bands, 278: height,
              279: (4, at + 18), 284: 2}  # fmt: skip
    entries = b""
    for tag, value in fields.items():
        kind, count, number = (value[0], 3, value[1]) if isinstance(value, tuple) else (4, 1, value)
        entries += struct.pack(f"{order}HHII", tag, kind, count, number)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", at + len(lists))
    return head + body + lists + struct.pack(f"{order}H", len(fields)) + entries + bytes(4)


STORED = {
    "PNG": lambda values: cv2.imencode(".png", values[:, :, ::-1])[1].tobytes(),
    "PNG with alpha": lambda values: cv2.imencode(
        ".png", np.dstack([values[:, :, ::-1], np.full(values.shape[:2], 65535, np.uint16)])
    )[1].tobytes(),
    "TIFF": lambda values: cv2.imencode(".tiff", values[:, :, ::-1])[1].tobytes(),
    "planar TIFF": lambda values: planes_apart(values, "<"),
    "big-endian planar TIFF": lambda values: planes_apart(values, ">"),
    "grey PNG": lambda values: encode(Image.fromarray(np.ascontiguousarray(values[:, :, 0])), "PNG"),
    "grey TIFF": lambda values: encode(Image.fromarray(np.ascontiguousarray(values[:, :, 0])), "TIFF"),
}
