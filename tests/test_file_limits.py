"""Limits on the structure of image files that would cost Pillow minutes or gigabytes.

Each limit has a file just within it, which is read, and a file beyond it, which is refused before Pillow opens it.
"""

import io
import struct
import zlib
from contextlib import nullcontext

import numpy as np
import pytest
from PIL import Image, ImageCms

from handlers.decoding import decode
from handlers.errors import ImageError, InvalidImage
from handlers.file_limits import check_structure, without_texts
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


LIMITS = {  # a file within the limit, a file beyond it, and words of the refusal
    "Exif's segments": (in_jpeg(EXIF * 20), in_jpeg(EXIF * 21), "20 Exif segments"),
    "bytes between segments": (in_jpeg(b"\xff" * 90_000), in_jpeg(b"\xff" * 110_000), "stray bytes"),
    "ends before a scan": (JPEG, in_jpeg(b"\xff\xd9"), "wrong marker"),
    "markers without a length": (JPEG, in_jpeg(b"\xff\xf0\0\x04ab"), "wrong marker"),
    "frames": (JPEG, JPEG[:SCAN] + FRAME + JPEG[SCAN:], "more than one frame"),
    "arithmetic codes": (JPEG, JPEG.replace(b"\xff\xc0", b"\xff\xc9"), "arithmetic coding"),
    "bytes of tables": (in_jpeg(PHOTOSHOP * 60), in_jpeg(PHOTOSHOP * 70), "bytes of tables"),
    "Exif before the pixels": (
        in_png(chunk(b"eXIf", TURNS)), in_png(chunk(b"eXIf", TURNS + bytes(1 << 20))), "bytes of Exif data",
    ),
    "Exif behind the pixels": (
        in_png(chunk(b"eXIf", TURNS), -12), in_png(chunk(b"eXIf", TURNS + bytes(1 << 20)), -12), "bytes of Exif data",
    ),
    "Exif as a text": (
        *(in_png(chunk(b"tEXt", b"Raw profile type exif\0\nexif\n  10\n" + (TURNS + bytes(n)).hex().encode()))
          for n in (0, 1 << 20)), "bytes of Exif data",
    ),
    "fields": (tiff(), tiff()[:8] + struct.pack("<H", 1001) + tiff()[10:], "1,000 fields"),
    "fields of a kind": (twice(263), twice(259), "repeats the field 259"),
    "values": (tiff(t282=(5, 1, 400)), tiff(t282=(5, 200_001, 400)), "200,000 values"),
    "values of all fields": (
        *(tiff(t282=(5, 50_000, 400), t283=(5, n, 400), t301=(3, 100_000, 400)) for n in (1, 50_001)), "200,000 values",
    ),
    "a transfer function": (tiff(t301=(3, 3 << 16, 400)), tiff(t301=(3, 1 << 18, 400)), "200,000 values"),
    "XMP, and numbers in its place": (tiff(t700=(1, 250_000, 400)), tiff(t700=(3, 250_000, 400)), "200,000 values"),
    "strips": (strips(16), tiff(t273=(4, 100_001, 400)), "100,000 strips"),
    "strips over each other": (strips(16), strips(100), "overlap"),
    "bytes of strips": (tiff(), tiff(t279=(4, 1, 1_000_000)), "larger than the file"),
    "measures that are no numbers": (tiff(), tiff(t278=(7, 1, 16)), "not a whole number"),
    "the side of a tile": (tile(16), tile(4112), "at most 4,096 per side"),
    "scans of a JPEG in a TIFF": (jpeg_in_tiff(30), jpeg_in_tiff(31), "30 scans"),
    "run lengths": (encode(Image.new("P", (64, 64)), "BMP"), images.bmp_runs(64), "run-length"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIMITS)
def test_a_file_within_the_limit_is_read_and_beyond_it_is_refused(name):
    allowed, costly, words = LIMITS[name]
    decode(allowed)
    with pytest.raises(ImageError) as caught:
        decode(costly)
    assert (caught.value.status, caught.value.code) == (400, "invalid_image")
    assert words in str(caught.value)


UNPACKED = "decompresses to more than 200,000,000 bytes"


@pytest.mark.parametrize(
    ("file", "format_", "refusal"),
    [
        (images.png(7000, 7000, 8, 6, whole=False), "PNG", ""),
        (images.png(7000, 7000, 16, 6, whole=False), "PNG", UNPACKED),
        (images.png(9000, 9000, 16, 6, whole=False), "PNG", ""),  # too many pixels, which the header check refuses
        (images.tiff(7000, 7000), "TIFF", ""),
        (images.tiff(7000, 7000, t277=5), "TIFF", UNPACKED),
        (images.tiff(19_000, 2_500, t322=19_000, t323=4096, t277=3), "TIFF", UNPACKED),
        (b"\xff\xd8\xff", "JPEG", ""), (b"\x89PNG\r\n\x1a\n", "PNG", ""), (b"BM" + bytes(99), "BMP", ""),
    ],
)  # fmt: skip
def test_the_decompressed_size_is_limited(file, format_, refusal):
    with pytest.raises(InvalidImage, match=refusal) if refusal else nullcontext():
        check_structure(file, format_)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("kind", ["JPEG", "raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits"])
def test_files_of_common_programs_are_within_the_limits(kind, progressive):
    large = PICTURE.resize((1000, 700))
    options = {"progressive": progressive, "quality": 100} if kind == "JPEG" else {"compression": kind}
    data = encode(large, "JPEG" if kind == "JPEG" else "TIFF", **options)
    decode(data)


def test_a_jpeg_may_have_thirty_scans_whatever_lies_behind_its_end():
    progressive = encode(PICTURE, "JPEG", progressive=True)
    last, usual = progressive[progressive.rindex(b"\xff\xda") : -2], progressive.count(b"\xff\xda")
    decode(progressive[:-2] + last * (30 - usual) + progressive[-2:] + b"\xff\xda\0\0" * 500)
    with pytest.raises(ImageError, match="more than 30 scans"):
        decode(progressive[:-2] + last * (31 - usual) + progressive[-2:])


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "tEXt"])
@pytest.mark.parametrize("place", [33, -12], ids=["before the pixels", "behind the pixels"])
def test_texts_of_a_png_are_ignored_however_many_or_long(kind, place):
    head = b"key\0" + {"zTXt": b"\0", "iTXt": b"\1\0\0\0", "tEXt": b""}[kind]
    body = b"x" * 2_000_000
    long = chunk(kind.encode(), head + (body if kind == "tEXt" else zlib.compress(body)))
    assert decode(in_png(long + TEXT * 200, place)).image.size == PICTURE.size


def test_of_several_profiles_of_a_png_the_first_counts():
    good = chunk(b"iCCP", b"p\0\0" + zlib.compress(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()))
    for profiles in (good, good + PROFILE * 20):
        assert Image.open(io.BytesIO(without_texts(in_png(profiles))[0])).info["icc_profile"]
    for unusable in (b"p\0\0" + zlib.compress(bytes(1_500_000)), b"p\0\0rubbish", b"", b"p"):
        assert decode(in_png(chunk(b"iCCP", unusable))).image.size == PICTURE.size
    assert without_texts(PNG)[0] is PNG
