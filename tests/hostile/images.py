"""Hostile files: odd, damaged, mislabelled and foreign ones, each with the statuses that may answer it.

They are made from whole pictures (`odd`, `bombs`, `foreign`) or by damaging them (`damaged`). The same seed gives the
same bytes.
"""

import gzip
import io
import json
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

OK, BROKEN, LARGE, FOREIGN = (frozenset({status}) for status in (200, 400, 413, 415))
PERHAPS = OK | BROKEN | LARGE | FOREIGN  # a randomly damaged file may still be a picture
MEGAPIXELS_900 = (30_000, 30_000)
SIDE = 240  # longer side of re-encoded pictures, in pixels
TIFF_COMPRESSIONS = ("raw", "tiff_lzw", "tiff_deflate", "tiff_adobe_deflate", "jpeg", "packbits", "lzma", "zstd")
TIFF_BILEVEL = ("group3", "group4", "tiff_ccitt")
# A place and a name that must never appear in a log.
GPS = {1: "N", 2: (46.0, 32.0, 14.5), 3: "E", 4: (8.0, 2.0, 31.5)}
SECRET = "Hildegard-Mustermann-1947"


@dataclass(frozen=True)
class Case:
    """One file, and the statuses that may answer it."""

    name: str
    data: bytes
    expected: frozenset[int]


Cases = Iterator[Case]


def encode(image: Image.Image, format_: str, **options: object) -> bytes:
    """The bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def small(data: bytes) -> Image.Image:
    """A picture to be encoded in other ways."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.thumbnail((SIDE, SIDE))
    return image


def exif(orientation: int | None = None) -> Image.Exif:
    """EXIF as a phone writes it: orientation, maker, a patient's name and where the picture was taken."""
    tags = Image.Exif()
    tags[0x010F], tags[0x010E], tags[0x9286] = "Maker", SECRET, SECRET
    tags.get_ifd(0x8825).update(GPS)
    if orientation is not None:
        tags[0x0112] = orientation
    return tags


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """The picture as a camera stores it that was held in that way: EXIF's orientation turns it upright again."""
    turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose: the inverse of what the tag asks for
    return image.transpose(Image.Transpose(turn[orientation])) if orientation in turn else image


