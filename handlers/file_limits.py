"""Limits on how an image file is built, told from its bytes before Pillow sees them.

A file within the limits of bytes and pixels may still cost a decoder minutes or gigabytes: by thousands of scans,
texts or tiles, by fields of millions of values, by parts that claim the same bytes again and again. What is refused
here no camera or program writes; docs/reliability.md has what it would cost.
"""

import re
import struct
from typing import Literal

import numpy as np

JPEG, PNG, TIFF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", (b"II*\x00", b"MM\x00*")

# Segments of a JPEG, chunks of a PNG, strips and tiles of a TIFF are read one by one, in Python; large files have a few
# thousand. So are bytes that belong to none of them.
MAX_PARTS = 100_000
# Each scan of a JPEG is a walk over the whole picture, and a scan may have 80 bytes. Encoders write 1 to 12.
MAX_SCANS = 30
# Exif comes in one segment of 64 KB, now and then in several. Pillow joins them one by one, copying all before.
MAX_EXIF_SEGMENTS = 20
MAX_TABLES = 4 << 20  # bytes of a JPEG's quantisation tables and Photoshop's blocks
MAX_TEXTS = 100  # of a PNG, packed: each may unpack to a megabyte
MAX_FIELDS = 1000  # of a TIFF's page
MAX_VALUES = 200_000  # in all of them; the largest table is a transfer function of three times 65,536
MAX_TILE_SIDE = 4096  # pixels, unless the picture is larger
# 48 megapixels is the largest common camera sensor.
MAX_PIXELS = 50_000_000
# So many pixels with transparency, in 8 bits; of more, nothing that a camera writes fits into 20 MiB.
MAX_UNPACKED = 200_000_000

# A marker that a length follows, or the end: no stuffed byte, padding, restart inside a scan, start or TEM.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
_SCAN, _END, _APP1 = 0xDA, 0xD9, 0xE1
_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), 0xDE)
_ARITHMETIC = (0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)  # slow, and written by nobody
_NO_LENGTH = (0xC8, _END, *range(0xF0, 0xFE))  # before a scan: Pillow takes none and would read on elsewhere than we do
_TABLES = (0xDB, 0xED)

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG by its colour type

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 258, 259, 277, 322, 323
_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES = 273, 279, 324, 325
_NUMBERS = (_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, 278, _TILE_WIDTH, _TILE_HEIGHT,
            _STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES)  # fmt: skip
_PLAIN_BYTES = (1, 2, 7)  # types that are not unpacked
_JPEG_IN_TIFF = 7


def excess(data: bytes) -> str:
    """What a JPEG, PNG or TIFF has more of than any camera or program writes, in words; "" where there is nothing."""
    if data.startswith(PNG):
        return _png(data)
    if data.startswith(JPEG):
        return _jpeg(data)
    return _tiff(data) if data.startswith(TIFF) else ""


def _png(data: bytes) -> str:
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26].ljust(10, b"\0"))
    if width * height <= MAX_PIXELS and width * height * depth * _CHANNELS.get(colour, 0) > 8 * MAX_UNPACKED:
        return f"{MAX_UNPACKED:,} bytes when it is unpacked"
    position, parts, profiles, texts = len(PNG), 0, 0, 0
    while position < len(data) and (name := data[position + 4 : position + 8]) != b"IEND":
        position += 12 + int.from_bytes(data[position : position + 4])  # length, name and checksum: 4 bytes each
        parts, profiles, texts = parts + 1, profiles + (name == b"iCCP"), texts + (name in (b"zTXt", b"iTXt"))
        if parts > MAX_PARTS:
            return f"{MAX_PARTS:,} chunks"
        if profiles > 1 or texts > MAX_TEXTS:
            return "one colour profile" if profiles > 1 else f"{MAX_TEXTS} packed texts"
    return ""


