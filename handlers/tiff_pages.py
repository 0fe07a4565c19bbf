"""Pages of a TIFF: smaller copies are skipped, channels stored as pages are merged, several pictures are refused."""

import re
import struct
from dataclasses import dataclass

from handlers.errors import ImageError

MAX_PAGES = 1000  # that are counted
MAX_FIELDS = 1000  # of a page
_DETAILED = 20  # pages whose fields are read
_SUBFILE, _OLD_SUBFILE, _WIDTH, _HEIGHT, _DESCRIPTION, _INNER, _DNG = 254, 255, 256, 257, 270, 330, 50706
_MAX_DESCRIPTION = 1 << 16
# Programs that say that the three pages are the channels of one picture: ImageJ, OME, tifffile.
_CHANNELS = (
    re.compile(rb"ImageJ=(?=.*^channels=3\s*$)(?!.*^(slices|frames)=[2-9])", re.DOTALL | re.MULTILINE),
    re.compile(rb'<Pixels(?=[^>]*SizeC="3")(?=[^>]*SizeZ="1")(?=[^>]*SizeT="1")'),
    re.compile(rb'\{(?=.*"axes": "CYX")'),
)


@dataclass(frozen=True)
class Page:
    """A page's place in the file, its size, and whether it says that it is a smaller copy or a mask."""

    offset: int
    width: int = 0
    height: int = 0
    reduced: bool = False
    description: bytes = b""
    raw: bool = False


def pages(data: bytes) -> list[Page]:
    """List the pages, MAX_PAGES at most; the fields of the first ones only are read."""
    order = "<" if data[:2] == b"II" else ">"
    listed: list[Page] = []
    visited: set[int] = set()
    (offset,) = struct.unpack_from(order + "I", data.ljust(8, b"\0"), 4)
    while offset and offset not in visited and offset + 2 <= len(data) and len(listed) < MAX_PAGES:
        visited.add(offset)
        (fields,) = struct.unpack_from(order + "H", data, offset)
        listed.append(_page(data, offset, fields, order) if len(listed) < _DETAILED else Page(offset))
        end = offset + 2 + 12 * fields
        offset = struct.unpack_from(order + "I", data, end)[0] if end + 4 <= len(data) else 0
    return listed


def _page(data: bytes, offset: int, fields: int, order: str) -> Page:
    values: dict[int, int] = {}
    description = b""
    for entry in range(offset + 2, min(offset + 2 + 12 * min(fields, MAX_FIELDS), len(data) - 11), 12):
        tag, kind, length = struct.unpack_from(order + "HHI", data, entry)
        values[tag] = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, entry + 8)[0]
        if tag == _DESCRIPTION:
            start = values[tag] if length > 4 else entry + 8
            description = data[start : start + min(length, _MAX_DESCRIPTION)]
    reduced = bool(values.get(_SUBFILE, 0) & 5) or values.get(_OLD_SUBFILE) == 2
    raw = _DNG in values or (reduced and _INNER in values)
    return Page(offset, values.get(_WIDTH, 0), values.get(_HEIGHT, 0), reduced, description, raw)


def pages_to_read(data: bytes) -> list[Page]:
    """Return the pages of the picture: one, or three that are its channels.

    Raises:
        ImageError: 400 for several pictures, 415 for a camera's raw file.
    """
    listed = pages(data)
    if not listed:
        return []
    first = listed[0]
    if first.raw:
        raise ImageError(
            415, "unsupported_media_type", "This is a camera raw file (DNG, NEF or similar). Export it as JPEG."
        )
    pictures = [first] + [page for page in listed[1:] if not _is_copy(page, first)]
    if len(pictures) == 1:
        return pictures
    same_size = len({(page.width, page.height) for page in pictures}) == 1
    if len(pictures) == 3 and same_size and any(pattern.search(first.description) for pattern in _CHANNELS):
        return pictures
    raise ImageError(
        400,
        "several_pages",
        f"This TIFF has {len(pictures)} pages. Send one picture: save the page as a file of its own.",
    )


def _is_copy(page: Page, first: Page) -> bool:
    """Return whether a page is a smaller copy of the first: by its own word, or by half its size and the same shape."""
    if page.reduced:
        return True
    if not page.width or not page.height or 2 * max(page.width, page.height) > max(first.width, first.height) + 2:
        return False
    return abs(page.width * first.height - page.height * first.width) <= 0.05 * page.width * first.height + first.height
