"""Bytes to a checked RGB image to the network's input. Every limit on untrusted image bytes is here.

Training, evaluation and serving all go through this module, so a model sees the same pixels everywhere.
"""

import hashlib
import io
import threading
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from handlers.errors import UserError
from handlers.file_limits import JPEG, MAX_PIXELS, PNG, TIFF, excess

# Pillow's decoders that are reachable from untrusted bytes. JPEG includes MPO, the multi-picture JPEG of phones.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")
# Dermoscopes and phones write 1 to 15 MB; this leaves room and still bounds what one request can cost.
MAX_BYTES = 20 * 1024 * 1024
MIN_SIDE = 16
# A lesion photo is at most a panorama; beyond this the squashed input no longer resembles a lesion.
MAX_ASPECT_RATIO = 8.0

# Exif has 64 KB in most files, and Pillow unpacks whatever length a tag claims.
MAX_EXIF_BYTES = 1 << 20
# Pillow holds three canvases of a WebP, 16 bytes a pixel, and libwebp tables of its own; so it has half the pixels of
# others, and but for small ones it is decoded alone.
MAX_WEBP_PIXELS, ALONE_PIXELS = 25_000_000, 262_144
# A picture whose shorter side (pixels) is twice this or more is shrunk by whole boxes as soon as it is decoded, down to
# this at least: eight of 50 megapixels in one batch would hold 1.6 GB until they are answered.
SHRINK_SIDE = 512

_SIGNATURES = (JPEG, PNG, b"BM", *TIFF)
_RUN_LENGTHS = (1, 2)  # compressions of a BMP that Pillow decodes in Python, a pixel at a time
_alone = threading.Lock()
# What makes a picture with this EXIF orientation upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SUPPORTED = "JPEG, PNG, WebP, BMP or TIFF"


class ImageError(UserError):
    """A refused image: `status` is the HTTP status (400, 413 or 415; 500 where the model failed), `code` a stable word
    for programs."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


@dataclass(frozen=True)
class DecodedImage:
    """An upright RGB picture, possibly decoded at reduced scale, with the size (pixels) it was sent in."""

    image: Image.Image
    width: int
    height: int
    sha256: str


def decode(data: bytes, min_side: int | None = None) -> DecodedImage:
    """Decode untrusted bytes to an upright RGB image.

    The format is told from the first bytes, never from a name; size and shape are checked on the header, before any
    pixel is decoded. EXIF orientation is applied; transparency is laid on white; 16-bit grey is scaled to 8 bits; of a
    TIFF the first page is taken.

    Args:
        data: the file as received.
        min_side: if given, a JPEG may be decoded at 1/2, 1/4 or 1/8 scale as long as its shorter side stays at least
            this many pixels (several times faster for camera pictures), and other pictures shrink to SHRINK_SIDE.

    Raises:
        ImageError: 413 for too many bytes or pixels, 415 for another kind of file, 400 for a damaged or unusable one.
    """
    if not data:
        raise ImageError(400, "empty_image", "The request holds no image; send the bytes of one picture.")
    if len(data) > MAX_BYTES:
        raise ImageError(
            413, "image_too_large", f"The image has {len(data):,} bytes; the limit is {MAX_BYTES:,} bytes."
        )
    if not (data.startswith(_SIGNATURES) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")):
        raise ImageError(415, "unsupported_media_type", f"This is not a {_SUPPORTED} image.")
    if more := excess(data):
        message = f"The file has more than {more}, which no camera writes; save the image anew and send that."
        raise ImageError(400, "invalid_image", message)

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            _check_header(opened)
            large = opened.format == "WEBP" and opened.width * opened.height > ALONE_PIXELS
            with _alone if large else nullcontext():
                image, size = _load(opened, min_side)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(413, "image_too_large", f"The image has more than {MAX_PIXELS:,} pixels.") from error
    except UnidentifiedImageError as error:
        raise ImageError(400, "invalid_image", f"The file begins like a {_SUPPORTED} image but is none.") from error
    # Pillow's decoders report damage with whatever they stumble on; to the sender it is all one thing.
    except Exception as error:
        raise ImageError(400, "invalid_image", "The image is damaged or cut off and cannot be decoded.") from error
    return DecodedImage(image, *size, hashlib.sha256(data).hexdigest())


def ignore_oddities() -> None:
    """Keep Pillow's warnings of harmless oddities in EXIF and TIFF tags out of the log, in this process from now on.

    Not around each picture: several are decoded at a time, and Python's list of filters is one for all threads.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")


