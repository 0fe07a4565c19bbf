"""Corrections as rows of a manifest: a source of its own, kept apart from the pictures that are there already."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from handlers.receipt import COPY_RADIUS, CORRECTION
from training.data.data_sets import CORRECTIONS
from training.data.near_duplicates import hash_text, read_images

# Of the pictures that may train a model. A quarter calibrates it, so that its promises hold for them.
SHARES = {"train": 0.6, "val": 0.15, "calibration": 0.25}


class CorrectedPicture(NamedTuple):
    """A corrected picture: its kept copy, the SHA-256 of the upload, its class, and whether it is for testing only."""

    path: Path
    sha256: str
    label: str
    is_random: bool


def with_corrections(
    frame: pd.DataFrame,
    pictures: Sequence[CorrectedPicture],
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> tuple[pd.DataFrame, Counter[str]]:
    """Return a manifest with corrections added, and how many were left out, by reason.

    A picture's split depends on its hash alone, so that later corrections move none of the earlier; random ones are for
    testing. A copy or near-duplicate joins the lesion and the split of the earlier picture. If that is not for testing,
    a random one is left out.

    Args:
        frame: from training.data.manifest.read_manifest.
        pictures: the earliest correction first.
        progress: called with (done, total) as pictures are read.
    """
    hashes = [np.uint64(int(phash, 16)) for phash in frame["phash"]]
    lesions, splits = frame["lesion_id"].tolist(), frame["split"].tolist()
    rows, left_out = [], Counter[str]()
    images = read_images([picture.path for picture in pictures], progress=progress)
    for picture, image in zip(pictures, images, strict=True):
        if isinstance(image, str):
            left_out["have a file that cannot be read"] += 1
            continue
        split = "test" if picture.is_random else correction_split(picture.sha256)
        lesion = f"{CORRECTION}{picture.sha256[:16]}"
        near = np.flatnonzero(np.bitwise_count(np.array(hashes, np.uint64) ^ np.uint64(image.phash)) <= COPY_RADIUS)
        if len(near):
            first = int(near[0])
            lesion, split = lesions[first], splits[first]
            if picture.is_random and split != "test":
                left_out["are for testing, but a copy is in training"] += 1
                continue
        hashes.append(np.uint64(image.phash))
        lesions.append(lesion)
        splits.append(split)
        rows.append(
            {
                "path": str(picture.path),
                "image_id": f"{CORRECTION}{picture.sha256}",
                "label": picture.label,
                "lesion_id": lesion,
                "patient_id": "",
                "source": CORRECTIONS,
                "age": np.nan,
                "sex": "",
                "site": "",
                "split": split,
                "sha256": image.sha256,
                "phash": hash_text(image.phash),
            }
        )
    return pd.concat([frame, pd.DataFrame(rows)], ignore_index=True) if rows else frame, left_out


def correction_split(sha256: str) -> str:
    """Return the split of a picture that may train a model: always the same for the same upload."""
    share = int(hashlib.sha256(f"split:{sha256}".encode()).hexdigest()[:8], 16) / 16**8
    for split, size in SHARES.items():
        if share < size:
            return split
        share -= size
    return "train"
