"""The overlay: the Grad-CAM heatmap drawn over the picture, as a PNG."""

import numpy as np
from PIL import Image

OVERLAY_SIDE = 640  # pixels, the longer side: enough for a page, and quick to encode
OVERLAY_MIN_SIDE = OVERLAY_SIDE * 3 // 4  # the shorter side to decode for it: cameras' 4:3
OPACITY = 0.6  # where the map is 1; where it is 0 the skin stays as it is


def overlay(image: Image.Image, grid: np.ndarray) -> bytes:
    """Draw a grid (h, w) in [0, 1] over an RGB picture. Returns a PNG of at most OVERLAY_SIDE pixels a side."""
    import cv2

    picture = image.copy()
    picture.thumbnail((OVERLAY_SIDE, OVERLAY_SIDE))
    pixels = np.ascontiguousarray(np.asarray(picture)[:, :, ::-1])
    heat = cv2.resize(grid.astype(np.float32), picture.size, interpolation=cv2.INTER_CUBIC).clip(0, 1)
    colours = cv2.applyColorMap((heat * 255).astype(np.uint8), cv2.COLORMAP_INFERNO)
    alpha = OPACITY * heat
    return cv2.imencode(".png", cv2.blendLinear(pixels, colours, 1 - alpha, alpha))[1].tobytes()
