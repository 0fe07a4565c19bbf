"""The heatmap: its colours, and the picture under them."""

from collections.abc import Sequence

import numpy as np
import plotly.colors
from PIL import Image

# Evenly rising lightness; skin has none of its greens and blues.
COLOURS: list[str] = plotly.colors.sequential.Viridis
DEFAULT_OPACITY = 0.6
CLEAR, FULL = 0.08, 0.58  # heat up to which the picture stays clear, and from which the colour has its full opacity


def overlay(picture: Image.Image, grid: Sequence[Sequence[float]], opacity: float) -> Image.Image:
    """Return the picture under a Grad-CAM grid of values in [0, 1].

    The model saw the whole picture squashed to a square, so the grid covers all of it. The opacity rises smoothly with
    the heat, up to `opacity` (0 to 1).
    """
    coarse = Image.fromarray(np.asarray(grid, np.float32))
    heat = np.clip(np.asarray(coarse.resize(picture.size, Image.Resampling.BICUBIC)), 0, 1)
    stops = np.array([plotly.colors.hex_to_rgb(colour) for colour in COLOURS])
    palette = np.stack([np.interp(np.arange(256), np.linspace(0, 255, len(stops)), c) for c in stops.T], 1)
    ramp = np.clip((heat - CLEAR) / (FULL - CLEAR), 0, 1)
    alpha = (opacity * ramp * ramp * (3 - 2 * ramp))[..., None]  # smoothstep
    pixels = np.asarray(picture, np.float32)
    blended = pixels + (palette[(heat * 255).astype(np.uint8)] - pixels) * alpha
    return Image.fromarray(blended.round().astype(np.uint8))
