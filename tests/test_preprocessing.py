"""Untrusted bytes become an upright RGB picture or an ImageError.

JPEG, PNG, WebP, BMP and TIFF are read in every colour mode and orientation. Size and shape are checked before the
pixels are decoded. A damaged file gets status 400, a too large one 413, and another format 415.
"""

import io
import struct
import tracemalloc
import zlib
from dataclasses import asdict
from unittest.mock import MagicMock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from handlers import decoding
from handlers.decoding import decode
from handlers.errors import ImageError
from handlers.file_limits import MAX_UNCOMPRESSED_BYTES
from handlers.preprocessing import Preprocessing
from tests.hostile import images
from tests.hostile.images import chunk, encode


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """A picture with a different colour in each quarter, so that turning it shows."""
    pixels = np.zeros((60, 80, 3), np.uint8)
    pixels[:30, :40], pixels[:30, 40:], pixels[30:, :40], pixels[30:, 40:] = (
        (200, 30, 30),
        (30, 200, 30),
        (30, 30, 200),
        (220, 220, 30),
    )
    return Image.fromarray(pixels)


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds almost no pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_reads_the_five_formats(picture, format_):
    decoded = decode(encode(picture, format_))
    assert decoded.image.mode == "RGB"
    assert (decoded.width, decoded.height) == (80, 60)
    assert np.abs(np.asarray(decoded.image)[15, 20].astype(int) - (200, 30, 30)).max() < 12


@pytest.mark.parametrize("format_", ["PNG", "TIFF"])  # Pillow itself turns a TIFF
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientations_of_one_photo_give_the_same_picture(picture, orientation, format_):
    inverse = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = picture.transpose(inverse[orientation]) if orientation in inverse else picture
    exif = Image.Exif()
    exif[0x0112] = orientation
    decoded = decode(encode(stored, format_, exif=exif))
    assert (decoded.width, decoded.height) == (80, 60)
    assert np.array_equal(np.asarray(decoded.image), np.asarray(picture))


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_orientation_in_xmp_alone_is_ignored_as_in_browsers(picture, format_):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp.decode())
    options = {"PNG": {"pnginfo": text}, "TIFF": {"tiffinfo": {700: xmp}}}.get(format_, {"xmp": xmp})
    decoded = decode(encode(picture, format_, **options))
    assert decoded.image.size == (decoded.width, decoded.height) == picture.size


@pytest.mark.parametrize(("kind", "value"), [(1, b"\6\0\0\0"), (7, b"\6\0\0\0"), (2, b"6\0\0\0"), (2, b"up\0\0")])
def test_an_orientation_of_the_wrong_type_is_ignored(picture, kind, value):
    field = struct.pack(">HHHI", 1, 0x0112, kind, 1 if kind != 2 else value.index(0) + 1) + value + bytes(4)
    body = b"Exif\0\0MM\0*\0\0\0\x08" + field
    jpeg = encode(picture, "JPEG")
    with_it = jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]
    assert np.array_equal(np.asarray(decode(with_it).image), np.asarray(decode(jpeg).image))


def test_a_tiff_with_white_as_zero_is_inverted():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).tobytes()
    heads = (images.tiff(16, 16, t258=16, t262=how, t273=200, t279=512) for how in (1, 0))
    black, white = (np.asarray(decode(head.ljust(200, b"\0") + ramp).image) for head in heads)
    assert (black[0, 0, 0], black[-1, -1, 0]) == (0, 255)
    assert np.array_equal(white, 255 - black)


