"""What an image file may not have more of, since Pillow would take minutes or gigabytes for it.

Each limit has a file that is just within it and is read, and one beyond it, which is refused before it is opened.
"""

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from handlers.file_limits import excess
from handlers.preprocessing import ImageError, decode
from tests.hostile import images
from tests.hostile.images import chunk, encode

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8))
JPEG, PNG = encode(PICTURE, "JPEG"), encode(PICTURE, "PNG")
SCAN = JPEG.index(b"\xff\xda")
EXIF = b"\xff\xe1\0\x14Exif\0\0MM\0*\0\0\0\x08\0\0\0\0"
FRAME = b"\xff\xc0\0\x0b\x08\0\x18\0\x20\1\1\x11\0"
PHOTOSHOP = b"\xff\xed\xff\xff" + bytes(65533)
TURNS = b"MM\0*\0\0\0\x08\0\0"
TEXT = chunk(b"zTXt", b"\0\0" + zlib.compress(b"text"))
PROFILE = chunk(b"iCCP", b"k\0\0" + zlib.compress(b""))


def in_jpeg(more: bytes) -> bytes:
    return JPEG[:2] + more + JPEG[2:]


def in_png(more: bytes, place: int = 33) -> bytes:
    return PNG[:place] + more + PNG[place:]


def tiff(more: bytes = bytes(900_000), **fields: tuple[int, int, int]) -> bytes:
    """16 by 16 grey pixels; `fields` as t282=(type, number of values, where), others in place of the usual ones."""
    return images.tiff(16, 16, **{"t273": 300, "t279": 256, **fields}).ljust(300, b"\0") + more


def strips(number: int) -> bytes:
    """The 16 rows in strips of one, and more that lie over them."""
    data = bytearray(tiff(t273=(4, number, 1000), t278=(4, 1, 1), t279=(4, number, 10_000)))
    data[1000 : 1000 + 4 * number] = struct.pack("<I", 300) * number
    data[10_000 : 10_000 + 4 * number] = struct.pack("<I", 16) * number
    return bytes(data)


def tile(side: int) -> bytes:
    return tiff(t322=(4, 1, 16), t323=(4, 1, side), t324=(4, 1, 300), t325=(4, 1, 256))


def twice(tag: int) -> bytes:
    """A TIFF whose fifth field has this tag, which may be that of another."""
    data = bytearray(tiff())
    data[58:60] = struct.pack("<H", tag)
    return bytes(data)


def jpeg_in_tiff(scans: int) -> bytes:
    grey = encode(PICTURE.convert("L").resize((16, 16)), "JPEG", progressive=True)
    last, usual = grey[grey.rindex(b"\xff\xda") : -2], grey.count(b"\xff\xda")
    strip = grey[:-2] + last * (scans - usual) + grey[-2:]
    return tiff(strip, t259=(3, 1, 7), t279=(4, 1, len(strip)))


