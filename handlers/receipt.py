"""The leakage receipt: what a bundle tells of the images it was made from, so that nobody is tested on them again.

`receipt.json` lies in the bundle, listed in its digest, and holds no picture: for each split that training looked at
(train, val, calibration) the first 16 hex digits of the images' SHA-256, their perceptual hashes, the ISIC identifiers
and the lesion ids, each sorted by itself. `overlap` holds a manifest against it.

Free of torch, so that promotion can use it.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from handlers.bundle import BundleError
from handlers.errors import UserError
from handlers.identifiers import isic_id

RECEIPT = "receipt.json"
SCHEMA = 1
SEEN_SPLITS = ("train", "val", "calibration")
DIGITS = 16  # of the SHA-256: 64 bits; two of a million images agree by chance once in 37 million data sets

# Copies of one photograph differ in 4 bits at most: 1,233 pairs, training/data/duplicates.py.
COPY_RADIUS = 4
# Hashes alone also find dark spots in the same vignette: on this project's data 16 of 989 test images (1.6 %) are that
# near to one of 8,180 others, and are other photographs. So a few near images prove nothing, and many do.
CHANCE_SHARE = 0.05


class OverlapError(UserError):
    """The images are not new to the model, or nobody can tell."""


@dataclass(frozen=True)
class SeenImages:
    """What is kept of one split; four sorted tuples without repetitions."""

    sha256: tuple[str, ...]
    phash: tuple[str, ...]
    isic_ids: tuple[str, ...]
    lesions: tuple[str, ...]

    @classmethod
    def joined(cls, several: Iterable["SeenImages"]) -> "SeenImages":
        """What is in any of them."""
        columns = zip(*map(astuple, several), strict=True)
        return cls(*(_sorted(value for column in same for value in column) for same in columns))


@dataclass(frozen=True)
class Receipt:
    """Everything a model was made from: a fingerprint (training.data.manifest.fingerprint) and the splits by name."""

    dataset_fingerprint: str
    splits: dict[str, SeenImages]

    def to_dict(self) -> dict[str, Any]:
        """JSON form, as kept in the bundle."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Receipt":
        """The inverse of to_dict. Raises KeyError, TypeError or AttributeError for anything else."""
        splits = {
            name: SeenImages(**{key: tuple(column) for key, column in columns.items()})
            for name, columns in values["splits"].items()
        }
        return cls(values["dataset_fingerprint"], splits)

    def joined(self, earlier: "Receipt") -> "Receipt":
        """The receipt of a model that was made from this one's images, starting from a model made from `earlier`'s."""
        names = [split for split in SEEN_SPLITS if split in self.splits or split in earlier.splits]
        splits = {name: [r.splits[name] for r in (self, earlier) if name in r.splits] for name in names}
        return Receipt(self.dataset_fingerprint, {name: SeenImages.joined(seen) for name, seen in splits.items()})


@dataclass(frozen=True)
class Overlap:
    """Which images (by `image_id`) of a manifest the model has seen, and how that was noticed; each is named once.

    `same_image`: same bytes or ISIC identifier; `same_lesion`: another photograph of the same lesion; `near`: a
    perceptual hash within COPY_RADIUS bits. `images` is how many were compared.
    """

    images: int
    same_image: list[str]
    same_lesion: list[str]
    near: list[str]

    @property
    def found(self) -> bool:
        """Whether the images overlap: any identity, or more near ones than chance explains."""
        return bool(self.same_image or self.same_lesion or len(self.near) > CHANCE_SHARE * self.images)

    def __str__(self) -> str:
        """One sentence with the counts and an example."""
        kinds = {
            "are the same image": self.same_image,
            "show the same lesion": self.same_lesion,
            "are near duplicates by their hashes": self.near,
        }
        counts = ", ".join(f"{len(names):,} {kind}" for kind, names in kinds.items() if names)
        example = next((names[0] for names in kinds.values() if names), "")
        if not counts:
            return f"None of the {self.images:,} images was seen in training."
        return f"Of {self.images:,} images, compared with those the model was made from, {counts} (such as {example})."