def test_large_webps_are_decoded_one_at_a_time(picture, monkeypatch):
    alone = MagicMock()
    monkeypatch.setattr(decoding, "_alone", alone)
    decode(encode(picture.resize((64, 48)), "WEBP"))
    assert not alone.__enter__.called
    decode(encode(Image.new("RGB", (700, 400)), "WEBP", lossless=True))
    assert alone.__enter__.called
    assert alone.__exit__.called


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "LA", "CMYK", "YCbCr", "I;16"])
def test_every_colour_mode_becomes_the_same_rgb(picture, mode):
    grey = picture.convert("L")
    if mode == "I;16":
        stored = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode == "P":
        stored = picture.quantize(16)
    elif mode == "LA":
        stored = grey.convert("LA")
    else:
        stored = picture.convert(mode)
    data = encode(stored, {"CMYK": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG"))
    pixels = np.asarray(decode(data).image).astype(int)
    expected = np.asarray((grey if mode in ("L", "LA", "I;16") else picture).convert("RGB"))
    if mode != "1":
        assert np.abs(pixels[15, 20] - expected[15, 20]).max() < 12
    assert pixels.shape == (60, 80, 3)


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    assert np.asarray(decode(encode(clear, "PNG")).image).min() == 255


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 400, "empty_image"),
        (b"hello", 415, "unsupported_media_type"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "unsupported_media_type"),
        (b"%PDF-1.7\n%...", 415, "unsupported_media_type"),
        (b"PK\x03\x04" + b"\0" * 40, 415, "unsupported_media_type"),
        (b"GIF89a" + b"\0" * 40, 415, "unsupported_media_type"),
        (b"II*\0\x08\0\0\0CR\2\0" + bytes(40), 415, "unsupported_media_type"),
        (b"RIFF\x24\0\0\0WAVEfmt ", 415, "unsupported_media_type"),
        (b"\xff\xd8\xff\xe0" + b"\0" * 40, 400, "invalid_image"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, 400, "invalid_image"),
        (b"II*\x00" + b"\xff" * 40, 400, "invalid_image"),
        (png_header(30_000, 30_000), 413, "image_too_large"),
        (png_header(8, 8), 400, "image_too_small"),
        (png_header(4000, 100), 400, "unusual_shape"),
        (png_header(640, 480), 400, "invalid_image"),
    ],
    ids=lambda value: value[:12] if isinstance(value, bytes) else None,
)
def test_refusals_have_a_status_a_code_and_a_sentence(data, status, code):
    with pytest.raises(ImageError) as caught:
        decode(data)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert str(caught.value).endswith(".")


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"GIF89a", "a GIF"), (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000"), (b"\xff\x4f\xff\x51", "a JPEG 2000"),
        (b"\xff\x0a", "a JPEG XL"), (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL"), (b"8BPS", "a Photoshop"),
        (b"%PDF-1.7", "a PDF"), (b"PK\3\4", "a ZIP"), (b"\0\0\0\x18ftypmp42", "an MP4"),
        (b"\0\0\0\x18ftypqt  ", "a QuickTime"), (b"\0\0\0\x18ftypcrx ", "a Canon raw"),
        (b"FUJIFILMCCD-RAW", "a camera raw"), (b"II+\0", "a BigTIFF"),
        (b"<svg xmlns='x'>", "an SVG"), (b"<?xml version='1.0'?><!-- made --><svg>", "an SVG"),
        (b"RIFF\x24\0\0\0AVI ", "an AVI"), (images.tiff(64, 64, t50706=1), "a camera raw"),
        (images.tiff(64, 64, t254=1, t330=8), "a camera raw"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_read_is_named(data, name):
    with pytest.raises(ImageError, match=f"^This is {name}") as caught:
        decode(data + bytes(200))
    assert (caught.value.status, caught.value.code) == (415, "unsupported_media_type")


def test_animations_are_refused(picture):
    frames = [picture, picture.transpose(Image.Transpose.ROTATE_180)]
    for format_ in ("PNG", "WEBP"):
        with pytest.raises(ImageError, match="animation"):
            decode(encode(frames[0], format_, save_all=True, append_images=frames[1:]))


def test_a_tiff_of_several_pictures_is_refused_with_their_number(picture):
    data = encode(picture, "TIFF", save_all=True, append_images=[Image.new("RGB", (80, 60))])
    with pytest.raises(ImageError, match="This TIFF has 2 pages") as caught:
        decode(data)
    assert (caught.value.status, caught.value.code) == (400, "several_pages")


@pytest.mark.parametrize("words", ["by size", "by field"])
def test_smaller_copies_in_a_tiff_are_skipped(picture, words):
    copy = picture.resize((40, 30) if words == "by size" else (60, 45))
    copy.encoderinfo = {"tiffinfo": {254: 1}} if words == "by field" else {}
    data = encode(picture, "TIFF", save_all=True, append_images=[copy])
    assert np.array_equal(np.asarray(decode(data).image), np.asarray(picture))


@pytest.mark.parametrize("depth", [8, 12])
@pytest.mark.parametrize(
    "description",
    [
        "ImageJ=1.53\nimages=3\nchannels=3\nmode=composite\n",
        '<OME><Image><Pixels SizeX="80" SizeY="60" SizeZ="1" SizeC="3" SizeT="1"/></Image></OME>',
        '{"shape": [3, 60, 80], "axes": "CYX"}',
    ],
    ids=["ImageJ", "OME", "tifffile"],
)
def test_channels_stored_as_pages_are_merged(picture, description, depth):
    values = np.asarray(picture).astype(np.uint16) * 16 if depth == 12 else np.asarray(picture)
    pages = [Image.fromarray(np.ascontiguousarray(values[:, :, band])) for band in range(3)]
    data = encode(pages[0], "TIFF", save_all=True, append_images=pages[1:], description=description)
    decoded = decode(data)
    assert np.abs(np.asarray(decoded.image).astype(int) - np.asarray(picture)).max() <= 1
    assert "three pages merged into one colour picture" in decoded.converted


def test_three_pages_that_say_nothing_of_channels_are_refused(picture):
    pages = list(picture.split())
    with pytest.raises(ImageError, match="This TIFF has 3 pages"):
        decode(encode(pages[0], "TIFF", save_all=True, append_images=pages[1:]))


def test_a_huge_claimed_size_costs_no_memory():
    tracemalloc.start()
    with pytest.raises(ImageError):
        decode(png_header(30_000, 30_000))
    assert tracemalloc.get_traced_memory()[1] < 5_000_000
    tracemalloc.stop()


def test_a_truncated_jpeg_is_refused_at_any_length(sample_images):
    data = sample_images[0]
    for share in (0.02, 0.3, 0.6, 0.95):
        with pytest.raises(ImageError):
            decode(data[: int(len(data) * share)])


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_images_decode_or_are_refused(data, picture):
    original = bytearray(encode(picture, data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "TIFF"]))))
    for _ in range(data.draw(st.integers(1, 8))):
        original[data.draw(st.integers(0, len(original) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(1, len(original)))
    try:
        outcome: str | int = decode(bytes(original[:cut])).image.mode
    except ImageError as error:
        outcome = error.status
    assert outcome in ("RGB", 400, 413, 415)


def test_reduced_decoding_changes_the_input_little_and_the_reported_size_not(drawn_image):
    drawn = Image.open(io.BytesIO(drawn_image("MEL", 3)))
    photo = encode(drawn.resize((2400, 1800)), "JPEG", quality=92)
    preprocessing = Preprocessing(128)
    pixels, decoded = preprocessing(photo)
    assert (decoded.width, decoded.height) == (2400, 1800)
    assert min(decoded.image.size) < 1800, "the point of min_side is to decode fewer pixels"
    full = preprocessing.resize(decode(photo).image)
    assert np.abs(pixels.astype(int) - full).mean() < 1.5


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "CMYK", "I;16"])
def test_a_large_picture_shrinks_and_looks_the_same(picture, mode):
    large = picture.resize((3000, 2250))
    if mode == "I;16":
        large = Image.fromarray(np.asarray(large.convert("L")).astype(np.uint16) * 257)
    else:
        large = large.quantize(64) if mode == "P" else large.convert(mode)
    data = encode(large, "TIFF", compression="tiff_lzw") if mode == "CMYK" else encode(large, "PNG")
    whole, shrunk = decode(data), decode(data, min_side=256)
    assert (shrunk.width, shrunk.height) == (3000, 2250)
    assert shrunk.image.size == (750, 563), "not below SHRINK_SIDE"
    resize = Preprocessing(128).resize
    assert np.abs(resize(shrunk.image).astype(int) - resize(whole.image)).mean() < 1


