"""The leakage receipt: hashes and ids of the images that a model was made from.

`receipt.json` is part of every bundle, so that the model is never tested on images that it has seen. It holds no
picture. For each split that training looks at (train, val, calibration) it lists the first 16 hex digits of the images'
SHA-256, their perceptual hashes, their ISIC identifiers, their lesion ids and their patient ids, each sorted by itself.

Needs neither torch nor pandas: a table is anything with the columns of `ImageIdentity`, such as a DataFrame.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from handlers.bundle import RECEIPT, BundleError
from handlers.identifiers import isic_id

SCHEMA = 1
SEEN_SPLITS = ("train", "val", "calibration")
DIGITS = 16  # of the SHA-256: 64 bits; two of a million images agree by chance once in 37 million data sets

# With the upload's SHA-256, the image id of a correction (training/data/corrected_pictures.py).
CORRECTION = "correction-"

# Copies of one photograph differ in at most 4 bits of the perceptual hash (training/data/near_duplicates.py).
COPY_RADIUS = 4
# Different photographs of dark spots in the same vignette are also that near now and then, so only more near images
# than this share of the set prove an overlap.
CHANCE_SHARE = 0.05


class ImageIdentity(NamedTuple):
    """The identity of an image: its name without ending, hex SHA-256, lesion id, perceptual hash in hex, patient id.

    `patient_id` is "" if unknown.
    """

    image_id: str
    sha256: str
    lesion_id: str
    phash: str
    patient_id: str


def image_identities(table: Any) -> list[ImageIdentity]:
    """Return the identities in a table's rows; `table[name]` gives the column `name`."""
    return [ImageIdentity(*row) for row in zip(*(table[name] for name in ImageIdentity._fields), strict=True)]


@dataclass(frozen=True)
class SeenImages:
    """The images of one split: sorted tuples without repetitions. Receipts may lack the last two: then none is known.

    `corrections` has the first DIGITS digits of the uploads' SHA-256.
    """

    sha256: tuple[str, ...]
    phash: tuple[str, ...]
    isic_ids: tuple[str, ...]
    lesions: tuple[str, ...]
    patients: tuple[str, ...] = ()
    corrections: tuple[str, ...] = ()

    @classmethod
    def of(cls, images: Sequence[ImageIdentity]) -> "SeenImages":
        """Return the entries of these images."""
        return cls(
            sha256=_sorted(image.sha256[:DIGITS] for image in images),
            phash=_sorted(image.phash for image in images),
            isic_ids=_sorted(name for image in images if (name := isic_id(image.image_id))),
            lesions=_sorted({image.lesion_id for image in images} - _named_after_files(images)),
            patients=_sorted(image.patient_id for image in images if image.patient_id),
            corrections=_sorted(
                image.image_id.removeprefix(CORRECTION)[:DIGITS]
                for image in images
                if image.image_id.startswith(CORRECTION)
            ),
        )

    @classmethod
    def joined(cls, splits: Iterable["SeenImages"]) -> "SeenImages":
        """Return the union of several splits."""
        columns = zip(*map(astuple, splits), strict=True)
        return cls(*(_sorted(value for column in same for value in column) for same in columns))


@dataclass(frozen=True)
class Receipt:
    """Everything a model was made from: a fingerprint (training.data.manifest.fingerprint) and the splits by name."""

    dataset_fingerprint: str
    splits: dict[str, SeenImages]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form, as kept in the bundle."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Receipt":
        """Invert to_dict. Raises KeyError, TypeError or AttributeError for anything else."""
        splits = {
            name: SeenImages(**{key: tuple(column) for key, column in columns.items()})
            for name, columns in values["splits"].items()
        }
        return cls(values["dataset_fingerprint"], splits)

    def without(self, split: str) -> "Receipt":
        """Return the receipt of the other splits."""
        return Receipt(self.dataset_fingerprint, {name: seen for name, seen in self.splits.items() if name != split})

    def joined(self, earlier: "Receipt") -> "Receipt":
        """Return the receipt of a model made from this receipt's images, starting from a model with `earlier`."""
        names = [split for split in SEEN_SPLITS if split in self.splits or split in earlier.splits]
        splits = {name: [r.splits[name] for r in (self, earlier) if name in r.splits] for name in names}
        return Receipt(self.dataset_fingerprint, {name: SeenImages.joined(seen) for name, seen in splits.items()})


