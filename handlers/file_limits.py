"""Limits on an image file: its bytes, pixels and structure, checked before Pillow reads it.

A file within the limits of bytes and pixels may still cost a decoder minutes or gigabytes, through thousands of scans,
texts or tiles, fields of millions of values, or strips that share the same bytes. No camera or common program writes
such files; docs/lab-notes.md has what they cost.
"""

import re
import struct
import zlib
from collections.abc import Iterator
from typing import Literal

import numpy as np

from handlers.errors import InvalidImage
from handlers.tiff_pages import MAX_FIELDS, pages_to_read

# Dermoscopes and phones write 1 to 15 MB. Files without compression may have 50 megapixels of three bytes.
MAX_BYTES, MAX_UNCOMPRESSED_BYTES = 32 << 20, 150 << 20
# Pillow reads segments of a JPEG, chunks of a PNG, strips and tiles of a TIFF, and stray bytes between them one by one
# in Python. Large files have a few thousand.
MAX_PARTS = 100_000
# Each scan of a JPEG is a walk over the whole picture, and a scan may have 80 bytes. Encoders write 1 to 12.
MAX_SCANS = 30
# Exif comes in one segment of 64 KB, rarely in several. Pillow copies all earlier ones with each.
MAX_EXIF_SEGMENTS = 20
MAX_TABLES = 4 << 20  # bytes of a JPEG's quantisation tables and Photoshop's blocks
MAX_PROFILE = 1 << 20  # bytes of a PNG's colour profile; Pillow refuses files with larger ones
MAX_VALUES = 200_000  # in all fields; the largest table is a transfer function of 3 x 65,536 values
MAX_TILE_SIDE = 4096  # pixels; a tile may also be as large as the picture
# 48 megapixels is the largest common camera sensor.
MAX_PIXELS = 50_000_000
# 50 megapixels with transparency, in 8 bits. Larger ones that cameras write have more than MAX_BYTES.
MAX_UNPACKED = 200_000_000

# A marker that a length follows, or the end: no stuffed byte, padding, restart inside a scan, start or TEM.
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
_SCAN, _END, _APP1 = 0xDA, 0xD9, 0xE1
_FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), 0xDE)
_ARITHMETIC = (0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)  # decoded slowly, and no common program writes them
_NO_LENGTH = (0xC8, _END, *range(0xF0, 0xFE))  # before a scan, Pillow reads them differently
_TABLES = (0xDB, 0xED)

_REMOVABLE = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_EXIF_TEXT = b"Raw profile type exif\0"
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # of a PNG by its colour type

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _TILE_WIDTH, _TILE_HEIGHT = 256, 257, 258, 259, 277, 322, 323
_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES = 273, 279, 324, 325
_NUMBERS = (_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, 278, _TILE_WIDTH, _TILE_HEIGHT,
            _STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES)  # fmt: skip
_PLAIN_BYTES = (1, 2, 7)  # types that are not unpacked
_JPEG_IN_TIFF = 7


def check_structure(data: bytes, format_: str) -> None:
    """Check a file of a format (handlers.image_formats.image_format). Raises ImageError if it exceeds a limit."""
    if format_ == "PNG":
        _check_png(data)
    elif format_ == "JPEG":
        _check_jpeg(data)
    elif format_ == "TIFF":
        for page in pages_to_read(data):
            _check_tiff(data, page.offset)


