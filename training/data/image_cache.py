"""Images decoded and resized once, into a memory-mapped file of uint8 pixels.

Decoding and resizing are those of serving, so evaluation sees the same pixels.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from handlers.decoding import ignore_oddities
from handlers.errors import ImageError, UserError
from handlers.preprocessing import Preprocessing

SCHEMA = 2  # of the cache; part of its key


class DataError(UserError):
    """The data cannot be used for training."""


def build_cache(
    rows: pd.DataFrame,
    preprocessing: Preprocessing,
    cache_dir: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.uint8]:
    """Return the pixels (N, S, S, 3) of the manifest's rows, in their order: read-only, from a file in `cache_dir`.

    The file's name is a hash of the images' digests and of the resizing, so a changed data set or size makes another
    file. A file gets its name only when it is complete.

    Args:
        rows: rows of a manifest (training.data.manifest.read_manifest).
        preprocessing: decodes and resizes each image, as in serving.
        cache_dir: made if it is missing.
        progress: called with (images done, all images). It may raise to stop.

    Raises:
        DataError: an image is missing, damaged or changed since the manifest was written, or the disk is full.
    """
    size = preprocessing.image_size
    hashes = rows["sha256"].tolist()
    described = {"schema": SCHEMA, "size": size, "interpolation": preprocessing.interpolation, "sha256": hashes}
    key = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
    path = cache_dir / f"{size}px-{key}.npy"
    try:
        if not path.is_file():
            cache_dir.mkdir(parents=True, exist_ok=True)
            needed, free = len(rows) * size * size * 3, shutil.disk_usage(cache_dir).free
            if needed > free:
                raise DataError(
                    f"The image cache needs {needed >> 20:,} MiB, but {cache_dir} has {free >> 20:,} MiB free. Free "
                    "some space, or set cache_dir to another disk."
                )
            temporary = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
            try:
                _fill(temporary, rows, preprocessing, progress)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        pixels: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    except OSError as error:
        raise DataError(
            f"The image cache in {cache_dir} cannot be used: {error.strerror or error}. Set cache_dir to a folder that "
            "can be written."
        ) from error
    return pixels


def _fill(
    path: Path,
    rows: pd.DataFrame,
    preprocessing: Preprocessing,
    progress: Callable[[int, int], None],
) -> None:
    size = preprocessing.image_size
    pixels = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(len(rows), size, size, 3))

    paths, hashes = rows["path"].tolist(), rows["sha256"].tolist()

    def decode(row: int) -> None:
        file = Path(paths[row])
        try:
            pixels[row], decoded = preprocessing(file.read_bytes())
        except OSError as error:
            raise DataError(f"{file} cannot be read ({error.strerror}). Run prepare_data.py again.") from error
        except ImageError as error:
            raise DataError(f"{file} cannot be read. {error}") from error
        if decoded.sha256 != hashes[row]:
            raise DataError(f"{file} has changed since the manifest was written. Run prepare_data.py again.")

    ignore_oddities()
    # Threads suffice: Pillow releases the interpreter lock while it decodes and resizes.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for done, _ in enumerate(pool.map(decode, range(len(rows))), start=1):
                progress(done, len(rows))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    pixels.flush()
