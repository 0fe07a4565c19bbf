"""Finds near-duplicates: the same photograph stored again under another name.

A copy may be resized, squashed, compressed again, brighter, paler, mirrored or turned by quarters. Another photograph
of the same lesion is no near-duplicate, and neither is a crop. Candidates come from a perceptual hash. Each is
confirmed by the fine detail of the skin, without the dark frame around it. `scripts/studies/near_duplicate_recall.py`
measures precision and recall; docs/lab-notes.md has the figures.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import cv2
import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import fft, ndimage

from handlers.decoding import decode, ignore_oddities
from handlers.errors import ImageError

# A candidate's hashes differ in at most this many bits.
HASH_RADIUS = 8
# The correlation of fine detail that confirms a candidate.
MIN_DETAIL_CORRELATION = 0.85
# Hashes of unrelated pictures differ in about half of the 64 bits; no re-encoding explains more than this.
UNRELATED_BITS = 20
# Mirrored or not, times four quarter turns.
ORIENTATIONS = 8

_THUMBNAIL = 64
_DETAIL_SIGMA = 2.0
_MIN_SHARED_SKIN = 0.15  # share of the thumbnail in which both pictures show skin
# Every eighth row and its neighbour: 16 of 64, which mirroring and turning map onto themselves.
_SPARSE = np.arange(_THUMBNAIL).reshape(-1, 8)[:, [0, 7]].ravel()
_MIN_SPARSE_CORRELATION = 0.5
_PARTS = [np.uint64(sum(1 << bit for bit in range(part, 64, 12))) for part in range(12)]
_KEYS = [a | b for third in range(3) for a, b in combinations(_PARTS[third::3], 2)]
_BLOCK = 1 << 16  # comparisons at a time, which stay in the processor's cache
_DARK = 0.35  # darker than this share of the bright parts, and connected to the border: the frame


@dataclass(frozen=True)
class ImageDigest:
    """The description of an image file: SHA-256, size, 64-bit perceptual hash, 64x64 uint8 grey thumbnail."""

    sha256: str
    width: int
    height: int
    phash: int
    thumbnail: NDArray[np.uint8]


def read_image(path: Path) -> ImageDigest | str:
    """Decode one file and describe it. Returns a sentence instead if the file is no usable image."""
    try:
        data = path.read_bytes()
        return describe(data) if data else "The file is empty."
    except ImageError as error:
        return str(error)
    except OSError as error:
        return f"The file cannot be read: {error.strerror or error}."


def describe(data: bytes) -> ImageDigest:
    """Decode a file's bytes and describe them. Raises ImageError."""
    # Hash and thumbnail need no more than twice the thumbnail's side.
    decoded = decode(data, min_side=2 * _THUMBNAIL)
    grey = decoded.image.convert("L").resize((_THUMBNAIL, _THUMBNAIL), Image.Resampling.BOX)
    phash = int.from_bytes(np.packbits(imagehash.phash(grey).hash).tobytes())
    return ImageDigest(decoded.sha256, decoded.width, decoded.height, phash, np.asarray(grey))


