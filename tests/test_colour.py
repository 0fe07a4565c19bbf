"""Colour profiles are converted to sRGB; samples of 10 to 16 bits are scaled to 8 bits by the range that they use."""

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from handlers.decoding import decode
from handlers.errors import InvalidImage
from tests.hostile.colours import SRGB, STORED, WIDE, profile
from tests.hostile.images import chunk, encode


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
