"""Colour profiles are converted to sRGB; samples of 10 to 16 bits are scaled to 8 bits by the range that they use."""

import io
import struct

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from handlers.decoding import decode
from handlers.errors import InvalidImage
from tests.hostile.images import chunk, encode

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


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """Smooth colours of skin and lesion."""
    y, x = np.mgrid[0:64, 0:96] / 64
    return Image.fromarray(np.stack([150 + 60 * x, 90 + 60 * y, 80 + 40 * x * y], -1).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("format_", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("space", WIDE)
def test_the_same_colours_in_a_wide_space_give_the_same_picture(picture, space, format_):
    *primaries, gamma = WIDE[space]
    wide = profile(primaries=tuple(primaries), gamma=gamma)
    stored = ImageCms.profileToProfile(picture, SRGB, ImageCms.ImageCmsProfile(io.BytesIO(wide)))
    assert np.abs(pixels(stored) - pixels(picture)).max() > 8, "the profile makes a difference"
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(format_, {})
    decoded = decode(encode(stored, format_, icc_profile=wide, **options))
    assert np.abs(pixels(decoded.image) - pixels(picture)).max() <= (6 if format_ == "JPEG" else 2)
    assert decoded.converted == ("colours converted to sRGB",)


@pytest.mark.parametrize("mode", ["RGBA", "P", "L"])
def test_profiles_of_pictures_in_other_modes_are_used(picture, mode):
    wide = profile(gamma=1.0)
    decoded = decode(encode(picture.convert(mode), "PNG", icc_profile=wide))
    assert decoded.converted == ("colours converted to sRGB",)


def test_a_grey_profile_is_converted():
    ramp = Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (32, 1)))
    linear = decode(encode(ramp, "PNG", icc_profile=profile(b"GRAY", gamma=1.0)))
    assert linear.converted == ("colours converted to sRGB",)
    assert pixels(linear.image)[0, 55, 0] == pytest.approx(128, abs=3), "sRGB's curve: 0.2159 linear is 0.5029"


def test_an_srgb_profile_changes_nothing_and_is_not_mentioned(picture):
    decoded = decode(encode(picture, "PNG", icc_profile=SRGB.tobytes()))
    assert np.array_equal(pixels(decoded.image), pixels(picture))
    assert decoded.converted == ()


@pytest.mark.parametrize(
    "unusable",
    [b"garbage" * 50, profile()[:200], profile(b"GRAY"), profile(b"CMYK"), profile(kind=b"link"),
     profile() + bytes(5 << 20), b"x"],
    ids=["garbage", "cut off", "of grey", "of inks", "between devices", "huge", "a letter"],
)  # fmt: skip
def test_an_unusable_profile_is_ignored(picture, unusable):
    decoded = decode(encode(picture, "TIFF", icc_profile=unusable))
    assert np.array_equal(pixels(decoded.image), pixels(picture))
    assert decoded.converted == ("unusable colour profile ignored",)


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


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
@pytest.mark.parametrize("kind", STORED)
def test_values_of_fewer_bits_in_16_are_scaled_by_the_range_that_they_use(picture, kind, bits):
    values = np.asarray(picture).astype(np.uint16) * (257 if bits == 16 else 1 << (bits - 8))
    decoded = decode(STORED[kind](values))
    expected = pixels(picture)[:, :, :1] if kind.startswith("grey") else pixels(picture)
    assert np.abs(pixels(decoded.image) - expected).max() <= 1
    assert decoded.converted == (f"{bits}-bit values scaled to 8 bits",)


@pytest.mark.parametrize("kind", STORED)
def test_16_bit_pictures_that_are_nearly_black_are_refused(picture, kind):
    with pytest.raises(InvalidImage, match="brightness is undefined"):
        decode(STORED[kind](np.asarray(picture).astype(np.uint16)))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_the_range_that_a_file_declares_decides(picture, kind):
    dark = np.asarray(picture.convert("L")).astype(np.uint16) * 4  # 10 bits would do
    if kind == "PNG":
        plain = encode(Image.fromarray(dark), "PNG")
        data = plain[:33] + chunk(b"sBIT", b"\x0c") + plain[33:]
    else:
        data = encode(Image.fromarray(dark), "TIFF", tiffinfo={281: 4095})
    decoded = decode(data)
    assert decoded.converted == ("12-bit values scaled to 8 bits",)
    assert np.abs(pixels(decoded.image)[:, :, 0] - dark / 16).max() <= 1


def test_negative_and_very_large_values_are_refused():
    for values in (np.full((32, 32), 70_000, np.int32), np.full((32, 32), -5, np.int32)):
        with pytest.raises(InvalidImage):
            decode(encode(Image.fromarray(values), "TIFF"))
