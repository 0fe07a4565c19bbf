"""DICOM files written from a picture, in every way of storing pixels that is read."""

import io

import numpy as np
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.encoders.native import _encode_frame
from pydicom.uid import (
    JPEG2000,
    UID,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGBaseline8Bit,
    RLELossless,
    VLPhotographicImageStorage,
)

from tests.hostile.images import SECRET, encode


def write(
    values: np.ndarray, photometric: str, syntax: UID = ExplicitVRLittleEndian, frame: bytes = b"", **more: object
) -> bytes:
    """A file of pixels (rows, columns) or (rows, columns, 3); `frame` holds them encapsulated."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = syntax, VLPhotographicImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    data = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    data.SOPClassUID, data.SOPInstanceUID, data.PatientName = VLPhotographicImageStorage, "1.2.3", SECRET
    data.Rows, data.Columns = values.shape[:2]
    data.SamplesPerPixel = values.shape[2] if values.ndim == 3 else 1
    data.PhotometricInterpretation, data.PixelRepresentation = photometric, 0
    data.BitsAllocated = data.BitsStored = 8 * values.itemsize
    data.HighBit = data.BitsStored - 1
    if values.ndim == 3:
        data.PlanarConfiguration = 0
    for name, value in more.items():
        setattr(data, name, value)
    body = values.tobytes()
    data.PixelData = encapsulate([frame]) if frame else body + b"\0" * (len(body) % 2)
    data["PixelData"].VR = "OB" if frame or values.itemsize == 1 else "OW"
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def run_lengths(values: np.ndarray) -> bytes:
    """A frame in run lengths."""
    from pydicom.pixels.encoders.base import EncodeRunner

    runner = EncodeRunner(RLELossless)
    runner.set_options(
        rows=values.shape[0], columns=values.shape[1], samples_per_pixel=values.shape[2] if values.ndim == 3 else 1,
        bits_allocated=8 * values.itemsize, bits_stored=8 * values.itemsize, pixel_representation=0,
        photometric_interpretation="RGB", number_of_frames=1, planar_configuration=0, pixel_keyword="PixelData",
    )  # fmt: skip
    return bytes(_encode_frame(values.tobytes(), runner))


def forms(image: Image.Image) -> dict[str, bytes]:
    """The picture in every form."""
    colours, grey = np.asarray(image), np.asarray(image.convert("L"))
    small = image.quantize(200)
    palette = np.array(small.getpalette()[: 3 * 200], np.uint16).reshape(-1, 3) * 257
    tables: dict[str, object] = {}
    for band, name in enumerate(("Red", "Green", "Blue")):
        tables[f"{name}PaletteColorLookupTableDescriptor"] = [len(palette), 0, 16]
        tables[f"{name}PaletteColorLookupTableData"] = palette[:, band].astype("<u2").tobytes()
    return {
        "RGB": write(colours, "RGB"),
        "implicit": write(colours, "RGB", ImplicitVRLittleEndian),
        "planar": write(
            np.ascontiguousarray(np.moveaxis(colours, 2, 0)).reshape(colours.shape), "RGB", PlanarConfiguration=1
        ),
        "YBR_FULL": write(np.asarray(image.convert("YCbCr")), "YBR_FULL"),
        "MONOCHROME2": write(grey, "MONOCHROME2"),
        "MONOCHROME1": write(255 - grey, "MONOCHROME1"),
        "12 bits": write(grey.astype(np.uint16) * 16, "MONOCHROME2", BitsStored=12, HighBit=11),
        "palette": write(np.asarray(small), "PALETTE COLOR", **tables),
        "JPEG": write(colours, "YBR_FULL_422", JPEGBaseline8Bit, encode(image, "JPEG", quality=92)),
        "JPEG 2000": write(colours, "YBR_RCT", JPEG2000, encode(image, "JPEG2000", no_jp2=True)),
        "run lengths": write(colours, "RGB", RLELossless, run_lengths(colours)),
    }
