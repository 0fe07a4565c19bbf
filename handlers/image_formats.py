"""Formats of image files, detected from their first bytes; file names and endings are ignored."""

import re

from handlers.errors import ImageError

READ = "JPEG, PNG, WebP, TIFF, BMP, HEIC, AVIF or DICOM"

# First bytes by Pillow's name of the format. JPEG includes MPO, the multi-picture JPEG of phones.
_SIGNATURES = {
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG\r\n\x1a\n",),
    "BMP": (b"BM",),
    "TIFF": (b"II*\x00", b"MM\x00*"),
}
# Other files that people send, by the bytes at their beginning.
_OTHERS = {
    "a GIF": (b"GIF87a", b"GIF89a"),
    "a JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"),
    "a JPEG XL": (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n"),
    "a Photoshop (PSD)": (b"8BPS",),
    "a PDF": (b"%PDF-",),
    "a PostScript": (b"%!PS", b"\xc5\xd0\xd3\xc6"),
    "a ZIP": (b"PK\x03\x04", b"PK\x05\x06"),
    "a gzip": (b"\x1f\x8b",),
    "a 7-Zip": (b"7z\xbc\xaf\x27\x1c",),
    "an RAR": (b"Rar!\x1a\x07",),
    "a Zstandard": (b"\x28\xb5\x2f\xfd",),
    "a Matroska or WebM video": (b"\x1a\x45\xdf\xa3",),
    "a BigTIFF": (b"II+\0", b"MM\0+"),
    "a camera raw": (b"FUJIFILMCCD-RAW", b"IIRO", b"IIU\0", b"FOVb", b"\0MRM"),
    "an HDF5": (b"\x89HDF\r\n\x1a\n",),
    "a NIfTI": (b"\x5c\x01\0\0", b"\0\0\x01\x5c"),
    "a NumPy": (b"\x93NUMPY",),
    "an OpenEXR": (b"v/1\x01",),
    "a Radiance HDR": (b"#?RADIANCE",),
    "a DirectDraw (DDS)": (b"DDS ",),
    "a Windows icon": (b"\0\0\x01\0", b"\0\0\x02\0"),
    "a netpbm": (b"P1\n", b"P2\n", b"P3\n", b"P4\n", b"P5\n", b"P6\n", b"P5 ", b"P6 "),
    "an HTML": (b"<!doctype html", b"<!DOCTYPE html", b"<html"),
}
_BRANDS = {  # of ISO media files, at byte 8
    b"avis": "an animated AVIF", b"msf1": "a HEIF sequence", b"hevc": "a HEIC sequence", b"hevx": "a HEIC sequence",
    b"qt  ": "a QuickTime video (MOV)", b"crx ": "a Canon raw (CR3)",
}  # fmt: skip
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"mif1")
_RIFFS = {b"WAVE": "a WAV", b"AVI ": "an AVI video"}
_SVG = re.compile(
    rb"\s*(<\?xml[^>]{0,200}\?>\s*)?(<!--.{0,500}?-->\s*)?(<!DOCTYPE svg.{0,500}?>\s*)?<svg[\s>]", re.DOTALL
)


def image_format(data: bytes) -> str:
    """Detect the format, as Pillow names it. Raises ImageError (415), which names another kind of file."""
    for name, signatures in _SIGNATURES.items():
        if data.startswith(signatures):
            if name == "TIFF" and data[8:10] == b"CR":
                _refuse("a Canon raw (CR2)")
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp" and data[8:12] in (b"avif", *_HEIC):
        brands = data[8 : min(int.from_bytes(data[:4]), 200)]  # the main one and the compatible ones
        return "AVIF" if b"avif" in brands else "HEIF"
    if data[128:132] == b"DICM":
        return "DICOM"
    if name := _other_format(data):
        _refuse(name)
    raise ImageError(415, "unsupported_media_type", f"This is not a picture. Send a {READ} image.")


def _refuse(name: str) -> None:
    raise ImageError(415, "unsupported_media_type", f"This is {name} file. Send a {READ} image.")


def _other_format(data: bytes) -> str:
    """Name a file that is not read, with its article; "" if it is unknown."""
    for name, signatures in _OTHERS.items():
        if data.startswith(signatures):
            return name
    if data[4:8] == b"ftyp":
        return _BRANDS.get(data[8:12], "an MP4 video")
    if data[4:8] in (b"moov", b"mdat", b"wide"):
        return "a QuickTime video (MOV)"
    if data[:4] == b"RIFF":
        return _RIFFS.get(data[8:12], "")
    return "an SVG" if _SVG.match(data[:2000].removeprefix(b"\xef\xbb\xbf")) else ""