def _check_png(data: bytes) -> None:
    width, height, depth, colour = struct.unpack(">IIBB", data[16:26].ljust(10, b"\0"))
    if width * height <= MAX_PIXELS and width * height * depth * _CHANNELS.get(colour, 0) > 8 * MAX_UNPACKED:
        raise InvalidImage(
            f"This PNG decompresses to more than {MAX_UNPACKED:,} bytes. Save it with 8 bits per channel."
        )
    for number, _ in enumerate(_png_chunks(data)):
        if number >= MAX_PARTS:
            raise InvalidImage(f"This PNG has more than {MAX_PARTS:,} chunks. Save it again as a standard PNG.")


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, begin and end of each chunk before the last."""
    position = 8  # behind the signature
    while position < len(data) and (name := data[position + 4 : position + 8]) != b"IEND":
        end = position + 12 + int.from_bytes(data[position : position + 4])  # length, name, checksum: 4 bytes each
        yield name, position, end
        position = end


def without_texts(data: bytes) -> tuple[bytes, int]:
    """Return a PNG without texts and without unusable profiles, and the bits per sample that it declares (0: none).

    Pillow refuses a file for one long text. The text in which ImageMagick keeps Exif stays.
    """
    kept, begin, bits = [], 0, 0
    seen: set[bytes] = set()  # of several profiles or Exif texts, the first counts
    for name, start, end in _png_chunks(data):
        if name == b"sBIT":
            bits = max(data[start + 8 : min(end - 4, start + 12)], default=0)
        if name not in _REMOVABLE:
            continue
        if name == b"iCCP":
            keep = name not in seen and _is_usable_profile(data[start + 8 : end - 4])
            seen.add(name)
        else:
            keep = name != b"iTXt" and _EXIF_TEXT not in seen and data.startswith(_EXIF_TEXT, start + 8)
            seen |= {_EXIF_TEXT} if keep else set()
        if not keep:
            kept.append(data[begin:start])
            begin = end
    return (b"".join([*kept, data[begin:]]) if kept else data), bits


def _is_usable_profile(body: bytes) -> bool:
    """Return whether a PNG's compressed profile decompresses to at most MAX_PROFILE bytes."""
    try:
        unpacker = zlib.decompressobj()
        unpacker.decompress(body[body.index(0) + 2 :], MAX_PROFILE)
        return unpacker.eof
    except (ValueError, zlib.error):
        return False


def _check_jpeg(data: bytes) -> None:
    position, stray, segments, scans, frames, exif, tables = 2, 0, 0, 0, 0, 0, 0
    while match := _MARKER.search(data, position):
        marker = data[match.start() + 1]
        if not scans:
            stray += match.start() - position
            if marker in _NO_LENGTH:
                raise InvalidImage("This JPEG has a wrong marker before its first scan. Save it as a standard JPEG.")
            if stray > MAX_PARTS:
                break
        if marker == _END:
            return
        if marker in _ARITHMETIC:
            raise InvalidImage("This JPEG uses arithmetic coding, which is not supported. Save it as a standard JPEG.")
        position = match.end()
        length = int.from_bytes(data[position : position + 2])  # which counts itself
        segments, scans, frames = segments + 1, scans + (marker == _SCAN), frames + (marker in _FRAMES)
        exif += marker == _APP1 and data.startswith(b"Exif\0\0", position + 2)
        tables += length if marker in _TABLES else 0
        position += length
        if segments > MAX_PARTS:
            raise InvalidImage(f"This JPEG has more than {MAX_PARTS:,} segments. Save it as a standard JPEG.")
        if scans > MAX_SCANS:
            raise InvalidImage(f"This JPEG has more than {MAX_SCANS} scans. Save it as a baseline JPEG.")
        if exif > MAX_EXIF_SEGMENTS:
            raise InvalidImage(f"This JPEG has more than {MAX_EXIF_SEGMENTS} Exif segments. Save it without metadata.")
        if frames > 1:
            raise InvalidImage("This JPEG has more than one frame. Save it as a standard JPEG.")
        if tables > MAX_TABLES:
            raise InvalidImage(f"This JPEG has more than {MAX_TABLES:,} bytes of tables. Save it as a standard JPEG.")
    if not scans and max(stray, len(data) - position) > MAX_PARTS:
        raise InvalidImage(f"This JPEG has more than {MAX_PARTS:,} stray bytes. Save it as a standard JPEG.")


