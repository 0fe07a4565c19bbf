"""Exact and near duplicates among images: candidates by perceptual hash, confirmed by pixels.

A near duplicate is the same photograph stored again: at another size, squashed to another shape, compressed again,
brighter or paler. Another photograph of the same lesion is not one (lesion ids join those), nor is a crop, a mirrored
or a turned copy.

Measured on the 8,507 HAM10000 images at 200x150 and 2,024 ISIC archive images squashed to 180x180 that this project
was developed with, at the limits below:

- 1,233 pairs of files with the same ISIC identifier, one from each set: all found. Hashes differ in 4 bits at most, the
  coarse difference is 0.099 at most (99 % below 0.073), the detail correlation 0.86 at least (99 % above 0.91).
- 500 images changed in one way each: JPEG quality 50, doubled size, 64x64 squares, brightness x0.8, contrast x1.2 and
  saturation x0.5 all found; halved and compressed to quality 85: 99.4 %; quality 30: 98.6 %; trimmed by 3 % at each
  side: 0.2 %; mirrored: none.
- 47.4 million pairs of images of different lesions: 4,468 candidates, of which 1 confirmed, and that one is the same
  photograph with other colours. Without the detail correlation 4 would be; with its limit at 0.80, 2; at 0.75, 3.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import imagehash
import numpy as np
from PIL import Image

from handlers.decoding import MAX_BYTES, decode, ignore_oddities
from handlers.errors import ImageError

# Limits on a pair: bits by which the hashes differ, and two measures that `confirm` explains.
HASH_RADIUS = 8
MAX_COARSE_DIFFERENCE = 0.12
MIN_DETAIL_CORRELATION = 0.83
# Two hashes of unrelated pictures differ in about half of the 64 bits; beyond this no re-encoding explains it.
UNRELATED_BITS = 20

_THUMBNAIL = 64
_DETAIL_SIGMA = 2.0


@dataclass(frozen=True)
class ImageDigest:
    """What is kept of one image file: its digest, size, 64-bit perceptual hash and a 64x64 uint8 grey thumbnail."""

    sha256: str
    width: int
    height: int
    phash: int
    thumbnail: np.ndarray


def read_image(path: Path) -> ImageDigest | str:
    """Decode one file wholly and describe it; a sentence instead if it is no usable image."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)  # one byte too many is refused without reading the rest
        if not data:  # `decode` would speak of a request
            return "The file is empty."
        # Hash and thumbnail need no more than twice the thumbnail's side.
        decoded = decode(data, min_side=2 * _THUMBNAIL)
    except ImageError as error:
        return str(error)
    except OSError as error:
        return f"The file cannot be read: {error.strerror or error}."
    grey = decoded.image.convert("L").resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    phash = int.from_bytes(np.packbits(imagehash.phash(grey).hash).tobytes())
    return ImageDigest(decoded.sha256, decoded.width, decoded.height, phash, np.asarray(grey))


def read_images(
    paths: Sequence[Path],
    workers: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[ImageDigest | str]:
    """`read_image` of every path, in order, on `workers` threads (default: one a core).

    `progress` is called with (done, total) after each.

    Threads, not processes: decoding, resizing and digests let go of Python's lock and are most of the work for
    pictures of usual size; nothing has to start or be sent across, and Ctrl-C ends them at once.
    """
    images = []
    ignore_oddities()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for image in pool.map(read_image, paths):
            images.append(image)
            progress(len(images), len(paths))
    return images


def candidate_pairs(hashes: np.ndarray, radius: int = HASH_RADIUS) -> np.ndarray:
    """All pairs (i < j) of uint64 hashes that differ in at most `radius` bits: int64 (P, 2), sorted.

    Compares all with all in blocks by population count: exact for every radius, and 25,000 images (3e8 pairs) take
    about three seconds, so no index structure is needed.
    """
    found = []
    for start in range(0, len(hashes), 1024):
        block = hashes[start : start + 1024, None] ^ hashes[None, start:]
        i, j = np.nonzero(np.bitwise_count(block) <= radius)
        later = i < j
        found.append(np.stack([i[later], j[later]], axis=1) + start)
    return np.concatenate(found) if found else np.empty((0, 2), dtype=np.int64)


def confirm(thumbnails: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Which candidate pairs (P, 2) show the same photograph, by their thumbnails uint8 (N, 64, 64): bool (P,).

    Both must hold: the mean absolute difference of the 32x32 means, each picture brought to zero mean and unit
    deviation, is at most MAX_COARSE_DIFFERENCE; and what is left after subtracting a Gaussian blur correlates by at
    least MIN_DETAIL_CORRELATION. The second is needed since many dermoscopy pictures are one dark spot in the middle
    of the same round vignette, and alike to any coarse measure.
    """
    same = np.zeros(len(pairs), dtype=bool)
    for start in range(0, len(pairs), 2048):
        first, second = (thumbnails[side].astype(np.float32) for side in pairs[start : start + 2048].T)
        difference = np.abs(_coarse(first) - _coarse(second)).mean(axis=1)
        correlation = (_detail(first) * _detail(second)).sum(axis=1)
        identical = (first == second).all(axis=(1, 2))
        same[start : start + 2048] = identical | (
            (difference <= MAX_COARSE_DIFFERENCE) & (correlation >= MIN_DETAIL_CORRELATION)
        )
    return same


def _coarse(grey: np.ndarray) -> np.ndarray:
    half = _THUMBNAIL // 2
    means = grey.reshape(len(grey), half, 2, half, 2).mean(axis=(2, 4)).reshape(len(grey), -1)
    centred = means - means.mean(axis=1, keepdims=True)
    # One grey level: a flat picture's noise is not stretched to full contrast.
    return centred / np.maximum(centred.std(axis=1, keepdims=True), 1.0)


def _detail(grey: np.ndarray) -> np.ndarray:
    fine = np.stack([picture - cv2.GaussianBlur(picture, (0, 0), _DETAIL_SIGMA) for picture in grey])
    fine = fine.reshape(len(grey), -1)
    fine -= fine.mean(axis=1, keepdims=True)
    return fine / np.maximum(np.linalg.norm(fine, axis=1, keepdims=True), 1e-6)


def hash_text(phash: int) -> str:
    """The hash as it stands in the manifest: 16 hexadecimal digits."""
    return f"{phash:016x}"