def odd(data: bytes) -> Cases:
    """Whole pictures in every form that is read: all of them are answered."""
    image = small(data)
    grey, clear = image.convert("L"), image.convert("RGBA")
    clear.putalpha(grey)
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    forms: dict[str, tuple[Image.Image, str, dict[str, object]]] = {
        "jpeg": (image, "JPEG", {}),
        "jpeg progressive": (image, "JPEG", {"progressive": True}),
        "jpeg quality 1": (image, "JPEG", {"quality": 1}),
        "jpeg 444": (image, "JPEG", {"subsampling": 0}),
        "jpeg grey": (grey, "JPEG", {}),
        "jpeg CMYK": (image.convert("CMYK"), "JPEG", {}),
        "jpeg with a comment": (image, "JPEG", {"comment": b"<script>" + SECRET.encode()}),
        "jpeg with ICC rubbish": (image, "JPEG", {"icc_profile": bytes(range(256)) * 600}),
        "png": (image, "PNG", {}),
        "png 1 bit": (image.convert("1"), "PNG", {}),
        "png grey": (grey, "PNG", {}),
        "png grey alpha": (clear.convert("LA"), "PNG", {}),
        "png palette": (image.quantize(17), "PNG", {}),
        "png palette clear": (image.quantize(17), "PNG", {"transparency": 3}),
        "png palette alphas": (image.quantize(5), "PNG", {"transparency": b"\0\x40\x80\xc0\xff"}),
        "png clear colour": (image, "PNG", {"transparency": (1, 2, 3)}),
        "png alpha": (clear, "PNG", {}),
        "png 16 bit": (sixteen, "PNG", {}),
        "webp": (image, "WEBP", {}),
        "webp lossless": (image, "WEBP", {"lossless": True}),
        "webp alpha": (clear, "WEBP", {}),
        "webp exif": (image, "WEBP", {"exif": exif(6)}),
        "bmp": (image, "BMP", {}),
        "bmp 1 bit": (image.convert("1"), "BMP", {}),
        "bmp grey": (grey, "BMP", {}),
        "bmp palette": (image.quantize(200), "BMP", {}),
        "bmp alpha": (clear, "BMP", {}),
        "tiff 16 bit": (sixteen, "TIFF", {}),
        "tiff CMYK": (image.convert("CMYK"), "TIFF", {}),
        "tiff Lab": (image.convert("LAB"), "TIFF", {}),
        "tiff alpha": (clear, "TIFF", {}),
        "tiff palette": (image.quantize(9), "TIFF", {}),
        "tiff with a thumbnail": (image, "TIFF", {"save_all": True, "append_images": [image.reduce(4)]}),
        "mpo": (image, "MPO", {"save_all": True, "append_images": [image]}),
    }
    forms |= {f"tiff {name}": (image, "TIFF", {"compression": name}) for name in TIFF_COMPRESSIONS}
    forms |= {f"tiff {name}": (image.convert("1"), "TIFF", {"compression": name}) for name in TIFF_BILEVEL}
    forms |= {f"jpeg orientation {n}": (turned(image, n), "JPEG", {"exif": exif(n)}) for n in range(1, 9)}
    forms |= {f"jpeg orientation {n}": (image, "JPEG", {"exif": exif(n)}) for n in (0, 9, 65535)}
    forms |= {f"png orientation {n}": (turned(image, n), "PNG", {"exif": exif(n)}) for n in (3, 6, 8)}
    for name, (picture, format_, options) in forms.items():
        yield Case(name, encode(picture, format_, **options), OK)
    whole = encode(image, "JPEG")
    for name, tail in {
        "zip": zipped(), "text": b"trailing words", "zeros": bytes(5000), "another picture": encode(image, "PNG"),
        "script": b"<script>alert(1)</script>", "pdf": b"%PDF-1.7\n1 0 obj\n", "itself": whole,
    }.items():  # fmt: skip
        yield Case(f"jpeg and {name} behind it", whole + tail, OK)
        yield Case(f"png and {name} behind it", encode(image, "PNG") + tail, OK)
    yield Case("16 by 16", encode(image.resize((16, 16)), "PNG"), OK)
    yield Case("8 to 1", encode(image.resize((640, 80)), "JPEG"), OK)
    # 50 megapixels of one bit each, just within the limit.
    yield Case("49 megapixels", png(7000, 7000, depth=1, colour=0), OK)