def _jpeg(data: bytes) -> str:
    position, between, parts, scans, frames, exif, tables = 2, 0, 0, 0, 0, 0, 0
    while found := _MARKER.search(data, position):
        marker = data[found.start() + 1]
        if not scans:
            between += found.start() - position
            if marker in _NO_LENGTH or between > MAX_PARTS:
                return "headers before its first scan"
        if marker == _END:
            return ""
        if marker in _ARITHMETIC:
            return "Huffman's codes (it is coded arithmetically)"
        position = found.end()
        length = int.from_bytes(data[position : position + 2])  # which counts itself
        parts, scans, frames = parts + 1, scans + (marker == _SCAN), frames + (marker in _FRAMES)
        exif += marker == _APP1 and data.startswith(b"Exif\0\0", position + 2)
        tables += length if marker in _TABLES else 0
        position += length
        for number, most, what in (
            (parts, MAX_PARTS, "segments"), (scans, MAX_SCANS, "scans"), (exif, MAX_EXIF_SEGMENTS, "segments of Exif"),
            (frames, 1, "frame"), (tables, MAX_TABLES, "bytes of tables"),
        ):  # fmt: skip
            if number > most:
                return f"{most:,} {what}"
    return "" if scans or len(data) - position <= MAX_PARTS else "headers before its first scan"


def _tiff(data: bytes) -> str:
    """Of the first page, the only one that is read."""
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    page = int.from_bytes(data[4:8], order)
    fields = int.from_bytes(data[page : page + 2], order)
    if fields > MAX_FIELDS:
        return f"{MAX_FIELDS:,} fields"
    numbers: dict[int, list[int]] = {}
    seen, values = set(), 0
    for entry in range(page + 2, min(page + 2 + 12 * fields, len(data)), 12):
        tag, kind, length = (
            int.from_bytes(data[entry + start : entry + end], order) for start, end in ((0, 2), (2, 4), (4, 8))
        )
        if tag in seen:  # Pillow takes the one, libtiff perhaps the other
            return "one field of a kind"
        seen.add(tag)
        if tag in (_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES):
            if length > MAX_PARTS:
                return f"{MAX_PARTS:,} strips or tiles"
        elif kind not in _PLAIN_BYTES:
            values += length
        if values > MAX_VALUES:
            return f"{MAX_VALUES:,} values in its fields"
        if tag in _NUMBERS:
            if kind not in (3, 4):
                return "whole numbers for its measures"
            size = 2 if kind == 3 else 4
            start = entry + 8 if length * size <= 4 else int.from_bytes(data[entry + 8 : entry + 12], order)
            there = min(length, max(0, len(data) - start) // size)
            kind_of = np.dtype(f"u{size}").newbyteorder("<" if order == "little" else ">")
            numbers[tag] = np.frombuffer(data, kind_of, there, start).tolist() if there else []
    return _excess_of_pixels(data, numbers)


def _excess_of_pixels(data: bytes, numbers: dict[int, list[int]]) -> str:
    """Of a TIFF's measures, strips and tiles."""

    def largest(tag: int, default: int = 0) -> int:
        return max(numbers.get(tag, ()), default=default)

    # Strips may name the same bytes, which are then unpacked as often.
    if any(sum(numbers.get(tag, ())) > len(data) for tag in (_STRIP_BYTES, _TILE_BYTES)):
        return "its own bytes in strips or tiles"
    if largest(_COMPRESSION) == _JPEG_IN_TIFF:
        for places, counts in ((_STRIPS, _STRIP_BYTES), (_TILES, _TILE_BYTES)):
            for place, count in zip(numbers.get(places, ()), numbers.get(counts, ()), strict=False):
                if found := _jpeg(data[place : place + count]):
                    return found
    width, height, tile_width, tile_height = map(largest, (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT))
    if tile_width > max(width, MAX_TILE_SIDE) or tile_height > max(height, MAX_TILE_SIDE):
        return f"{MAX_TILE_SIDE:,} pixels at the side of a tile"
    bits = numbers.get(_BITS) or [1]
    depth = sum(bits) if len(bits) > 1 else bits[0] * largest(_SAMPLES, 1)
    if width * height <= MAX_PIXELS and max(width * height, tile_width * tile_height) * depth > 8 * MAX_UNPACKED:
        return f"{MAX_UNPACKED:,} bytes when it is unpacked"
    return ""
