"""Identifiers of the ISIC Archive in image names."""

import re

# Challenge names, their down-scaled copies, and the suffixes that second downloads and file managers add.
_ISIC_ID = re.compile(r"(ISIC_\d{7})(?:_downsampled|[ _-]?copy|[ _]?\(\d+\))*", re.IGNORECASE)


def isic_id(name: str) -> str | None:
    """Return the archive's identifier in an image name without its ending, or None.

    "isic_0012345_downsampled" gives "ISIC_0012345". Masks and superpixels (ISIC_0012345_segmentation) have none.
    """
    match = _ISIC_ID.fullmatch(name.strip())
    return match[1].upper() if match else None
