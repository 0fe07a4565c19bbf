"""Leakage: keep a model from being tested on images that it was made from."""

from pathlib import Path
from typing import Any

import pandas as pd

from handlers.errors import UserError
from handlers.receipt import Receipt, image_identities, make_receipt, overlap, read_receipt


class OverlapError(UserError):
    """The model has seen some of the images that it should be tested on."""


def manifest_receipt(frame: pd.DataFrame, dataset_fingerprint: str) -> Receipt:
    """Return the receipt of a model that is trained on a manifest (training.data.manifest.read_manifest)."""
    splits = {str(split): image_identities(rows) for split, rows in frame.groupby("split")}
    return make_receipt(splits, dataset_fingerprint)


def seen_images(bundle: Path, rows: pd.DataFrame) -> set[str]:
    """Return the image ids of a manifest's rows that the bundle has seen: image, lesion, patient or near-duplicate.

    Raises BundleError if the bundle has no readable receipt.
    """
    seen = overlap(read_receipt(bundle), image_identities(rows))
    return {*seen.same_image, *seen.same_lesion, *seen.same_patient, *seen.near}


def check_overlap(bundle: Path, rows: pd.DataFrame, allowed: bool) -> dict[str, Any]:
    """Compare a manifest's rows with the bundle's receipt and return the counts for metrics.json.

    Raises:
        BundleError: the bundle has no readable receipt.
        OverlapError: the model has seen some of the images, and this is not `allowed`.
    """
    seen = overlap(read_receipt(bundle), image_identities(rows))
    if seen.leaks and not allowed:
        raise OverlapError(
            f"{seen} Figures on seen images do not hold for new ones (all of HAM10000 is part of ISIC 2019). Leave "
            "these images out, or add --allow-overlap."
        )
    counts = {kind: len(getattr(seen, kind)) for kind in ("same_image", "same_lesion", "same_patient", "near")}
    return {"overlaps": seen.leaks, **counts}
