"""A seeded corpus of hostile requests, `corpus(seed, size)`, which tests/test_hostile.py sends.

Each item is the bytes of one request and the statuses that may answer it.
"""

import io
import itertools
import random
from collections.abc import Sequence
from functools import cache

from tests.hostile import images, newer, requests
from tests.hostile.requests import Item
from training.data.synthetic import CLASSES, draw_lesion


@cache
def photograph(seed: int) -> bytes:
    """The JPEG of a drawn lesion."""
    buffer = io.BytesIO()
    draw_lesion(seed, CLASSES[seed % len(CLASSES)]).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def corpus(seed: int, size: int, pictures: Sequence[bytes] = ()) -> list[Item]:
    """Return `size` items in random order, the same for the same arguments.

    Each handwritten item comes once, or a random sample if there are more than `size`; damaged files fill the rest.
    The bombs (`images.bombs`) are not included, as each is large.

    Args:
        pictures: the original files; drawn lesions by default.
    """
    rng = random.Random(seed)
    originals = list(pictures) or [photograph(number) for number in range(8)]
    data = originals[0]
    items = [
        *requests.files(rng, "odd", images.odd(data)), *requests.files(rng, "newer", newer.newer(data)),
        *requests.files(rng, "refused", images.refused(data)),
        *requests.files(rng, "foreign", images.foreign(data)), *requests.json_bodies(data), *requests.options(data),
        *requests.forms(data), *requests.broken_forms(data), *requests.heads(data), *requests.addresses(data),
    ]  # fmt: skip
    if len(items) > size:
        return rng.sample(items, size)
    # A quarter of the damaged files each: older formats, AVIF, HEIC, DICOM.
    sources = [
        (name, newer.sources(original, name) if name else images.sources(original))
        for original in originals
        for name in ("", *newer.FORMATS)
    ]
    for name, source in itertools.islice(itertools.cycle(sources), size - len(items)):
        items += requests.files(rng, f"damaged {name}".strip(), iter([images.damaged(rng, source)]))
    rng.shuffle(items)
    return items