def make_receipt(frame: pd.DataFrame, dataset_fingerprint: str) -> Receipt:
    """The receipt of a manifest's rows (training.data.manifest.read_manifest) whose split is one that training looks at."""
    seen = {split: _describe(rows) for split, rows in frame.groupby("split") if split in SEEN_SPLITS}
    return Receipt(dataset_fingerprint, {split: seen[split] for split in SEEN_SPLITS if split in seen})


def read_receipt(bundle: Path | str) -> Receipt | None:
    """The receipt in a bundle's folder; None in a bundle from before there were receipts. Raises BundleError."""
    path = Path(bundle) / RECEIPT
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
        schema = values["schema"]
        receipt = Receipt.from_dict(values) if schema == SCHEMA else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} cannot be read as a receipt ({type(error).__name__}: {error}).") from error
    if receipt is None:
        raise BundleError(f"{path} has schema {schema!r}; this version reads schema {SCHEMA}.")
    return receipt


def overlap(receipt: Receipt, frame: pd.DataFrame) -> Overlap:
    """Compare a manifest's rows with what the model has seen.

    The manifest may be any: its own test split, another data set, HAM10000 for a model trained on ISIC 2019. Lesion
    ids are compared as they stand, since archives and clinics number their lesions once; an id that is only the name
    of an image file says nothing, unless it is an ISIC identifier.
    """
    seen = list(receipt.splits.values())
    digests = {digest for split in seen for digest in split.sha256}
    isic_ids = {name for split in seen for name in split.isic_ids}
    lesions = {lesion for split in seen for lesion in split.lesions}
    hashes = np.array(sorted({int(phash, 16) for split in seen for phash in split.phash}), np.uint64)

    found: dict[str, list[str]] = {"same_image": [], "same_lesion": [], "near": []}
    named = _named_after_files(frame)
    for name, digest, lesion, phash in zip(
        frame["image_id"], frame["sha256"], frame["lesion_id"], frame["phash"], strict=True
    ):
        if digest[:DIGITS] in digests or isic_id(name) in isic_ids:
            found["same_image"].append(name)
        elif lesion in lesions and lesion not in named:
            found["same_lesion"].append(name)
        elif (np.bitwise_count(hashes ^ np.uint64(int(phash, 16))) <= COPY_RADIUS).any():
            found["near"].append(name)
    return Overlap(len(frame), **found)


def check_overlap(bundle: Path, rows: pd.DataFrame, allowed: bool) -> dict[str, Any]:
    """Hold the images against the bundle's leakage receipt; what was found, for metrics.json.

    Raises:
        OverlapError: the model was made from some of them, or has no receipt, and this was not `allowed`.
    """
    receipt = read_receipt(bundle)
    if receipt is None:
        if not allowed:
            raise OverlapError(
                f"{bundle} carries no receipt of the images it was made from (receipt.json), so nobody can tell "
                "whether it has seen these; add --allow-overlap if you know that it has not."
            )
        return {"receipt": False}
    found = overlap(receipt, rows)
    if found.found and not allowed:
        raise OverlapError(
            f"{found} Figures on images that a model has seen say nothing of new ones (all of HAM10000 is inside ISIC "
            "2019); leave them out, or add --allow-overlap."
        )
    counts = {kind: len(getattr(found, kind)) for kind in ("same_image", "same_lesion", "near")}
    return {"receipt": True, "overlaps": found.found, **counts}


def _describe(rows: pd.DataFrame) -> SeenImages:
    return SeenImages(
        sha256=_sorted(rows["sha256"].str[:DIGITS]),
        phash=_sorted(rows["phash"]),
        isic_ids=_sorted(name for name in map(isic_id, rows["image_id"]) if name),
        lesions=_sorted(set(rows["lesion_id"]) - _named_after_files(rows)),
    )


def _named_after_files(frame: pd.DataFrame) -> set[str]:
    """Lesion ids that are only the name of an image, as training.data.photos.group_photos gives where there is no other."""
    return {name for name in frame["image_id"] if not isic_id(name)} & set(frame["lesion_id"])


def _sorted(values: Any) -> tuple[str, ...]:
    return tuple(sorted(set(values)))
