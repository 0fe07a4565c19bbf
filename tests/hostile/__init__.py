"""A seeded corpus of what strangers send: `corpus(seed, size)`.

Each item is one request, byte by byte, and the statuses that may answer it. Nothing here is asked of a server; see
tests/test_hostile.py.
"""

import io
import itertools
import random
from collections.abc import Sequence
from functools import cache

from tests.hostile import images, requests
from tests.hostile.requests import Item
from training.data.synthetic import NAMES, draw_lesion


@cache
def photograph(seed: int) -> bytes:
    """The JPEG of a drawn lesion."""
    buffer = io.BytesIO()
    draw_lesion(seed, [*NAMES][seed % len(NAMES)]).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def corpus(seed: int, size: int, pictures: Sequence[bytes] = ()) -> list[Item]:
    """`size` items in random order, the same for the same arguments.

    Everything that is written out comes once, as far as there is room (drawn by lot if not); the rest is damaged.
    The bombs are apart (`images.bombs`), as each is large.

    Args:
        pictures: the files to begin with; drawn lesions if there are none.
    """
    rng = random.Random(seed)
    originals = list(pictures) or [photograph(number) for number in range(8)]
    data = originals[0]
    items = [
        *requests.files(rng, "odd", images.odd(data)), *requests.files(rng, "refused", images.refused(data)),
        *requests.files(rng, "foreign", images.foreign(data)), *requests.json_bodies(data), *requests.options(data),
        *requests.forms(data), *requests.broken_forms(data), *requests.heads(data), *requests.addresses(data),
    ]  # fmt: skip
    if len(items) > size:
        return rng.sample(items, size)
    sources = [images.sources(original) for original in originals]
    wounds = (images.damaged(rng, source) for source in itertools.cycle(sources))
    items += itertools.islice(requests.files(rng, "damaged", wounds), size - len(items))
    rng.shuffle(items)
    return items
