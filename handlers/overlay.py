"""Pictures in an answer: the decoded picture as a JPEG, and the Grad-CAM heatmap drawn over it as a PNG."""

import numpy as np
from PIL import Image

SHOWN_SIDE = 640  # pixels, the longer side: enough for a page, and quick to encode
SHOWN_MIN_SIDE = SHOWN_SIDE * 3 // 4  # the shorter side to decode for it: cameras' 4:3
JPEG_QUALITY = 90
OPACITY = 0.6  # where the map is 1; where it is 0 the skin stays as it is


def overlay(image: Image.Image, grid: np.ndarray) -> bytes:
    """Draw a grid (h, w) in [0, 1] over an RGB picture. Returns a PNG of at most SHOWN_SIDE pixels a side."""
    import cv2

    pixels = _small(image)
    size = (pixels.shape[1], pixels.shape[0])
    heat = cv2.resize(grid.astype(np.float32), size, interpolation=cv2.INTER_CUBIC).clip(0, 1)
    colours = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    alpha = OPACITY * heat
    return cv2.imencode(".png", cv2.blendLinear(pixels, colours, 1 - alpha, alpha))[1].tobytes()


def picture_jpeg(image: Image.Image) -> bytes:
    """Encode an RGB picture, without any metadata. Returns a JPEG of at most SHOWN_SIDE pixels a side."""
    import cv2

    return cv2.imencode(".jpg", _small(image), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1].tobytes()


def _small(image: Image.Image) -> np.ndarray:
    """Return a copy of at most SHOWN_SIDE pixels a side, with the channels in OpenCV's order."""
    picture = image.copy()
    picture.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    return np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])
