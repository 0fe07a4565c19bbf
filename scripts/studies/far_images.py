"""Far unknowns: seven kinds of pictures that show no lesion at all.

They are easy to separate from lesions, so a good figure on them proves little, and a bad one is alarming. They are
drawn, or cut out of photographs in scikit-learn and matplotlib and out of the corners of dermoscopy images.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib.cbook import get_sample_data
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

SIDE = 192  # pixels
Pixels = NDArray[np.uint8]  # (SIDE, SIDE, 3), RGB
WORDS = ("Patient", "history", "of", "dermatitis", "since", "2019", "refer", "to", "clinic", "Total", "12.50", "mg")


def far_images(count: int, corners: Sequence[str | Path] = ()) -> dict[str, list[Pixels]]:
    """Return `count` pictures of each kind; the same arguments give the same pictures.

    Args:
        corners: dermoscopy images whose corners give the kind "skin"; without them, the kind is left out.
    """
    rng = np.random.default_rng(0)
    kinds: dict[str, Callable[[np.random.Generator], Pixels]] = {
        "photographs": _photograph,
        "textures": _texture,
        "documents": _document,
        "noise": lambda r: r.integers(0, 256, (SIDE, SIDE, 3), np.uint8),
        "stained tissue": _tissue,
        "scans": _scan,
    }
    pictures = {name: [draw(rng) for _ in range(count)] for name, draw in kinds.items()}
    if len(corners):
        chosen = rng.choice(len(corners), count, replace=len(corners) < count)
        pictures["skin"] = [_corner(Path(corners[i])) for i in chosen]
    return pictures


def _photograph(rng: np.random.Generator) -> Pixels:
    with Image.open(str(get_sample_data("grace_hopper.jpg", asfileobj=False))) as portrait:
        photographs = [*load_sample_images().images, np.asarray(portrait.convert("RGB"))]
    picture = photographs[rng.integers(len(photographs))]
    side = int(rng.uniform(0.3, 0.9) * min(picture.shape[:2]))
    y, x = (int(rng.integers(length - side + 1)) for length in picture.shape[:2])
    return _fit(picture[y : y + side, x : x + side])


def _texture(rng: np.random.Generator) -> Pixels:
    """Draw stripes or checks in two colours, warped by noise."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    angle, waves = rng.uniform(0, np.pi), rng.uniform(3, 20)
    bend = 0.15 * _noise(rng, 4)
    first = np.sin(2 * np.pi * waves * (x * np.cos(angle) + y * np.sin(angle) + bend))
    second = np.sin(2 * np.pi * waves * (y * np.cos(angle) - x * np.sin(angle))) if rng.random() < 0.5 else 1.0
    return _blend(rng, 0.5 + 0.5 * first * second)


def _document(rng: np.random.Generator) -> Pixels:
    page = np.full((SIDE, SIDE, 3), rng.integers(225, 256), np.uint8)
    for y in range(14, SIDE, int(rng.integers(12, 20))):
        line = " ".join(rng.choice(WORDS, 5))
        cv2.putText(page, line, (8, y), cv2.FONT_HERSHEY_SIMPLEX, 0.32, (25, 25, 35), 1, cv2.LINE_AA)
    return page


def _tissue(rng: np.random.Generator) -> Pixels:
    """Draw tissue like a haematoxylin and eosin stain: pink with many small violet nuclei."""
    page = np.asarray((235, 180, 205) - 60 * _noise(rng, 10)[..., None], np.float32).clip(0, 255).astype(np.uint8)
    for x, y in rng.integers(0, SIDE, (int(rng.integers(150, 500)), 2)):
        axes = (int(rng.integers(2, 5)), int(rng.integers(2, 4)))
        cv2.ellipse(page, (int(x), int(y)), axes, int(rng.integers(180)), 0, 360, (95, 55, 130), -1, cv2.LINE_AA)
    return page


def _scan(rng: np.random.Generator) -> Pixels:
    """Draw a grey round slice, like tomography."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE - 0.5
    radius = np.hypot(x * rng.uniform(0.9, 1.3), y)
    body = (radius < 0.42) * (0.35 + 0.5 * _noise(rng, 6)) + 0.6 * (np.abs(radius - 0.42) < 0.02)
    return np.repeat((body.clip(0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)


def _corner(path: Path) -> Pixels:
    """Cut the upper left sixteenth out of a dermoscopy image: mostly bare skin."""
    with Image.open(path) as image:
        return _fit(np.asarray(image.convert("RGB").crop((0, 0, image.width // 4, image.height // 4))))


def _fit(picture: Pixels) -> Pixels:
    return np.asarray(cv2.resize(picture, (SIDE, SIDE), interpolation=cv2.INTER_AREA), np.uint8)


def _noise(rng: np.random.Generator, cells: int) -> NDArray[np.float64]:
    """Return smooth noise in [0, 1]."""
    field = cv2.resize(rng.random((cells, cells)), (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    return np.asarray(field.clip(0, 1), np.float64)


def _blend(rng: np.random.Generator, share: NDArray[np.float64]) -> Pixels:
    first, second = rng.integers(0, 256, (2, 3))
    return np.asarray(first + (second - first) * share[..., None]).clip(0, 255).astype(np.uint8)