def read_images(
    paths: Sequence[Path],
    workers: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> list[ImageDigest | str]:
    """Describe every path, in order, on `workers` threads (default: one per core).

    Threads suffice: Pillow releases the interpreter lock while it decodes and resizes. `progress` is called with
    (done, total) after each image.
    """
    images = []
    ignore_oddities()
    with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
        for image in pool.map(read_image, paths):
            images.append(image)
            progress(len(images), len(paths))
    return images


def find_pairs(thumbnails: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Find all pairs (i < j) of thumbnails (N, 64, 64) that show the same photograph.

    Returns:
        pairs int64 (P, 2), sorted, and the correlation of their fine detail (P,).
    """
    hashes = _oriented_hashes(thumbnails)
    candidates = [candidate_pairs(hashes[:, 0], hashes[:, orientation]) for orientation in range(ORIENTATIONS)]
    # Most candidates are other photographs, and a sixteenth of the pixels tells them apart.
    sparse = _Details(thumbnails, candidates, _SPARSE)
    candidates = [
        pairs[sparse.correlations(pairs, orientation, _MIN_SHARED_SKIN / 3) >= _MIN_SPARSE_CORRELATION]
        for orientation, pairs in enumerate(candidates)
    ]
    details = _Details(thumbnails, candidates, np.arange(_THUMBNAIL))
    best: dict[tuple[int, int], float] = {}
    for orientation, pairs in enumerate(candidates):
        correlations = details.correlations(pairs, orientation, _MIN_SHARED_SKIN)
        certain = correlations >= MIN_DETAIL_CORRELATION
        for (i, j), correlation in zip(pairs[certain].tolist(), correlations[certain].tolist(), strict=True):
            best[i, j] = max(best.get((i, j), 0.0), correlation)
    order = sorted(best)
    return np.array(order, dtype=np.int64).reshape(-1, 2), np.array([best[pair] for pair in order], dtype=np.float32)


def candidate_pairs(first: NDArray[np.uint64], second: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Return all pairs (i < j) where first[i] and second[j] differ in at most HASH_RADIUS bits: int64 (P, 2), sorted.

    The 64 bits are dealt into 12 parts. Hashes that differ in 8 bits agree in 4 parts or more, and of any 4 parts, two
    lie in the same third of the 12. So only hashes that agree in two parts of a third are compared, which is exact.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pairs = list(pool.map(lambda key: _agreeing_pairs(first, second, key), _KEYS))
    return np.stack(np.divmod(np.unique(np.concatenate(pairs)), max(1, len(second))), axis=1)


def _agreeing_pairs(first: NDArray[np.uint64], second: NDArray[np.uint64], key: np.uint64) -> NDArray[np.int64]:
    """Return pairs within the radius whose bits under `key` are the same, as i * len(second) + j."""
    rows, columns = np.argsort(first & key), np.argsort(second & key)
    _, starts, sizes = np.unique((first & key)[rows], return_index=True, return_counts=True)
    sorted_keys, pairs = (second & key)[columns], [np.empty(0, dtype=np.int64)]
    lows = np.searchsorted(sorted_keys, (first & key)[rows[starts]], "left")
    highs = np.searchsorted(sorted_keys, (first & key)[rows[starts]], "right")
    for start, size, low, high in zip(starts, sizes, lows, highs, strict=True):
        right = columns[low:high]
        for left in _blocks(size, max(1, _BLOCK // max(1, len(right)))):
            members = rows[start : start + size][left]
            i, j = np.nonzero(np.bitwise_count(first[members, None] ^ second[None, right]) <= HASH_RADIUS)
            later = members[i] < right[j]
            pairs.append(members[i[later]] * len(second) + right[j[later]])
    return np.concatenate(pairs)


def orient(pictures: NDArray[np.generic], orientation: int) -> NDArray[np.generic]:
    """Mirror and turn square pictures (..., S, S): orientations 4 to 7 mirror, then 0 to 3 quarter turns follow."""
    mirrored = pictures[..., ::-1] if orientation >= 4 else pictures
    return np.rot90(mirrored, orientation % 4, axes=(-2, -1))


def _oriented_hashes(thumbnails: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """Return the perceptual hashes of all orientations of each thumbnail: uint64 (N, 8).

    The hash of Zauner (2010): which of the 8x8 lowest frequencies of the cosine transform lie above their median.
    """
    half = _THUMBNAIL // 2
    hashes = np.empty((len(thumbnails), ORIENTATIONS), dtype=np.uint64)
    for rows in _blocks(len(thumbnails)):
        small = thumbnails[rows].reshape(-1, half, 2, half, 2).mean(axis=(2, 4), dtype=np.float32)
        for orientation in range(ORIENTATIONS):
            low = fft.dctn(orient(small, orientation), axes=(1, 2))[:, :8, :8].reshape(-1, 64)
            bits = np.packbits(low > np.median(low, axis=1, keepdims=True), axis=1)
            hashes[rows, orientation] = bits.view(">u8").astype(np.uint64)[:, 0]
    return hashes


class _Details:
    """The fine detail of thumbnails: what a Gaussian blur of the skin leaves, NaN in the dark frame.

    Without the frame, because dark round frames of one camera are alike to any measure of the whole picture.
    """

    def __init__(
        self, thumbnails: NDArray[np.uint8], candidates: list[NDArray[np.int64]], places: NDArray[np.int64]
    ) -> None:
        """Compute the details of all images in the candidates, at some rows and the same columns."""
        indices = np.unique(np.concatenate(candidates))
        self.row = np.full(len(thumbnails), -1)
        self.row[indices] = np.arange(len(indices))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            details = list(pool.map(lambda index: _detail(thumbnails[index])[np.ix_(places, places)], indices))
        self.values = np.stack(details) if details else np.empty((0, len(places), len(places)), np.float16)

    def correlations(self, pairs: NDArray[np.int64], orientation: int, least_shared: float) -> NDArray[np.float32]:
        """Return the correlation of each pair's details, the second picture oriented: (P,).

        It is -1 for pairs that share less than this share of the pixels.
        """
        correlations = np.zeros(len(pairs), dtype=np.float32)
        for rows in _blocks(len(pairs)):
            first = self.values[self.row[pairs[rows, 0]]].astype(np.float32)
            second = orient(self.values[self.row[pairs[rows, 1]]], orientation).astype(np.float32)
            correlations[rows] = _correlation(first, second, least_shared)
        return correlations


def _detail(grey: NDArray[np.uint8]) -> NDArray[np.float16]:
    dark = np.pad(grey < _DARK * np.percentile(grey, 90), 1, constant_values=True)
    regions, _ = ndimage.label(dark)
    skin = (regions != regions[0, 0])[1:-1, 1:-1].astype(np.uint8)
    skin = cv2.erode(skin, np.ones((5, 5), np.uint8), borderType=cv2.BORDER_CONSTANT, borderValue=1)
    weight = skin.astype(np.float32)
    blurred = cv2.GaussianBlur(grey * weight, (0, 0), _DETAIL_SIGMA) / np.maximum(
        cv2.GaussianBlur(weight, (0, 0), _DETAIL_SIGMA), 1e-3
    )
    return np.where(skin, grey - blurred, np.nan).astype(np.float16)


def _correlation(first: NDArray[np.float32], second: NDArray[np.float32], least_shared: float) -> NDArray[np.float32]:
    """Return Pearson's correlation of two batches of detail (P, S, S) over the skin that both show: (P,)."""
    shared = ~(np.isnan(first) | np.isnan(second))
    count = shared.sum(axis=(1, 2))
    x, y = (np.where(shared, values, 0).reshape(len(first), -1) for values in (first, second))
    n = np.maximum(count, 1)
    mean_x, mean_y = x.sum(axis=1) / n, y.sum(axis=1) / n
    covariance = np.einsum("ij,ij->i", x, y) / n - mean_x * mean_y
    variances = (np.einsum("ij,ij->i", x, x) / n - mean_x**2) * (np.einsum("ij,ij->i", y, y) / n - mean_y**2)
    correlation = covariance / np.sqrt(np.maximum(variances, 1e-6))
    return np.where(count >= least_shared * first[0].size, correlation, -1.0)


def _blocks(size: int, length: int = 1024) -> Iterator[slice]:
    return (slice(start, start + length) for start in range(0, size, length))


def hash_text(phash: int) -> str:
    """Return the hash as the manifest writes it: 16 hexadecimal digits."""
    return f"{phash:016x}"