def _check_tiff(data: bytes, page: int) -> None:
    """Check the page at an offset."""
    order: Literal["little", "big"] = "little" if data[:2] == b"II" else "big"
    fields = int.from_bytes(data[page : page + 2], order)
    if fields > MAX_FIELDS:
        raise InvalidImage(f"This TIFF has more than {MAX_FIELDS:,} fields. Save it as a standard TIFF.")
    numbers: dict[int, list[int]] = {}
    tags, values = set(), 0
    for entry in range(page + 2, min(page + 2 + 12 * fields, len(data)), 12):
        tag, kind, length = (
            int.from_bytes(data[entry + start : entry + end], order) for start, end in ((0, 2), (2, 4), (4, 8))
        )
        if tag in tags:  # Pillow and libtiff may pick different ones
            raise InvalidImage(f"This TIFF repeats the field {tag}. Save it as a standard TIFF.")
        tags.add(tag)
        if tag in (_STRIPS, _STRIP_BYTES, _TILES, _TILE_BYTES):
            if length > MAX_PARTS:
                raise InvalidImage(f"This TIFF has more than {MAX_PARTS:,} strips or tiles. Save it as PNG.")
        elif kind not in _PLAIN_BYTES:
            values += length
        if values > MAX_VALUES:
            raise InvalidImage(
                f"This TIFF has more than {MAX_VALUES:,} values in its fields. Save it without metadata."
            )
        if tag in _NUMBERS:
            if kind not in (3, 4):
                raise InvalidImage(f"This TIFF's field {tag} is not a whole number. Save it as a standard TIFF.")
            numbers[tag] = _tiff_numbers(data, entry, 2 if kind == 3 else 4, length, order)
    _check_tiff_pixels(data, numbers)


def _tiff_numbers(data: bytes, entry: int, size: int, length: int, order: Literal["little", "big"]) -> list[int]:
    """Read a field's `length` whole numbers of `size` bytes, as far as the file holds them."""
    start = entry + 8 if length * size <= 4 else int.from_bytes(data[entry + 8 : entry + 12], order)
    count = min(length, max(0, len(data) - start) // size)
    kind = np.dtype(f"u{size}").newbyteorder("<" if order == "little" else ">")
    return np.frombuffer(data, kind, count, start).tolist() if count else []


def _check_tiff_pixels(data: bytes, numbers: dict[int, list[int]]) -> None:
    """Check a TIFF's size, strips and tiles, given the numbers in its fields by tag."""

    def largest(tag: int, default: int = 0) -> int:
        return max(numbers.get(tag, ()), default=default)

    # Strips may point at the same bytes, each of which is then unpacked again.
    if any(sum(numbers.get(tag, ())) > len(data) for tag in (_STRIP_BYTES, _TILE_BYTES)):
        raise InvalidImage("The strips or tiles of this TIFF are larger than the file. Save it as a standard TIFF.")
    if largest(_COMPRESSION) == _JPEG_IN_TIFF:
        for places, counts in ((_STRIPS, _STRIP_BYTES), (_TILES, _TILE_BYTES)):
            for place, count in zip(numbers.get(places, ()), numbers.get(counts, ()), strict=False):
                _check_jpeg(data[place : place + count])
    width, height, tile_width, tile_height = map(largest, (_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT))
    if tile_width > max(width, MAX_TILE_SIDE) or tile_height > max(height, MAX_TILE_SIDE):
        raise InvalidImage(
            f"This TIFF has tiles of {tile_width}×{tile_height} pixels; at most {MAX_TILE_SIDE:,} per side are "
            "supported. Save it without tiles."
        )
    bits = numbers.get(_BITS) or [1]
    depth = sum(bits) if len(bits) > 1 else bits[0] * largest(_SAMPLES, 1)
    if width * height <= MAX_PIXELS and max(width * height, tile_width * tile_height) * depth > 8 * MAX_UNPACKED:
        raise InvalidImage(
            f"This TIFF decompresses to more than {MAX_UNPACKED:,} bytes. Save it with 8 bits per channel."
        )