def _check_header(image: Image.Image) -> None:
    width, height = image.size
    most = MAX_WEBP_PIXELS if image.format == "WEBP" else MAX_PIXELS
    if width * height > most:
        message = f"The image has {width}×{height} pixels; the limit is {most:,} in all."
        raise ImageError(413, "image_too_large", message)
    if min(width, height) < MIN_SIDE:
        raise ImageError(
            400, "image_too_small", f"The image is {width}×{height}; each side needs {MIN_SIDE} pixels or more."
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ImageError(
            400,
            "unusual_shape",
            f"The image is {width}×{height}; one side may be {MAX_ASPECT_RATIO:g} times the other at most.",
        )
    if image.format == "TIFF" and _area(image) > width * height:
        raise ImageError(400, "invalid_image", "The strips or tiles of the TIFF lie over each other; save it anew.")
    if image.format == "BMP" and image.info.get("compression") in _RUN_LENGTHS:
        raise ImageError(400, "invalid_image", "The BMP is compressed by run lengths; save it as PNG and send that.")
    if image.format in ("PNG", "WEBP") and getattr(image, "n_frames", 1) > 1:
        raise ImageError(400, "animated_image", "The image is an animation; send one still picture.")


def _area(image: Any) -> int:
    """The pixels of all strips or tiles of a TIFF, of each of its layers where these stand by themselves."""
    samples, separate = image.tag_v2.get(277, 1), image.tag_v2.get(284, 1) == 2
    places = (tile[1] for tile in image.tile)
    return sum((right - left) * (low - top) for left, top, right, low in places) // (samples if separate else 1)


def _load(image: Image.Image, min_side: int | None) -> tuple[Image.Image, tuple[int, int]]:
    """Decode the pixels. Returns the upright RGB picture and the (width, height) it was sent in, upright."""
    sent = image.size
    if min_side is not None and image.format in ("JPEG", "MPO"):
        # draft keeps both sides at or above the asked ones, so ask for the shape scaled to the shorter side.
        scale = min_side / min(sent)
        image.draft(None, (max(1, round(sent[0] * scale)), max(1, round(sent[1] * scale))))
    if image.format == "TIFF":
        # Pillow would unpack all of Exif and GPS after the pixels, whatever length they claim, but for a file of pages.
        image.is_animated = True  # type: ignore[attr-defined]
    orientation = _orientation(image)
    image.load()
    shrink = 1 if min_side is None else max(1, min(image.size) // max(min_side, SHRINK_SIDE))
    rgb = _to_rgb(image, shrink)
    if orientation in _UPRIGHT:
        rgb = rgb.transpose(_UPRIGHT[orientation])
    return rgb, (sent[1], sent[0]) if orientation in (5, 6, 7, 8) else sent


def _orientation(image: Image.Image) -> int:
    """What its Exif says of how the camera was held; 1 for upright."""
    if image.format == "TIFF":  # Pillow turns it upright itself, and tells the upright size from the beginning
        return 1
    if image.format == "PNG" and "exif" not in image.info:
        image.load()  # what stands behind the pixels may say it too
    written = len(image.info.get("Raw profile type exif") or "") // 2  # ImageMagick's, a text of hexadecimal digits
    if max(len(image.info.get("exif") or b""), written) > MAX_EXIF_BYTES:
        raise ImageError(400, "invalid_image", f"The Exif data are over {MAX_EXIF_BYTES:,} bytes; leave them out.")
    value = image.getexif().get(0x0112, 1)
    return value if isinstance(value, int) else 1  # of a type that it should not have, it says nothing


def _to_rgb(image: Image.Image, shrink: int) -> Image.Image:
    """RGB out of any mode, each side divided by `shrink`; of the full size there are two copies at a time at most."""
    if image.mode.startswith("I"):  # 16-bit grey
        grey = image.convert("I").reduce(shrink)
        levels = (np.clip(np.asarray(grey), 0, 65535) // 257).astype(np.uint8)
        white_is_zero = getattr(image, "tag_v2", {}).get(262) == 0  # a TIFF's, which Pillow heeds in 8 bits alone
        image, shrink = Image.fromarray(255 - levels if white_is_zero else levels), 1
    elif image.mode == "F":
        raise ImageError(400, "invalid_image", "Floating-point images have no defined brightness; send 8 or 16 bits.")
    elif image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        if image.mode == "LA" and shrink > 1:  # while it has two channels
            image, shrink = image.reduce(shrink), 1
        image = image if image.mode == "RGBA" else image.convert("RGBA")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if shrink > 1:
        image = image.reduce(shrink)
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


@dataclass(frozen=True)
class Preprocessing:
    """How an upright RGB picture becomes a network's input; travels in the bundle.

    The whole picture is resized to a square of `image_size` pixels, not cropped, so that the Grad-CAM grid covers
    exactly the picture that was sent. `mean` and `std` are per channel for values in [0, 1]; the defaults are
    ImageNet's, which timm's pretrained backbones expect.
    """

    image_size: int
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"

    def resize(self, image: Image.Image) -> np.ndarray:
        """Resize an RGB picture with antialiasing: uint8 array (image_size, image_size, 3)."""
        filter_ = Image.Resampling[self.interpolation.upper()]
        # reducing_gap shrinks by whole boxes first, down to three times the target: same look, much faster.
        return np.asarray(image.resize((self.image_size, self.image_size), filter_, reducing_gap=3.0))

    @property
    def standardisation(self) -> tuple[list[float], list[float]]:
        """Scale and offset per channel: (x / 255 - mean) / std of a uint8 x is x * scale + offset.

        Applied where the pixels are needed as floats: in the serving graph, and on the training device.
        """
        scale = [1 / (255 * std) for std in self.std]
        return scale, [-mean / std for mean, std in zip(self.mean, self.std, strict=True)]

    def __call__(self, data: bytes) -> tuple[np.ndarray, DecodedImage]:
        """Decode, resize: uint8 (S, S, 3) and the decoded picture. Raises ImageError."""
        # What a JPEG decoder shrinks, it shrinks with antialiasing: the resize has the rest to do.
        decoded = decode(data, min_side=self.image_size)
        return self.resize(decoded.image), decoded

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as kept in bundle.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Preprocessing":
        """The inverse of to_dict."""
        return cls(**{**values, "mean": tuple(values["mean"]), "std": tuple(values["std"])})


def fingerprint(pixels: np.ndarray, cells: int = 4) -> np.ndarray:
    """What a network's input looks like, coarsely: the mean colour of each cell of a grid.

    Pixels uint8 (S, S, 3) to float (cells, cells, 3) in levels from 0 to 255. Training keeps it for the golden pictures
    and promotion compares: another interpolation, channel order or crop shows; another version of a decoder does not.
    """
    edges = np.linspace(0, len(pixels), cells + 1).astype(int)
    sums = np.add.reduceat(np.add.reduceat(pixels.astype(float), edges[:-1], 0), edges[:-1], 1)
    return np.asarray(sums / np.outer(np.diff(edges), np.diff(edges))[:, :, None])
