"""Decoding: untrusted bytes to an upright RGB picture, with every limit on its size and shape.

The steps: detect the format from the first bytes (handlers/image_formats.py), check the structure
(handlers/file_limits.py), check the header, decode the pixels, scale deep samples (handlers/sample_depth.py), convert
the colours to sRGB (handlers/colour.py), turn the picture upright.
"""

import hashlib
import io
import threading
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from handlers.colour import to_srgb
from handlers.dicom import DicomFrame, read_frame
from handlers.errors import ImageError, InvalidImage
from handlers.file_limits import MAX_PIXELS, check_structure, without_texts
from handlers.image_formats import image_format
from handlers.sample_depth import (
    declared_bits,
    grey_levels,
    is_deep_colour,
    note,
    prepare_planes,
    sample_bits,
    scale_deep_colour,
)
from handlers.tiff_pages import pages_to_read

MIN_SIDE = 16
# Beyond a panorama's shape the squashed input no longer resembles a lesion.
MAX_ASPECT_RATIO = 8.0
# Exif has 64 KB in most files, and Pillow unpacks whatever length a tag claims.
MAX_EXIF_BYTES = 1 << 20
# Pillow holds three canvases of a WebP, 16 bytes a pixel; AVIF and HEIC cost as much. So these may have half the
# pixels of other formats, and large ones are decoded one at a time.
MAX_WEBP_PIXELS, ALONE_PIXELS = 25_000_000, 262_144
# Pictures shrink by whole boxes right after decoding, as long as the shorter side keeps this many pixels. A batch of
# eight with 50 megapixels each would hold 1.6 GB otherwise.
SHRINK_SIDE = 512

_ALONE = ("WEBP", "AVIF", "HEIF", "JPEG2000")  # formats with the costs of WebP
_RUN_LENGTHS = (1, 2)  # compressions of a BMP that Pillow decodes in Python, a pixel at a time
_alone = threading.Lock()
_XMP = ("xmp", "XML:com.adobe.xmp")  # Pillow would take the orientation from there
# The transposition that makes a picture with this EXIF orientation upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class DecodedImage:
    """An upright RGB picture, possibly at reduced scale, with the upright size (pixels) in which it was sent.

    `converted` says in plain words what was changed, such as "12-bit values scaled to 8 bits".
    """

    image: Image.Image
    width: int
    height: int
    sha256: str
    converted: tuple[str, ...] = ()


def decode(data: bytes, min_side: int | None = None) -> DecodedImage:
    """Decode untrusted bytes to an upright RGB image.

    EXIF orientation is applied (XMP's is not, as in browsers), transparency is laid on white, samples of 10 to 16 bits
    are scaled to 8 bits, colours are converted to sRGB, and channels stored as pages of a TIFF are merged.

    Args:
        data: the file as received.
        min_side: if given, the picture may be decoded at reduced scale: a JPEG at 1/2, 1/4 or 1/8 as long as its
            shorter side keeps this many pixels, others down to SHRINK_SIDE.

    Raises:
        ImageError: 413 for too many pixels, 415 for another kind of file, 400 for a damaged or unusable one.
    """
    if not data:
        raise ImageError(400, "empty_image", "The request holds no image. Send the bytes of one picture.")
    format_ = image_format(data)
    digest = hashlib.sha256(data).hexdigest()
    if format_ == "DICOM":
        frame = read_frame(data)
        if frame.image is not None:
            return _from_dicom(frame, frame.image, min_side, digest)
        data, format_ = frame.encoded, frame.format
        if format_ == "JPEG" and image_format(data) != "JPEG":
            raise InvalidImage("The picture in this DICOM is damaged. Export the picture as JPEG.")
    check_structure(data, format_)
    if format_ == "HEIF":
        _register_heif()
    png_bits = 0
    if format_ == "PNG":
        data, png_bits = without_texts(data)
    notes: list[str] = []
    try:
        with Image.open(io.BytesIO(data), formats=(format_,)) as opened:
            _check_header(opened)
            large = format_ in _ALONE and opened.width * opened.height > ALONE_PIXELS
            with _alone if large else nullcontext():
                image, size = _load(opened, data, min_side, png_bits, notes)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(413, "image_too_large", f"The image has more than {MAX_PIXELS:,} pixels.") from error
    except UnidentifiedImageError as error:
        raise InvalidImage(f"The file begins like a {format_} image, but its header is damaged.") from error
    # Pillow's decoders report damage with exceptions of many kinds.
    except Exception as error:
        raise InvalidImage(f"The {format_} image is damaged or cut off and cannot be decoded.") from error
    return DecodedImage(image, *size, digest, tuple(notes))