def refused(data: bytes) -> Cases:
    """Whole pictures that are refused for what they are."""
    image = small(data)
    frames = {"save_all": True, "append_images": [image.transpose(Image.Transpose.ROTATE_180), image]}
    yield Case("tiff of pages", encode(image, "TIFF", save_all=True, append_images=[image.convert("L")]), BROKEN)
    yield Case("black", encode(Image.new("RGB", (64, 64)), "PNG"), BROKEN)
    yield Case("white", encode(Image.new("L", (64, 64), 255), "JPEG"), BROKEN)
    yield Case("animated png", encode(image, "PNG", **frames), BROKEN)
    yield Case("animated webp", encode(image, "WEBP", **frames), BROKEN)
    yield Case("tiff of floats", encode(image.convert("F"), "TIFF"), BROKEN)
    yield Case("too small", encode(image.resize((15, 200)), "PNG"), BROKEN)
    yield Case("one pixel", encode(image.resize((1, 1)), "PNG"), BROKEN)
    yield Case("too long", encode(image.resize((2000, 20)), "JPEG"), BROKEN)
    yield Case("too high", encode(image.resize((20, 2000)), "TIFF"), BROKEN)
    yield Case("animated gif", encode(image, "GIF", **frames), FOREIGN)
    for format_ in ("GIF", "PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000", "DDS", "EPS", "PDF", "MSP", "XBM"):
        mode = "1" if format_ in ("MSP", "XBM") else "RGB"
        yield Case(format_.lower(), encode(image.convert(mode), format_), FOREIGN)
    yield Case("avif without a picture", b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miafMA1B" + data[:500], BROKEN)
    yield Case("heic without a picture", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + data[:500], BROKEN)


def zipped() -> bytes:
    """An archive with a long run of zeros in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("../../lesion.jpg", bytes(1 << 20))
    return buffer.getvalue()


def foreign(data: bytes) -> Cases:
    """Everything else that people and scanners send."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("lesion.jpg"))
    others = {
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        "svg entities": b"<!DOCTYPE s [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;&a;&a;'>]><svg>&b;</svg>",
        "html": b"<!doctype html><html><script>alert(1)</script></html>",
        "pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<<>>\n%%EOF",
        "text": b"This is my lesion. " * 50, "utf-16": "Läsion".encode("utf-16"), "nul": b"\0", "nuls": bytes(4096),
        "newline": b"\n", "json": json.dumps({"image": "no"}).encode(), "xml": b"<?xml version='1.0'?><a/>",
        "zip": zipped(), "gzip": gzip.compress(data), "zlib": zlib.compress(data), "tar": tar.getvalue(),
        "zstd": b"\x28\xb5\x2f\xfd" + data[:99], "7z": b"7z\xbc\xaf\x27\x1c" + data[:99],
        "rar": b"Rar!\x1a\x07" + data[:99],
        "elf": b"\x7fELF\x02\x01\x01" + bytes(500), "exe": b"MZ" + bytes(500), "class": b"\xca\xfe\xba\xbe" + bytes(99),
        "pickle": b"cos\nsystem\n(S'true'\ntR.", "postscript": b"%!PS-Adobe-3.0\n(/etc/passwd) (r) file\n",
        "wave": b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), "mp4": b"\0\0\0\x18ftypmp42" + bytes(99),
        "psd": b"8BPS\0\x01" + bytes(99),
        "gif before a jpeg": b"GIF89a" + data, "text before a jpeg": b" " + data,
        "bom before a jpeg": b"\xef\xbb\xbf" + data, "backwards": data[::-1],
        "inverted": bytes(255 - b for b in data[:5000]),
        "bigtiff": b"II+\0\x08\0\0\0" + bytes(99), "only the second half": data[len(data) // 2 :] or b"x",
    }  # fmt: skip
    for name, body in others.items():
        yield Case(name, body, FOREIGN)
    yield Case("dicom without a picture", bytes(128) + b"DICM" + bytes(99), BROKEN)
    yield Case("empty", b"", BROKEN)
    for name, head in SIGNATURES.items():
        yield Case(f"the head of a {name} and nothing", head, BROKEN | FOREIGN)
        yield Case(f"the head of a {name} and zeros", head + bytes(999), BROKEN | FOREIGN)
        yield Case(f"the head of a {name} and 0xff", head + b"\xff" * 999, BROKEN | FOREIGN | LARGE)
        for other, body in (("jpeg", data), ("text", b"words " * 99)):
            yield Case(f"the head of a {name} on a {other}", head + body[len(head) :], PERHAPS)


SIGNATURES = {
    "jpeg": b"\xff\xd8\xff\xe0", "png": b"\x89PNG\r\n\x1a\n", "bmp": b"BM", "tiff": b"II*\0", "tiff mm": b"MM\0*",
    "webp": b"RIFF\xff\xff\0\0WEBPVP8 ", "webp lossless": b"RIFF\xff\xff\0\0WEBPVP8L",
    "webp x": b"RIFF\xff\xff\0\0WEBPVP8X",
}  # fmt: skip


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int = 8, colour: int = 2, more: bytes = b"", whole: bool = True) -> bytes:
    """A PNG written by hand, of any size, black above and white below; without `whole` it claims a size and holds a
    line at most."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    line = bytes(1 + (width * depth * samples + 7) // 8)
    packer = zlib.compressobj(9)
    white = b"\0" + b"\xff" * (len(line) - 1)
    packed = [packer.compress(line if row <= height // 2 else white) for row in range(height if whole else 1)]
    data = b"".join(packed) + packer.flush()
    return SIGNATURES["png"] + header + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff(width: int, height: int, **tags: int | tuple[int, int, int]) -> bytes:
    """A TIFF that claims a size and holds next to nothing; `tags` as t273=…, others in place of the usual ones: one
    value, or type, number of values, and where they are."""
    values: dict = {256: width, 257: height, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: 64}
    values |= {int(name[1:]): value for name, value in tags.items()}
    fields = {tag: value if isinstance(value, tuple) else (4, 1, value) for tag, value in values.items()}
    entries = b"".join(struct.pack("<HHII", tag, *field) for tag, field in sorted(fields.items()))
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + struct.pack("<I", 0) + bytes(64)


def bombs(data: bytes) -> Cases:
    """Little to send, much to do: sizes that are claimed, and data that grow when they are unpacked."""
    yield Case("30,000 by 30,000 in 220 KB, whole", png(*MEGAPIXELS_900, depth=2, colour=0), LARGE)
    image = small(data)
    jpeg = encode(image, "JPEG")
    start = jpeg.index(b"\xff\xc0") + 5
    for width, height in ((30_000, 30_000), (65_535, 65_535), (65_535, 9_000), (20_000, 2_501)):
        size = f"{width} by {height}"
        yield Case(f"png {size}", png(width, height, whole=False), LARGE)
        yield Case(f"tiff {size}", tiff(width, height), LARGE)
        yield Case(f"bmp {size}", bmp(width, height), LARGE)
        yield Case(f"bmp {size}, upside down", bmp(width, -height), LARGE)
        yield Case(f"jpeg {size}", jpeg[:start] + struct.pack(">HH", height, width) + jpeg[start + 4 :], LARGE)
        yield Case(f"webp {size}", webp_canvas(width, height), LARGE | BROKEN)
    yield Case("webp lossless 16,383 by 16,383", webp_lossless(16_383, 16_383), LARGE | BROKEN)
    largest = (
        SIGNATURES["png"] + chunk(b"IHDR", b"\x7f\xff\xff\xff" * 2 + b"\x08\x02\0\0\0") + chunk(b"IDAT", bytes(64))
    )
    yield Case("png of 2^31 by 2^31", largest, LARGE | BROKEN)
    yield Case("tiff 2^32", tiff(2**32 - 1, 2**32 - 1), LARGE | BROKEN)
    yield Case("bmp negative", bmp(-30_000, 30_000), BROKEN | LARGE)
    yield Case("nothing by nothing", png(0, 0, whole=False), BROKEN)
    for kind in (b"zTXt", b"iTXt", b"iCCP"):
        body = zlib.compress(bytes(80 << 20), 9)
        middle = b"key\0\x01\0\0\0" if kind == b"iTXt" else b"key\0\0"
        yield Case(f"png with 80 MB of {kind.decode()}", png(64, 64, more=chunk(kind, middle + body)), PERHAPS)
    yield Case("png of 50,000 chunks", png(64, 64, more=chunk(b"tEXt", b"a\0b") * 50_000), OK)
    yield Case("png of a million chunks", png(64, 64, more=chunk(b"prVt", b"") * 1_000_000), BROKEN)
    yield Case("png of a billion frames", png(64, 64, more=chunk(b"acTL", struct.pack(">II", 10**9, 0))), PERHAPS)
    yield Case("png that says more than it holds", png(5000, 5000, whole=False), PERHAPS)
    yield Case("tiff of strips that are not there", tiff(6000, 6000, t278=1), BROKEN)
    yield Case("tiff that points behind its end", tiff(600, 600, t273=2**31, t279=2**31), BROKEN)
    yield Case("tiff of 60,000 samples", tiff(600, 600, t277=60_000), BROKEN)
    for number in (0, 2, 5, 7, 8, 9, 50_000, 34712, 2**31):
        yield Case(f"tiff compressed in way {number}", tiff(64, 64, t259=number), PERHAPS)
    endless = bytearray(tiff(64, 64))
    endless[-68:-64] = struct.pack("<I", 8)  # the next page is this page
    yield Case("tiff of endless pages", bytes(endless), PERHAPS)
    large = Image.linear_gradient("L").resize((6000, 6000))
    for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        yield Case(f"36 megapixels of {name}", encode(large, "TIFF", compression=name), OK)
    progressive = encode(Image.new("L", (7000, 7000)), "JPEG", progressive=True)
    yield Case("progressive jpeg of 10,000 scans", more_scans(progressive, 10_000), BROKEN)
    yield Case("jpeg of two million segments", jpeg[:2] + b"\xff\xe1\0\x02" * 2_000_000 + jpeg[2:], BROKEN)
    yield Case(
        "jpeg of 34 MiB of comments", jpeg[:2] + (b"\xff\xfe\xff\xff" + bytes(65533)) * 540 + jpeg[2:], OK | LARGE
    )
    exif = b"\xff\xe1\0\xd0Exif\0\0" + bytes(200)
    yield Case("jpeg of 90,000 segments of Exif", jpeg[:2] + exif * 90_000 + jpeg[2:], BROKEN)
    tiles = tiff(4000, 5000, t322=1, t323=1, t324=(1, 20_000_000, 200))
    yield Case("tiff of 20 million tiles", tiles + bytes(20_000_000), BROKEN)
    yield Case("tiff of 2.5 million resolutions", tiff(64, 64, t282=(5, 2_500_000, 200)) + bytes(20_000_000), BROKEN)
    profile = chunk(b"iCCP", b"key\0\0" + zlib.compress(bytes(1_000_000), 9))
    yield Case("png of 15,000 profiles", png(64, 64, more=profile * 15_000), OK)
    turns = b"MM\0*" + struct.pack(">IHHHII", 8, 1, 0x112, 5, 2_000_000, 26) + bytes(16_000_000)
    yield Case("png of two million orientations", png(64, 64, more=chunk(b"eXIf", turns)), BROKEN)
    segment = b"\xff\xe1\xff\xffExif\0\0" + bytes(65527)
    yield Case("jpeg that ends, with Exif behind it", jpeg[:2] + b"\xff\xd9" + segment * 300 + jpeg[2:], BROKEN)
    yield Case("jpeg of 20 MB of padding", jpeg[:2] + b"\xff" * 20_000_000 + jpeg[2:], BROKEN)
    nameless = chunk(b"zTXt", b"\0\0" + zlib.compress(bytes(1 << 20), 9))
    yield Case("png of 15,000 texts", png(64, 64, more=nameless * 15_000), OK)
    raw = b"Raw profile type exif\0\nexif\n%8d\n" % len(turns) + turns[:8_000_000].hex().encode()
    yield Case("png of a million orientations, as text", png(64, 64, more=chunk(b"tEXt", raw)), BROKEN)
    yield Case("png of 49 megapixels of 16 bits", png(7000, 7000, 16, 6, whole=False), BROKEN)
    strips = tiff(6000, 6000, t273=(4, 100_000, 200), t278=1, t279=(4, 100_000, 400_200)) + bytes(1_000_000)
    yield Case("tiff of 100,000 strips at one place", strips, BROKEN)
    yield Case("bmp of 7000 by 7000 in run lengths", bmp_runs(7000), BROKEN)
    yield Case(
        "exif of 60 KB of rubbish", jpeg[:2] + b"\xff\xe1\xea\x62Exif\0\0MM\0*" + b"\xff" * 59990 + jpeg[2:], PERHAPS
    )


def more_scans(progressive: bytes, number: int) -> bytes:
    """A progressive JPEG whose last scan comes again and again, each of which costs a walk over the whole picture."""
    start = progressive.rindex(b"\xff\xda")
    return progressive[:-2] + progressive[start:-2] * number + progressive[-2:]


def bmp(width: int, height: int) -> bytes:
    """A BMP that claims a size (negative: upside down) and holds 64 bytes."""
    return (
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 118, 0, 0, 54, 40, width, height, 1, 24, 0, 64, 0, 0, 0, 0) + bytes(64)
    )


def bmp_runs(side: int) -> bytes:
    """A BMP of four bytes a row: a run of one pixel, and the rest left out."""
    body = b"\x01\x05\0\0" * side + b"\0\1"
    start = 54 + 1024
    head = struct.pack("<IHHI", start + len(body), 0, 0, start)
    head += struct.pack("<IiiHHIIiiII", 40, side, side, 1, 8, 1, len(body), 0, 0, 256, 0)
    return b"BM" + head + bytes(1024) + body


def riff(kind: bytes, body: bytes) -> bytes:
    inner = b"WEBP" + kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    return b"RIFF" + struct.pack("<I", len(inner)) + inner


def webp_canvas(width: int, height: int) -> bytes:
    """An extended WebP that claims a canvas and holds no picture."""
    return riff(b"VP8X", b"\0\0\0\0" + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little"))


def webp_lossless(width: int, height: int) -> bytes:
    """The header of a lossless WebP of that size, and zeros."""
    bits = (width - 1) | (height - 1) << 14
    return riff(b"VP8L", b"\x2f" + struct.pack("<I", bits) + bytes(64))


def damaged(rng: random.Random, sources: list[bytes]) -> Case:
    """One picture with a random wound: cut off, bits turned, a part zeroed, repeated, moved, or taken from another."""
    whole = rng.choice(sources)
    data = bytearray(whole)
    wound = rng.choice(("cut", "bits", "bytes", "zeroed", "repeated", "left out", "swapped", "another's", "lengths"))
    at, length = rng.randrange(len(data)), rng.choice((1, 8, 64, 512, 4096))
    if wound == "cut":
        del data[at:]
    elif wound == "bits":
        for _ in range(rng.choice((1, 1, 3, 30))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif wound == "bytes":
        for _ in range(rng.choice((1, 3, 30))):
            data[rng.randrange(min(len(data), rng.choice((60, 600, len(data)))))] = rng.choice((0, 1, 127, 128, 255))
    elif wound == "zeroed":
        data[at : at + length] = bytes(len(data[at : at + length]))
    elif wound == "repeated":
        data[at:at] = data[at : at + length] * rng.choice((1, 2, 20))
    elif wound == "left out":
        del data[at : at + length]
    elif wound == "swapped":
        other = rng.randrange(len(data))
        data[at : at + length], data[other : other + length] = data[other : other + length], data[at : at + length]
    elif wound == "another's":
        stranger = rng.choice(sources)
        data[at:] = stranger[min(at, len(stranger) - 1) :]
    else:  # what may be a length or a size, made large or negative
        at = rng.randrange(min(len(data), 200))
        data[at : at + 4] = rng.choice((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\x80\0\0\0"))[
            : len(data) - at
        ]
    expected = PERHAPS if data else BROKEN
    return Case(f"{wound} at {at}", bytes(data), expected)


def sources(data: bytes) -> list[bytes]:
    """One file of every format and way of packing, to be damaged."""
    image = small(data)
    made = [encode(image, format_) for format_ in ("JPEG", "PNG", "WEBP", "BMP")]
    made += [encode(image, "JPEG", progressive=True, exif=exif(6)), encode(image, "WEBP", lossless=True)]
    made += [encode(image.quantize(9), "PNG", transparency=2)]
    made += [encode(image, "TIFF", compression=name) for name in ("raw", "tiff_lzw", "tiff_adobe_deflate", "jpeg")]
    made += [encode(image.convert("1"), "TIFF", compression="group4")]
    return [*made, data, data]
