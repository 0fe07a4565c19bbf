"""Uploaded pictures for display: decoded, upright, small, as JPEG within the page."""

import base64
import io
import logging
import warnings

import numpy as np
from PIL import Image, ImageOps

log = logging.getLogger(__name__)

DISPLAY_SIDE = 1000  # pixels; sharp in half of a wide window
THUMBNAIL_SIDE = 96  # pixels
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 50_000_000  # as the model server; read from the header before any pixel is decoded


def open_picture(data: bytes) -> Image.Image | None:
    """Return the upright RGB picture, at most DISPLAY_SIDE pixels long, or None if it cannot be shown.

    Only for bytes that the model server has accepted: its limits come first, these are the second line.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about odd but harmless metadata
        try:
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    return None
                for name in ("xmp", "XML:com.adobe.xmp"):  # an orientation there is ignored, as by the model server
                    opened.info.pop(name, None)
                opened.draft("RGB", (DISPLAY_SIDE, DISPLAY_SIDE))
                picture = ImageOps.exif_transpose(opened)
                if picture.mode.startswith("I"):  # 16-bit grey
                    picture = Image.fromarray((np.clip(np.asarray(picture), 0, 65535) // 257).astype(np.uint8))
                picture.thumbnail((DISPLAY_SIDE, DISPLAY_SIDE))
                if "A" in picture.mode or "transparency" in picture.info:
                    picture = picture.convert("RGBA")
                    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
                return picture.convert("RGB")
        except Exception:  # Pillow's decoders report damage with any exception
            log.info("The page cannot show a picture that the model server accepted.", exc_info=True)
            return None


def data_url(picture: Image.Image) -> str:
    """Return the picture as a JPEG within an address."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def thumbnail(picture: Image.Image) -> str:
    """Return a small copy as an address."""
    small = picture.copy()
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE))
    return data_url(small)
