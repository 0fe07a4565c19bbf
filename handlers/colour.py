"""Colour: pictures with an embedded colour profile to sRGB, by littleCMS.

Networks, browsers and the other pictures of a data set assume sRGB. Display P3 and Adobe RGB taken for sRGB look paler,
and CMYK inks have no defined colour without their profile.
"""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

# The largest common profiles, of printing inks, have 2 to 3 MB.
MAX_PROFILE_BYTES = 4 << 20
CONVERTED, DROPPED = "colours converted to sRGB", "unusable colour profile ignored"

_MODES = {b"RGB ": "RGB", b"CMYK": "CMYK", b"GRAY": "L"}  # of a picture by its profile's colour space
_CLASSES = (b"mntr", b"scnr", b"prtr", b"spac")  # profiles of devices; others convert between profiles
_SAME = 2  # levels by which a profile may differ from sRGB and is still taken for it


def to_srgb(image: Image.Image, profile: bytes) -> tuple[Image.Image, str]:
    """Convert an L, RGB or CMYK picture by its profile, and say in plain words what happened; "" for nothing.

    A damaged, oversized or unsuitable profile is ignored.
    """
    mode = _MODES.get(profile[16:20], "")
    if mode == "RGB" and image.mode == "L":
        image = image.convert("RGB")
    if mode != image.mode or profile[12:16] not in _CLASSES or len(profile) > MAX_PROFILE_BYTES:
        return image, DROPPED
    try:
        transform = _transform(profile, mode)
        if transform is None:
            return image, ""
        return transform.apply(image), CONVERTED
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image, DROPPED


@lru_cache(maxsize=8)  # the pictures of one camera or program share a profile
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform to sRGB, or None if the profile is sRGB itself. Raises PyCMSError or OSError."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    # The rendering intent makes no difference to profiles of screens and cameras.
    target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    transform = ImageCms.ImageCmsTransform(source, target, mode, "RGB")
    if mode == "CMYK":
        return transform
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(27, 27, 3)
    probe = Image.fromarray(colours) if mode == "RGB" else Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    change = np.asarray(transform.apply(probe)).astype(int) - np.asarray(probe.convert("RGB"))
    return None if np.abs(change).max() <= _SAME else transform
