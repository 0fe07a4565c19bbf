"""Make a manifest of data folders: recognise, decode, find duplicates, settle labels, group, split, write."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from handlers.errors import UsageError
from training.data.groups import join_near_duplicates
from training.data.image_files import Faults
from training.data.label_tables import DERMOSCOPY
from training.data.manifest import ManifestError, absolute, fingerprint, write_manifest
from training.data.manifest_report import make_report, summary
from training.data.near_duplicates import ImageDigest, hash_text, read_images
from training.data.photos import (
    Photo,
    augmented_pairs,
    drop_orphans,
    labelled,
    merge_copies,
    near_pairs,
    settle_labels,
)
from training.data.sources import SourceImage, Sources, read_sources
from training.data.splits import DEFAULT_FRACTIONS, DEFAULT_SEED, SPLITS, assign_splits

REPORT_SCHEMA = 2


class SharesError(UsageError):
    """The shares of the splits are invalid."""


def build_manifest(
    data_dirs: Sequence[str | Path],
    out: str | Path,
    *,
    fractions: Mapping[str, float] = DEFAULT_FRACTIONS,
    seed: int = DEFAULT_SEED,
    clinical: bool | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Any]:
    """Recognise, check, join and split the data sets in `data_dirs`, and write the manifest and its report.

    Args:
        data_dirs: folders of data sets (see data_sets.yaml), or of class folders.
        out: the manifest to write. The report stands next to it as <stem>.report.json.
        fractions: share of the images in train, val, calibration and test.
        seed: another seed gives another split.
        clinical: whether pictures that are no dermoscopy are used. None: only those of data sets without dermoscopy.
        workers: threads that read images. Default: one per core.
        progress: called with (done, total) as images are read.

    Returns:
        The report, as written.

    Raises:
        SharesError: `fractions` are invalid.
        SourceError: a folder cannot be used.
        ManifestError: no usable image is there, or the files cannot be written.
    """
    out = absolute(out)
    _check_fractions(fractions)
    sources = open_sources(data_dirs)
    if not any(image.claims for image in sources.images):
        raise ManifestError(
            f"{len(sources.images):,} images were found, but no diagnosis: no known table, no labels.csv with the "
            "columns image,label, and no folders named after classes. Add the table, or give the folder above the "
            "class folders."
        )
    dropped = Faults()
    images = _dermoscopy(sources, clinical, dropped)
    described = _read_images(images, dropped, workers, progress)
    photos = merge_copies(described, sources.faults, dropped)
    copies = augmented_pairs(photos)
    joined = join_near_duplicates(photos, copies, near_pairs(photos), sources.faults) if photos else []
    settled = settle_labels(photos, joined, sources.faults, dropped)
    drop_orphans(photos, joined, dropped)
    test_divisions = {photo.division for photo in photos if photo.is_test}
    photos, joined = labelled(photos, joined)
    if not photos:
        raise ManifestError(f"No image is left. Left out: {summary(dropped)}. Check the folder and its table.")

    names = _division_names(photos)
    codes: dict[str, list[str]] = defaultdict(list)
    for photo in photos:
        codes[names[photo.division]].append(photo.label)
    fixed_test = frozenset(names[division] for division in test_divisions if division in names)
    splits = assign_splits(codes, fixed_test, fractions, seed)
    frame = _frame(photos, [splits[names[photo.division]] for photo in photos])
    report = {
        "schema": REPORT_SCHEMA,
        "fingerprint": fingerprint(frame),
        "seed": seed,
        "fractions": dict(fractions),
        **make_report(frame, _roots(data_dirs), sources, photos, joined, settled, dropped, len(fixed_test)),
    }
    write_manifest(out, frame, report)
    return report


def open_sources(data_dirs: Sequence[str | Path]) -> Sources:
    """Recognise the data sets in the folders, without decoding an image.

    Raises:
        SourceError: a folder cannot be used.
        ManifestError: there is no folder or no image.
    """
    if not data_dirs:
        raise ManifestError("No data folder was given. Name one with --data.")
    sources = read_sources(_roots(data_dirs))
    if not sources.images:
        tables = ", ".join(sorted({table.kind for table in sources.tables}))
        raise ManifestError(f"Tables were found ({tables}), but no image. Give the folder with the images as well.")
    return sources


def _roots(data_dirs: Sequence[str | Path]) -> list[Path]:
    return list(dict.fromkeys(Path(directory).expanduser().resolve() for directory in data_dirs))


def _check_fractions(fractions: Mapping[str, float]) -> None:
    if set(fractions) != set(SPLITS) or min(fractions.values()) < 0 or not 0.999 < sum(fractions.values()) < 1.001:
        shares = ", ".join(f"{name} {share:g}" for name, share in fractions.items())
        raise SharesError(f"The shares of {', '.join(SPLITS)} must be 0 or more and sum to 1. They are {shares}.")
    if fractions["train"] == 0:
        raise SharesError("The train split's share is 0. Leave some images for training.")


def _dermoscopy(sources: Sources, clinical: bool | None, dropped: Faults) -> list[SourceImage]:
    """Return the images to use. What is no dermoscopy is left out, or reported if it is used.

    An image that one row calls dermoscopic and another row clinical counts as dermoscopy.
    """
    images = []
    for image in sources.images:
        types = "" if DERMOSCOPY in image.image_types else ", ".join(sorted(image.image_types))
        kind = image.photographs or types
        if not kind or clinical or (clinical is None and image.photographs):
            images.append(image)
            if kind:
                sources.faults.add(f"no dermoscopy, but used: {kind}", str(image.path))
        else:
            dropped.add(f"no dermoscopy: {kind}", str(image.path))
    return images


def _read_images(
    images: list[SourceImage], dropped: Faults, workers: int | None, progress: Callable[[int, int], object]
) -> list[tuple[SourceImage, ImageDigest]]:
    results = read_images([image.path for image in images], workers, progress)
    described = []
    for image, result in zip(images, results, strict=True):
        if isinstance(result, str):
            dropped.add("image cannot be used", f"{image.path}: {result}")
        else:
            described.append((image, result))
    return described


def _division_names(photos: list[Photo]) -> dict[int, str]:
    """Name each division after its first lesion, so that the split depends on the data's names alone."""
    names: dict[int, str] = {}
    for photo in photos:
        names[photo.division] = min(names.get(photo.division, photo.lesion), photo.lesion)
    return names


def _frame(photos: list[Photo], splits: list[str]) -> pd.DataFrame:
    rows = []
    for photo, split in zip(photos, splits, strict=True):
        images = [image for image, _ in photo.copies]
        rows.append(
            {
                "path": str(photo.kept.path),
                "image_id": photo.name,
                "label": photo.label,
                "lesion_id": photo.lesion,
                "patient_id": photo.patient,
                "source": photo.kept.source,
                "age": next((image.age for image in images if image.age is not None), None),
                "sex": next((image.sex for image in images if image.sex), ""),
                "site": next((image.site for image in images if image.site), ""),
                "split": split,
                "sha256": photo.digest.sha256,
                "phash": hash_text(photo.digest.phash),
            }
        )
    return pd.DataFrame(rows).astype({"age": float})
