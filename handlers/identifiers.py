"""Identifiers of the ISIC Archive in image names."""

import re

# Challenge names, their down-scaled copies, and what a second download or a file manager makes of them.
_ISIC_ID = re.compile(r"(ISIC_\d{7})(?:_downsampled|[ _-]?copy|[ _]?\(\d+\))*", re.IGNORECASE)


def isic_id(name: str) -> str | None:
    """The archive's identifier in an image name without its ending, or None: "isic_0012345_downsampled" gives
    "ISIC_0012345". Masks and superpixels (ISIC_0012345_segmentation) have none, as they are other pictures."""
    match = _ISIC_ID.fullmatch(name.strip())
    return match[1].upper() if match else None
