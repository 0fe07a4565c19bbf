"""Pictures of phones, clinics and microscopes: AVIF, HEIC, DICOM, samples of 10 to 16 bits, colour profiles."""

import io

import numpy as np
import pillow_heif
from PIL import ImageCms

from tests.hostile import dicom
from tests.hostile.colours import SRGB, STORED, WIDE, profile
from tests.hostile.images import OK, Case, Cases, encode, exif, small, turned

FORMATS = ("AVIF", "HEIC", "DICOM")
pillow_heif.register_heif_opener(thumbnails=False)


def newer(data: bytes) -> Cases:
    """Whole pictures: all of them are answered."""
    image = small(data)
    for format_ in FORMATS:
        for number, file in enumerate(sources(data, format_)):
            yield Case(f"{format_} {number}", file, OK)
    for bits in (10, 12, 14, 16):
        values = np.asarray(image).astype(np.uint16) * (257 if bits == 16 else 1 << (bits - 8))
        for kind, store in STORED.items():
            yield Case(f"{bits} bits in a {kind}", store(values), OK)
    for name, (*primaries, gamma) in WIDE.items():
        wide = profile(primaries=tuple(primaries), gamma=gamma)
        stored = ImageCms.profileToProfile(image, SRGB, ImageCms.ImageCmsProfile(io.BytesIO(wide)))
        for format_ in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF", "HEIF"):
            yield Case(f"{name} in a {format_}", encode(stored, format_, icc_profile=wide), OK)
    for format_ in ("PNG", "TIFF", "JPEG"):
        yield Case(f"{format_} with a cut profile", encode(image, format_, icc_profile=profile()[:200]), OK)


def sources(data: bytes, format_: str) -> list[bytes]:
    """One picture in every way of storing it in this format."""
    image = small(data)
    if format_ == "DICOM":
        return list(dicom.forms(image).values())
    name = "HEIF" if format_ == "HEIC" else format_
    stored = turned(image, 6)
    stored.info["exif"] = exif(6).tobytes()
    return [
        encode(image, name), encode(image, name, quality=20), encode(image.convert("L"), name),
        encode(image.convert("RGBA"), name), encode(stored, name, exif=exif(6).tobytes()),
    ]  # fmt: skip
