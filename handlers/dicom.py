"""DICOM: the one frame of a photographic or dermoscopic picture, and how to understand its pixels.

Only the pixel description of the header is used; names, dates and identifiers are neither kept nor returned. The frame
is decoded by Pillow: JPEG baseline, JPEG 2000 and run lengths (the PackBits of TIFF), or uncompressed.
"""

import io
import logging
import struct
import warnings
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image

from handlers.errors import ImageError, InvalidImage
from handlers.file_limits import MAX_PIXELS

MAX_HEADER = 1 << 20  # bytes before the pixels
MIN_FRAME_BYTES = 16
_ENCODINGS = {
    "1.2.840.10008.1.2": "raw",
    "1.2.840.10008.1.2.1": "raw",
    "1.2.840.10008.1.2.4.50": "JPEG",
    "1.2.840.10008.1.2.4.90": "JPEG2000",
    "1.2.840.10008.1.2.4.91": "JPEG2000",
    "1.2.840.10008.1.2.5": "RLE",
}
_PIXELS = b"\xe0\x7f\x10\x00"


@dataclass(frozen=True)
class DicomFrame:
    """A frame: a JPEG or JPEG 2000 file in `encoded` with its `format`, or else the `image`.

    `bits` are those that samples of 16 bits use; `inverted` means that white is zero.
    """

    format: str
    encoded: bytes
    image: Image.Image | None
    bits: int
    inverted: bool
    profile: bytes | None


def read_frame(data: bytes) -> DicomFrame:
    """Read a DICOM file's only frame. Raises ImageError for one that is damaged, too large or of another kind."""
    pydicom = _pydicom()
    source = io.BytesIO(data[:MAX_HEADER])
    try:
        header = pydicom.dcmread(source, stop_before_pixels=True)
        syntax = str(header.file_meta.TransferSyntaxUID)
        if syntax not in _ENCODINGS:
            raise InvalidImage(
                "This DICOM uses a compression that is not supported. Save it uncompressed, or with JPEG or JPEG 2000."
            )
        rows, columns, samples = (int(header[name].value) for name in ("Rows", "Columns", "SamplesPerPixel"))
        photometric = str(header.PhotometricInterpretation)
        allocated, stored = int(header.BitsAllocated), int(header.get("BitsStored", header.BitsAllocated))
        frames = int(header.get("NumberOfFrames", 1) or 1)
        signed = int(header.get("PixelRepresentation", 0) or 0)
        profile = header.get("ICCProfile")
    except ImageError:
        raise
    except Exception as error:  # pydicom reports damage with exceptions of many kinds
        raise InvalidImage("This DICOM has no readable picture. Export the picture as JPEG.") from error
    if frames != 1:
        raise ImageError(400, "several_frames", f"This DICOM has {frames} frames. Send one picture.")
    if rows * columns > MAX_PIXELS:
        raise ImageError(
            413, "image_too_large", f"The image has {columns}×{rows} pixels; the limit is {MAX_PIXELS:,} pixels."
        )
    if (
        samples not in (1, 3)
        or allocated not in (8, 16)
        or not 8 <= stored <= allocated
        or signed
        or rows * columns == 0
    ):
        raise InvalidImage("This DICOM has samples of an unusual kind. Save it with 8 bits per channel.")
    body = _pixel_data(data, source.tell(), implicit=syntax == "1.2.840.10008.1.2")
    encoding, inverted = _ENCODINGS[syntax], photometric == "MONOCHROME1"
    profile = profile if isinstance(profile, bytes) else None
    if encoding in ("JPEG", "JPEG2000"):
        return DicomFrame(encoding, _first_fragment(body), None, 16, inverted, profile)
    planar = int(header.get("PlanarConfiguration", 0) or 0) == 1
    if encoding == "RLE":
        pixels = _run_lengths(_first_fragment(body), rows, columns, samples, allocated)
    else:
        pixels = _uncompressed(body, rows, columns, samples, allocated, planar)
    return DicomFrame("", b"", _picture(pixels, photometric, header), stored, inverted, profile)


@cache
def _pydicom() -> Any:
    """Import pydicom and silence it: its warnings quote values of the header, such as a patient's name."""
    import pydicom

    logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)
    warnings.filterwarnings("ignore", module=r"pydicom\.")
    pydicom.config.settings.reading_validation_mode = pydicom.config.IGNORE
    return pydicom