@dataclass(frozen=True)
class Overlap:
    """The images of a set (by `image_id`) that a model has seen, each in the first list that applies.

    `same_image`: same bytes or ISIC identifier; `same_lesion`: another photograph of the same lesion; `same_patient`:
    another lesion of the same patient; `near`: a perceptual hash within COPY_RADIUS bits. `images` is the number of
    images compared.
    """

    images: int
    same_image: list[str]
    same_lesion: list[str]
    same_patient: list[str]
    near: list[str]

    @property
    def leaks(self) -> bool:
        """True if an image, lesion or patient was seen, or if more images are near than chance explains."""
        seen = self.same_image or self.same_lesion or self.same_patient
        return bool(seen or len(self.near) > CHANCE_SHARE * self.images)

    def __str__(self) -> str:
        """Return one sentence with the counts and an example."""
        seen = [*self.same_image, *self.same_lesion, *self.same_patient, *self.near]
        if not seen:
            return f"None of the {self.images:,} images was seen in training."
        return (
            f"Of {self.images:,} images, {len(self.same_image):,} were seen in training, {len(self.same_lesion):,} "
            f"show a lesion seen in training, {len(self.same_patient):,} a patient seen in training, and "
            f"{len(self.near):,} are near-duplicates of training images, such as {seen[0]}."
        )


def make_receipt(splits: Mapping[str, Sequence[ImageIdentity]], dataset_fingerprint: str) -> Receipt:
    """Return the receipt of a data set's images by split; splits that training does not look at are left out."""
    return Receipt(dataset_fingerprint, {name: SeenImages.of(splits[name]) for name in SEEN_SPLITS if name in splits})


def read_receipt(folder: Path) -> Receipt:
    """Read the receipt in a bundle's folder. Raises BundleError."""
    path = folder / RECEIPT
    try:
        values = json.loads(path.read_bytes())
        schema = values["schema"]
        receipt = Receipt.from_dict(values) if schema == SCHEMA else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path} is not a receipt ({error!r}). Export the bundle again.") from error
    if receipt is None:
        raise BundleError(f"{path} has schema {schema!r}, but this version reads schema {SCHEMA}.")
    return receipt


def overlap(receipt: Receipt, images: Sequence[ImageIdentity]) -> Overlap:
    """Compare images with those that the model has seen.

    The images may come from anywhere: the model's own test split, another data set, HAM10000 for a model trained on
    ISIC 2019. Lesion ids are compared as they stand, since archives and clinics number their lesions once. An id that
    only repeats the name of an image file does not identify a lesion, unless it is an ISIC identifier.
    """
    seen = SeenImages.joined(receipt.splits.values()) if receipt.splits else SeenImages((), (), (), (), ())
    digests, isic_ids, lesions, patients = map(set, (seen.sha256, seen.isic_ids, seen.lesions, seen.patients))
    hashes = np.array([int(phash, 16) for phash in seen.phash], np.uint64)
    nameless = _named_after_files(images)
    same_image, same_lesion, same_patient, near = [], [], [], []
    for name, digest, lesion, phash, patient in images:
        if digest[:DIGITS] in digests or isic_id(name) in isic_ids:
            same_image.append(name)
        elif lesion in lesions and lesion not in nameless:
            same_lesion.append(name)
        elif patient in patients:
            same_patient.append(name)
        elif (np.bitwise_count(hashes ^ np.uint64(int(phash, 16))) <= COPY_RADIUS).any():
            near.append(name)
    return Overlap(len(images), same_image, same_lesion, same_patient, near)


def _named_after_files(images: Sequence[ImageIdentity]) -> set[str]:
    """Lesion ids that only repeat the name of an image (training.data.photos.group_photos makes those up)."""
    names = {image.image_id for image in images if not isic_id(image.image_id)}
    return names & {image.lesion_id for image in images}


def _sorted(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(values)))
