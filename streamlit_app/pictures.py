"""Pictures for display, as the model server decoded them: within the page, and small in its table."""

import base64
import io

from PIL import Image

THUMBNAIL_SIDE = 96  # pixels


def open_picture(jpeg: bytes) -> Image.Image | None:
    """Return the RGB picture in an answer, or None if the model server sent none."""
    try:
        with Image.open(io.BytesIO(jpeg), formats=("JPEG",)) as opened:
            return opened.convert("RGB")
    except OSError:
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