@cache
def _register_heif() -> None:
    """Make Pillow read HEIC; once, when the first one arrives."""
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False)


def _from_dicom(frame: DicomFrame, image: Image.Image, min_side: int | None, digest: str) -> DecodedImage:
    """Convert a frame that was not compressed, or in run lengths."""
    notes: list[str] = []
    _check_header(image)
    size = image.size
    shrink = 1 if min_side is None else max(1, min(size) // max(min_side, SHRINK_SIDE))
    if image.mode == "I":
        bits = sample_bits(_highest(image), frame.bits if frame.bits < 16 else 0)
        notes.append(note(bits))
        image, shrink = Image.fromarray(grey_levels(np.asarray(image.reduce(shrink)), bits)), 1
    if frame.inverted:
        image = ImageOps.invert(image)
    return DecodedImage(_to_rgb(image, shrink, frame.profile, notes), *size, digest, tuple(notes))


def ignore_oddities() -> None:
    """Keep Pillow's warnings of harmless oddities in EXIF and TIFF tags out of the log, for the whole process.

    Not around each picture, because Python's warning filters are shared by all threads.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _check_header(image: Image.Image) -> None:
    width, height = image.size
    max_pixels = MAX_WEBP_PIXELS if image.format in _ALONE else MAX_PIXELS
    if width * height > max_pixels:
        raise ImageError(
            413, "image_too_large", f"The image has {width}×{height} pixels; the limit is {max_pixels:,} pixels."
        )
    if min(width, height) < MIN_SIDE:
        raise ImageError(
            400, "image_too_small", f"The image has {width}×{height} pixels; each side needs at least {MIN_SIDE}."
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(
            400,
            "unusual_shape",
            f"The image has {width}×{height} pixels; one side may be at most {MAX_ASPECT_RATIO:g} times the other.",
        )
    if image.format == "TIFF" and _area(image) > width * height:
        raise InvalidImage("The strips or tiles of this TIFF overlap. Save it as a standard TIFF.")
    if image.format == "BMP" and image.info.get("compression") in _RUN_LENGTHS:
        raise InvalidImage("This BMP uses run-length compression, which is not supported. Save it as PNG.")
    if image.format in ("PNG", "WEBP", "AVIF") and getattr(image, "n_frames", 1) > 1:
        raise ImageError(400, "animated_image", "The image is an animation. Send one still picture.")


def _area(image: Any) -> int:
    """Count the pixels of all strips or tiles of a TIFF, per layer where layers are stored separately."""
    samples, separate = image.tag_v2.get(277, 1), image.tag_v2.get(284, 1) == 2
    places = (tile[1] for tile in image.tile)
    return sum((right - left) * (low - top) for left, top, right, low in places) // (samples if separate else 1)


def _load(
    image: Image.Image, data: bytes, min_side: int | None, png_bits: int, notes: list[str]
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode the pixels. Returns the upright RGB picture and the upright (width, height) in which it was sent."""
    sent = image.size
    if min_side is not None and image.format in ("JPEG", "MPO"):
        # draft keeps both sides at or above the requested ones, so request the shape scaled to the shorter side.
        scale = min_side / min(sent)
        image.draft(None, (max(1, round(sent[0] * scale)), max(1, round(sent[1] * scale))))
    for name in _XMP:
        image.info.pop(name, None)
    if image.format == "TIFF":
        # Pillow would unpack all of Exif and GPS after the pixels, whatever length they claim, except for animations.
        image.is_animated = True  # type: ignore[attr-defined]
        prepare_planes(image)
    deep, bits = is_deep_colour(image), declared_bits(image, png_bits)  # before any pixel is decoded
    orientation, profile = _orientation(image), image.info.get("icc_profile")
    channels = len(pages_to_read(data)) if image.format == "TIFF" else 1
    picture: Image.Image = image
    if channels > 1:
        picture = _merge(image, channels, notes)
    else:
        image.load()
    shrink = 1 if min_side is None else max(1, min(picture.size) // max(min_side, SHRINK_SIDE))
    if picture.mode.startswith("I"):
        picture, shrink = _to_8_bits(picture, image, shrink, bits, notes), 1
    elif deep:
        picture, bits = scale_deep_colour(image, data, bits)
        notes.append(note(bits))
    rgb = _to_rgb(picture, shrink, profile, notes)
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    return rgb, (sent[1], sent[0]) if orientation in (5, 6, 7, 8) else sent


def _merge(image: Image.Image, channels: int, notes: list[str]) -> Image.Image:
    """Decode the pages that are red, green and blue. Samples of more than 8 bits share one scale."""
    planes = []
    for page in range(channels):
        image.seek(page)
        _check_header(image)
        image.is_animated = True  # type: ignore[attr-defined]
        for name in _XMP:
            image.info.pop(name, None)
        image.load()
        planes.append(image.copy())
    modes = {plane.mode for plane in planes}
    if not modes <= {"L", "I;16", "I;16B", "I"} or len(modes) > 1 or len({plane.size for plane in planes}) > 1:
        raise InvalidImage("The pages of this TIFF are channels of different kinds. Save it as one RGB picture.")
    if modes != {"L"}:
        bits = sample_bits(max(_highest(plane) for plane in planes), declared_bits(image))
        notes.append(note(bits))
        planes = [Image.fromarray(grey_levels(np.asarray(plane.convert("I")), bits)) for plane in planes]
    notes.append("three pages merged into one colour picture")
    return Image.merge("RGB", planes)


def _highest(grey: Image.Image) -> int:
    """Return the largest of whole numbers. Raises InvalidImage for negative ones."""
    lowest, highest = grey.getextrema()
    if int(lowest) < 0:  # type: ignore[arg-type]
        raise InvalidImage("The image has negative values, whose brightness is undefined. Save it with 8 bits.")
    return int(highest)  # type: ignore[arg-type]


def _to_8_bits(picture: Image.Image, opened: Any, shrink: int, declared: int, notes: list[str]) -> Image.Image:
    """Scale 16-bit grey to 8 bits, at reduced scale."""
    bits = sample_bits(_highest(picture), declared)
    notes.append(note(bits))
    levels = grey_levels(np.asarray(picture.convert("I").reduce(shrink)), bits)
    white_is_zero = getattr(opened, "tag_v2", {}).get(262) == 0  # of a TIFF; Pillow respects it in 8 bits alone
    return Image.fromarray(255 - levels if white_is_zero else levels)


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 for upright."""
    if image.format == "TIFF":  # Pillow turns it upright itself and reports the upright size
        return 1
    if image.format == "PNG" and "exif" not in image.info:
        image.load()  # Exif may stand behind the pixels
    text = len(image.info.get("Raw profile type exif") or "") // 2  # ImageMagick's Exif, a text of hexadecimal digits
    if max(len(image.info.get("exif") or b""), text) > MAX_EXIF_BYTES:
        raise InvalidImage(f"The image has more than {MAX_EXIF_BYTES:,} bytes of Exif data. Save it without metadata.")
    value = image.getexif().get(0x0112, 1)
    return value if isinstance(value, int) else 1  # a value of the wrong type is ignored


def _to_rgb(image: Image.Image, shrink: int, profile: object, notes: list[str]) -> Image.Image:
    """Convert any mode to sRGB and divide each side by `shrink`, with at most two copies of the full size at a time."""
    if image.mode == "F":
        raise InvalidImage("Floating-point images have no defined brightness. Send 8 or 16 bits per channel.")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        if image.mode == "LA" and shrink > 1:  # while it has two channels
            image, shrink = image.reduce(shrink), 1
        image = image if image.mode == "RGBA" else image.convert("RGBA")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    if shrink > 1:
        image = image.reduce(shrink)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if isinstance(profile, bytes) and profile:
        image, outcome = to_srgb(image, profile)
        notes.extend([outcome] if outcome else [])
    return image if image.mode == "RGB" else image.convert("RGB")
