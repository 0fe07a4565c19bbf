"""AVIF, HEIC and DICOM are read behind the limits of all formats, and damaged files are refused.

Of a DICOM header, nothing but the description of the pixels is used: not even a warning quotes a name.
"""

import logging
import random

import numpy as np
import pytest
from PIL import Image

from handlers.decoding import decode
from handlers.errors import ImageError
from handlers.file_limits import MAX_PIXELS
from tests.hostile import dicom, images, newer, photograph
from tests.hostile.images import SECRET, encode

PICTURE = images.small(photograph(0))
FORMS = dicom.forms(PICTURE)
COLOURS = np.asarray(PICTURE)
SOURCES = {name: newer.sources(photograph(0), name) for name in newer.FORMATS}


@pytest.mark.parametrize("form", FORMS)
def test_a_dicom_gives_the_picture_in_every_encoding(form):
    decoded = decode(FORMS[form])
    grey = form in ("MONOCHROME1", "MONOCHROME2", "12 bits")
    expected = np.asarray(PICTURE.convert("L").convert("RGB") if grey else PICTURE)
    assert decoded.image.size == (decoded.width, decoded.height) == PICTURE.size
    assert np.abs(np.asarray(decoded.image).astype(int) - expected).mean() < 2
    assert decoded.converted == (("12-bit values scaled to 8 bits",) if form == "12 bits" else ())


@pytest.mark.parametrize("format_", ["AVIF", "HEIF"])
def test_pictures_of_phones_are_read(format_):
    decoded = decode(encode(PICTURE, format_, quality=90))
    assert decoded.image.size == PICTURE.size
    assert np.abs(np.asarray(decoded.image).astype(int) - COLOURS).mean() < 3


@pytest.mark.parametrize("format_", ["AVIF", "HEIF"])
def test_pictures_of_phones_are_turned_upright_once(format_):
    stored = images.turned(PICTURE, 6)
    if format_ == "HEIF":  # written as a rotation of the file format, which Exif repeats
        stored.info["exif"] = images.exif(6).tobytes()
        data = encode(stored, format_, quality=90)
    else:
        data = encode(stored, format_, quality=90, exif=images.exif(6))
    decoded = decode(data)
    assert decoded.image.size == (decoded.width, decoded.height) == PICTURE.size
    assert np.abs(np.asarray(decoded.image).astype(int) - COLOURS).mean() < 3


def test_an_animated_avif_is_refused():
    frames = [PICTURE, PICTURE.transpose(Image.Transpose.ROTATE_180)]
    with pytest.raises(ImageError):
        decode(encode(frames[0], "AVIF", save_all=True, append_images=frames[1:]))


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"NumberOfFrames": 3}, 400, "3 frames"),
        ({"Rows": 30_000, "Columns": 30_000}, 413, f"{MAX_PIXELS:,} pixels"),
        ({"Rows": 1000}, 400, "cut off"),
        ({"PixelRepresentation": 1}, 400, "unusual kind"),
        ({"PhotometricInterpretation": "HSV"}, 400, "not supported"),
        ({"Rows": 8}, 400, "at least 16"),
    ],
)
def test_a_dicom_beyond_the_limits_is_refused(fields, status, words):
    with pytest.raises(ImageError, match=words) as caught:
        decode(dicom.write(COLOURS, "RGB", **fields))
    assert caught.value.status == status


def test_a_long_header_and_a_missing_picture_are_refused():
    from pydicom.uid import JPEGLossless

    long = dicom.write(COLOURS, "RGB", PatientComments="x" * (1 << 20))
    lossless = dicom.write(COLOURS, "RGB", JPEGLossless, encode(PICTURE, "JPEG"))
    for data in (long, lossless, FORMS["RGB"][:400], FORMS["JPEG"][:-20_000], FORMS["run lengths"][:-50_000]):
        with pytest.raises(ImageError) as caught:
            decode(data)
        assert caught.value.status == 400


def test_limits_of_jpeg_hold_inside_a_dicom():
    from pydicom.uid import JPEGBaseline8Bit

    plain = encode(PICTURE, "JPEG", progressive=True)
    scans = images.more_scans(plain, 40)
    with pytest.raises(ImageError, match="30 scans"):
        decode(dicom.write(COLOURS, "YBR_FULL_422", JPEGBaseline8Bit, scans))


def outcome(data: bytes) -> tuple[int, str]:
    try:
        decode(data)
    except ImageError as error:
        return error.status, str(error)
    return 200, ""


@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("number", [40, pytest.param(600, marks=[pytest.mark.hostile])], ids=["some", "all"])
def test_damaged_files_are_read_or_refused_and_quote_nothing(kind, number, caplog):
    rng = random.Random(2019)
    with caplog.at_level(logging.INFO):
        answers = [outcome(images.damaged(rng, SOURCES[kind]).data) for _ in range(number)]
    assert {status for status, _ in answers} <= {200, 400, 413, 415}
    assert not [words for _, words in answers if "Hildegard" in words]
    assert "Hildegard" not in caplog.text
    assert SECRET.encode() in FORMS["RGB"]