def test_a_long_picture_shrinks_too(picture):
    decoded = decode(encode(picture.resize((1500, 9000)), "PNG"), min_side=224)
    assert decoded.image.size == (750, 4500)


def test_bytes_behind_the_end_of_a_png_are_ignored(picture):
    data = encode(picture, "PNG")
    assert decode(data + bytes(2_000_000)).image.size == picture.size


@pytest.mark.parametrize(
    ("colour", "code"), [((0, 0, 0), "no_content"), ((255, 255, 255), "no_content"), ((222, 184, 160), "no_content")]
)
def test_pictures_of_a_single_colour_are_refused(colour, code):
    for format_ in ("PNG", "JPEG"):
        with pytest.raises(ImageError, match="Send a photograph") as caught:
            Preprocessing(128)(encode(Image.new("RGB", (300, 300), colour), format_))
        assert (caught.value.status, caught.value.code) == (400, code)


def test_noise_tells_a_plain_photograph_from_a_black_or_empty_one():
    noise = np.random.default_rng(0).normal(0, 3, (300, 300, 3))
    skin = encode(Image.fromarray(np.clip(np.add(noise, (222, 184, 160)), 0, 255).astype(np.uint8)), "PNG")
    assert Preprocessing(128)(skin)[0].shape == (128, 128, 3)
    with pytest.raises(ImageError, match="black, white"):
        Preprocessing(128)(encode(Image.fromarray(np.clip(noise + 3, 0, 255).astype(np.uint8)), "PNG"))


def test_standardisation_is_the_textbook_formula():
    preprocessing = Preprocessing(16, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.5))
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    scale, offset = preprocessing.standardisation
    assert np.allclose(pixels * scale + offset, (pixels / 255 - (0.5, 0.4, 0.3)) / (0.2, 0.25, 0.5))
    assert Preprocessing.from_dict(asdict(preprocessing)) == preprocessing


def test_local_files_have_no_limit_of_bytes(picture):
    data = encode(picture, "PNG") + bytes(MAX_UNCOMPRESSED_BYTES)
    assert Preprocessing(64)(data)[0].shape == (64, 64, 3)