def _pixel_data(data: bytes, position: int, implicit: bool) -> bytes:
    """Return the value of the element with the pixels, which begins at `position`."""
    if data[position : position + 4] != _PIXELS:
        raise InvalidImage("This DICOM has no readable picture. Export the picture as JPEG.")
    start = position + (8 if implicit else 12)
    length = int.from_bytes(data[start - 4 : start], "little")
    return data[start:] if length == 0xFFFFFFFF else data[start : start + length]


def _first_fragment(body: bytes) -> bytes:
    """Join the fragments of a frame; the first item holds offsets."""
    fragments: list[bytes] = []
    position = 0
    while body[position : position + 4] == b"\xfe\xff\x00\xe0" and len(fragments) < 10_000:
        length = int.from_bytes(body[position + 4 : position + 8], "little")
        fragments.append(body[position + 8 : position + 8 + length])
        position += 8 + length
    frame = b"".join(fragments[1:])
    if len(frame) < MIN_FRAME_BYTES:
        raise InvalidImage("The picture in this DICOM is cut off. Send the whole file.")
    return frame


def _uncompressed(body: bytes, rows: int, columns: int, samples: int, allocated: int, planar: bool) -> np.ndarray:
    kind, count = np.dtype(f"<u{allocated // 8}"), rows * columns * samples
    if len(body) < count * kind.itemsize:
        raise InvalidImage("The picture in this DICOM is cut off. Send the whole file.")
    values = np.frombuffer(body, kind, count)
    return (
        np.moveaxis(values.reshape(samples, rows, columns), 0, -1) if planar else values.reshape(rows, columns, samples)
    )


def _run_lengths(frame: bytes, rows: int, columns: int, samples: int, allocated: int) -> np.ndarray:
    """Decode the segments of a frame: one per byte of a sample, the high byte first."""
    count, size = samples * allocated // 8, allocated // 8
    offsets = [*struct.unpack_from("<16I", frame.ljust(64, b"\0"))[1 : count + 1], len(frame)]
    if int.from_bytes(frame[:4], "little") != count or offsets != sorted(offsets):
        raise InvalidImage("The picture in this DICOM is damaged. Export the picture as JPEG.")
    planes = []
    for begin, end in pairwise(offsets):
        try:
            planes.append(np.asarray(Image.frombytes("L", (columns, rows), frame[begin:end], "packbits", "L")))
        except ValueError as error:
            raise InvalidImage("The picture in this DICOM is damaged. Export the picture as JPEG.") from error
    if size == 1:
        return np.stack(planes, -1)
    return np.stack([planes[i].astype(np.uint16) << 8 | planes[i + 1] for i in range(0, count, 2)], -1)


def _picture(pixels: np.ndarray, photometric: str, header: Any) -> Image.Image:
    """Return the pixels (rows, columns, samples) as L, I or RGB."""
    if photometric == "PALETTE COLOR" and pixels.shape[2] == 1:
        return Image.fromarray(_palette(header)[pixels[:, :, 0]])
    if photometric in ("MONOCHROME1", "MONOCHROME2") and pixels.shape[2] == 1:
        grey = np.ascontiguousarray(pixels[:, :, 0])
        return Image.fromarray(grey if grey.dtype == np.uint8 else grey.astype(np.int32))
    if photometric in ("RGB", "YBR_FULL") and pixels.shape[2] == 3 and pixels.dtype == np.uint8:
        mode = "RGB" if photometric == "RGB" else "YCbCr"
        size = (pixels.shape[1], pixels.shape[0])
        return Image.frombytes(mode, size, np.ascontiguousarray(pixels).tobytes()).convert("RGB")
    raise InvalidImage("This DICOM stores colours in a way that is not supported. Save it as RGB with 8 bits.")


def _palette(header: Any) -> np.ndarray:
    """Return the colours (65536, 3) of a palette, in 8 bits; values beyond its ends take the first or last colour."""
    try:
        columns = []
        for colour in ("Red", "Green", "Blue"):
            length, first, bits = (int(v) for v in header[f"{colour}PaletteColorLookupTableDescriptor"].value)
            table = np.frombuffer(
                header[f"{colour}PaletteColorLookupTableData"].value, "<u2" if bits == 16 else np.uint8
            )
            table = table[: length or 65536]
            levels = (table >> 8 if bits == 16 and table.max() > 255 else table).astype(np.uint8)
            columns.append(levels[np.clip(np.arange(65536) - first, 0, len(levels) - 1)])
        return np.stack(columns, -1)
    except Exception as error:
        raise InvalidImage("The palette of this DICOM is damaged. Export the picture as JPEG.") from error