LIMITS = {  # the last that is read, the first that is not, and what is said of it
    "Exif's segments": (in_jpeg(EXIF * 20), in_jpeg(EXIF * 21), "20 segments of Exif"),
    "bytes between segments": (in_jpeg(b"\xff" * 90_000), in_jpeg(b"\xff" * 110_000), "headers before"),
    "ends before a scan": (JPEG, in_jpeg(b"\xff\xd9"), "headers before"),
    "markers without a length": (JPEG, in_jpeg(b"\xff\xf0\0\x04ab"), "headers before"),
    "frames": (JPEG, JPEG[:SCAN] + FRAME + JPEG[SCAN:], "1 frame"),
    "arithmetic codes": (JPEG, JPEG.replace(b"\xff\xc0", b"\xff\xc9"), "Huffman"),
    "bytes of tables": (in_jpeg(PHOTOSHOP * 60), in_jpeg(PHOTOSHOP * 70), "bytes of tables"),
    "colour profiles": (in_png(PROFILE), in_png(PROFILE * 2), "one colour profile"),
    "packed texts": (in_png(TEXT * 100), in_png(TEXT * 101), "100 packed texts"),
    "Exif before the pixels": (
        in_png(chunk(b"eXIf", TURNS)), in_png(chunk(b"eXIf", TURNS + bytes(1 << 20))), "Exif data are over",
    ),
    "Exif behind the pixels": (
        in_png(chunk(b"eXIf", TURNS), -12), in_png(chunk(b"eXIf", TURNS + bytes(1 << 20)), -12), "Exif data are over",
    ),
    "Exif as a text": (
        *(in_png(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  10\n" + (TURNS + bytes(n)).hex().encode()))
          for n in (0, 1 << 20)), "Exif data are over",
    ),
    "fields": (tiff(), tiff()[:8] + struct.pack("<H", 1001) + tiff()[10:], "1,000 fields"),
    "fields of a kind": (twice(263), twice(259), "one field of a kind"),
    "values": (tiff(t282=(5, 1, 400)), tiff(t282=(5, 200_001, 400)), "200,000 values"),
    "values of all fields": (
        *(tiff(t282=(5, 50_000, 400), t283=(5, n, 400), t301=(3, 100_000, 400)) for n in (1, 50_001)), "200,000 values",
    ),
    "a transfer function": (tiff(t301=(3, 3 << 16, 400)), tiff(t301=(3, 1 << 18, 400)), "200,000 values"),
    "XMP, and numbers in its place": (tiff(t700=(1, 250_000, 400)), tiff(t700=(3, 250_000, 400)), "200,000 values"),
    "strips": (strips(16), tiff(t273=(4, 100_001, 400)), "100,000 strips"),
    "strips over each other": (strips(16), strips(100), "lie over each other"),
    "bytes of strips": (tiff(), tiff(t279=(4, 1, 1_000_000)), "its own bytes"),
    "measures that are no numbers": (tiff(), tiff(t278=(7, 1, 16)), "whole numbers"),
    "the side of a tile": (tile(16), tile(4112), "4,096 pixels"),
    "scans of a JPEG in a TIFF": (jpeg_in_tiff(30), jpeg_in_tiff(31), "30 scans"),
    "run lengths": (encode(Image.new("P", (64, 64)), "BMP"), images.bmp_runs(64), "run lengths"),
}  # fmt: skip


@pytest.mark.parametrize("what", LIMITS)
def test_within_it_is_read_and_beyond_it_is_refused(what):
    allowed, costly, says = LIMITS[what]
    decode(allowed)
    with pytest.raises(ImageError) as caught:
        decode(costly)
    assert (caught.value.status, caught.value.code) == (400, "invalid_image")
    assert says in str(caught.value)


UNPACKED = "200,000,000 bytes when it is unpacked"


@pytest.mark.parametrize(
    ("file", "found"),
    [
        (images.png(7000, 7000, 8, 6, whole=False), ""),
        (images.png(7000, 7000, 16, 6, whole=False), UNPACKED),
        (images.png(9000, 9000, 16, 6, whole=False), ""),  # too many pixels, which is another refusal
        (images.tiff(7000, 7000), ""),
        (images.tiff(7000, 7000, t277=5), UNPACKED),
        (images.tiff(19_000, 2_500, t322=19_000, t323=4096, t277=3), UNPACKED),
        (b"", ""), (b"\xff\xd8\xff", ""), (b"\x89PNG\r\n\x1a\n", ""), (b"BM" + bytes(99), ""),
    ],
)  # fmt: skip
def test_what_it_unpacks_to_is_limited(file, found):
    assert excess(file) == found


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kind", ["JPEG", "raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"])
def test_what_programs_write_has_no_excess(kind, progressive):
    large = PICTURE.resize((1000, 700))
    options = {"progressive": progressive, "quality": 100} if kind == "JPEG" else {"compression": kind}
    data = encode(large, "JPEG" if kind == "JPEG" else "TIFF", **options)
    assert excess(data) == ""
    decode(data)


def test_a_jpeg_may_have_thirty_scans_whatever_lies_behind_its_end():
    progressive = encode(PICTURE, "JPEG", progressive=True)
    last, usual = progressive[progressive.rindex(b"\xff\xda") : -2], progressive.count(b"\xff\xda")
    decode(progressive[:-2] + last * (30 - usual) + progressive[-2:] + b"\xff\xda\0\0" * 500)
    with pytest.raises(ImageError, match="more than 30 scans"):
        decode(progressive[:-2] + last * (31 - usual) + progressive[-2:])
