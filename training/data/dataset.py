"""Manifest to tensors: images decoded once into a cache on disk, batches gathered from it, augmentation by the batch.

The cache is a plain .npy file of uint8 pixels, memory-mapped: gathering a batch is a copy out of the page cache, and
the augmentation is one matrix product and one grid_sample for the whole batch, on the training device. So the loader
costs a few percent of the step even of a small network on two cores.
"""

import hashlib
import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2

from handlers.errors import UserError
from handlers.metadata import Metadata
from handlers.preprocessing import ImageError, Preprocessing, ignore_oddities
from handlers.taxonomy import CODES
from training.config import AugmentationSettings

SCHEMA = 2  # of the cache; part of its key


class DataError(UserError):
    """Data that cannot be trained on, with a sentence saying what to do."""


def classes_in(frame: pd.DataFrame) -> tuple[str, ...]:
    """Codes with at least one training image, in taxonomy order: these and no others get a logit."""
    present = set(frame.loc[frame["split"] == "train", "label"])
    return tuple(code for code in CODES if code in present)


@dataclass(frozen=True)
class Images:
    """A split: `pixels` uint8 (N, S, S, 3), memory-mapped; `labels` int64 (N,), -1 for a class without a logit;
    `metadata` float32 (N, D), encoded."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    lesions: NDArray[np.str_]
    metadata: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.labels)


def load_split(
    frame: pd.DataFrame,
    split: str,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    cache_dir: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    metadata: Metadata | None = None,
) -> Images:
    """The images of one split, through the cache.

    Args:
        frame: the manifest, as training.data.manifest.read_manifest gives it.
        preprocessing: its image_size is the size cached; its decode and resize are those of serving.
        progress: called with (images done, images in all); may raise to stop.
        metadata: what the model takes beside the picture; None: nothing.

    Raises:
        DataError: an image that is missing, damaged, or not the one the manifest speaks of.
    """
    rows = frame[frame["split"] == split].reset_index(drop=True)
    index = {code: i for i, code in enumerate(classes)}
    return Images(
        build_cache(rows, preprocessing, cache_dir, progress),
        rows["label"].map(lambda code: index.get(code, -1)).to_numpy(np.int64),
        rows["lesion_id"].to_numpy(str),
        encode_rows(rows, metadata or Metadata()),
    )


def encode_rows(rows: pd.DataFrame, metadata: Metadata) -> NDArray[np.float32]:
    """The manifest's age, sex and site as the network takes them, (N, D); a word it does not know counts as missing."""
    given = rows[list(metadata.fields)].to_dict("records")
    return np.array([metadata.encode(metadata.understood(row)) for row in given], np.float32).reshape(len(rows), -1)


def build_cache(
    rows: pd.DataFrame,
    preprocessing: Preprocessing,
    cache_dir: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> NDArray[np.uint8]:
    """Pixels (N, S, S, 3) of the manifest's rows, in their order; read-only, backed by a file in `cache_dir`.

    The file's name is a hash of the images' own hashes and of how they are resized, so a changed data set or size
    makes another file and an old one is never mistaken for it. It appears under its name only when complete.

    Raises:
        DataError: see load_split.
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
                    f"The image cache needs {needed >> 20:,} MiB but {cache_dir} has {free >> 20:,} MiB left."
                )
            temporary = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
            try:
                _fill(temporary, rows, preprocessing, progress)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
        pixels: NDArray[np.uint8] = np.load(path, mmap_mode="r")
    except OSError as error:
        raise DataError(f"The image cache in {cache_dir} cannot be used: {error.strerror or error}.") from error
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
            raise DataError(f"{file} cannot be read ({error.strerror}); prepare the manifest again.") from error
        except ImageError as error:
            raise DataError(f"{file}: {error}") from error
        if decoded.sha256 != hashes[row]:
            raise DataError(f"{file} has changed since the manifest was written; prepare the manifest again.")

    ignore_oddities()
    # Threads suffice: Pillow decodes and resizes outside the interpreter lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for done, _ in enumerate(pool.map(decode, range(len(rows))), start=1):
                progress(done, len(rows))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    pixels.flush()


def epoch_order(labels: NDArray[np.int64], seed: int, epoch: int, sampler_power: float = 0.0) -> NDArray[np.int64]:
    """The order in which epoch `epoch` visits the training images, len(labels) indices.

    A shuffle if `sampler_power` is 0, otherwise drawn with replacement with weight frequency^-power. It depends on
    its arguments alone, which is what makes a resumed epoch the same epoch.
    """
    rng = np.random.default_rng((seed, epoch))
    if not sampler_power:
        return rng.permutation(len(labels))
    weights = np.bincount(labels)[labels] ** -float(sampler_power)
    return rng.choice(len(labels), size=len(labels), p=weights / weights.sum())


def batches(
    images: Images, order: NDArray[np.int64], batch_size: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of (uint8 (N, S, S, 3), int64 (N,), float32 (N, D)) on `device`, in `order`: pixels, labels, metadata.

    One is gathered while another is used.
    """

    def gather(start: int) -> tuple[Tensor, ...]:
        chosen = order[start : start + batch_size]
        # reading the rows in file order is kinder to a disk that has to fetch them
        by_place = np.argsort(chosen)
        pixels = np.empty((len(chosen), *images.pixels.shape[1:]), np.uint8)
        pixels[by_place] = images.pixels[chosen[by_place]]
        arrays = (pixels, images.labels[chosen], images.metadata[chosen])
        tensors = tuple(torch.from_numpy(array) for array in arrays)
        return tuple(tensor.pin_memory() for tensor in tensors) if device.type == "cuda" else tensors

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(gather, 0)
        for start in range(0, len(order), batch_size):
            pixels, labels, metadata = (tensor.to(device, non_blocking=True) for tensor in coming.result())
            if start + batch_size < len(order):
                coming = pool.submit(gather, start + batch_size)
            yield pixels, labels, metadata


def withhold(encoded: Tensor, metadata: Metadata, share: float, generator: torch.Generator) -> Tensor:
    """Encoded metadata (N, D) with values taken away, so that a network learns to do without.

    An image loses all of them with probability `share`, else each value by itself.
    """
    if not metadata.fields:
        return encoded
    whole = torch.rand(len(encoded), 1, generator=generator) >= share
    each = torch.rand(len(encoded), len(metadata.fields), generator=generator) >= share
    return encoded * (whole & each)[:, list(metadata.columns)].to(encoded)


def standardise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Pixels as a network takes them: uint8 (N, S, S, 3) to float32 (N, 3, S, S)."""
    scale, offset = torch.tensor(preprocessing.standardisation, device=pixels.device)
    return (pixels * scale + offset).permute(0, 3, 1, 2).contiguous()


class Augment:
    """Random views of a batch: uint8 (N, C, C, 3) of any side C to standardised float32 (N, 3, S, S).

    Flips, quarter turns, rotation, shift, crop and stretch are one affine map, hence one grid_sample; brightness,
    contrast, saturation, hue and the standardisation are one affine map of the colours, hence one matrix product.
    Every image gets its own draw. What a lesion's label survives is allowed: dermoscopy has no upside. RandAugment
    (Cubuk et al. 2020), where it is asked for, comes first, image by image and so more slowly.
    """

    def __init__(self, settings: AugmentationSettings, preprocessing: Preprocessing) -> None:
        self.settings = settings
        self.preprocessing = preprocessing
        self.randaugment = v2.RandAugment(num_ops=2, magnitude=settings.randaugment) if settings.randaugment else None

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch with random numbers from `generator` (on the CPU, so that every device sees the same)."""
        n, size = len(pixels), self.preprocessing.image_size
        theta = self.geometry(n, generator).to(pixels.device)
        channels_first = pixels.permute(0, 3, 1, 2)
        if self.randaugment:  # draws from torch's global generator, which each epoch seeds
            channels_first = torch.stack([self.randaugment(image) for image in channels_first])
        images = channels_first.float()
        # Contrast turns about each image's mean grey, taken before cropping.
        grey = images.mean((2, 3)) @ images.new_tensor(LUMA)
        grid = F.affine_grid(theta, [n, 3, size, size], align_corners=False)
        images = F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        matrix, offset = self.colour(grey.cpu(), generator)
        return torch.baddbmm(offset.to(images.device)[:, :, None], matrix.to(images.device), images.flatten(2)).view(
            n, 3, size, size
        )

    def geometry(self, n: int, generator: torch.Generator) -> Tensor:
        """Affine maps (n, 2, 3) from output to input coordinates, both in [-1, 1]."""
        c = self.settings
        angle = uniform(n, -c.rotate_degrees, c.rotate_degrees, generator) * (math.pi / 180)
        turns = torch.randint(4, (n,), generator=generator) if c.rotate90 else torch.zeros(n)
        angle = angle + turns * (math.pi / 2)
        side = uniform(n, c.crop_scale, 1.0, generator).sqrt()
        stretch = torch.exp(uniform(n, -math.log(c.crop_aspect), math.log(c.crop_aspect), generator) / 2)
        # a stretched crop still fits inside the picture
        width, height = (side * stretch).clamp(max=1), (side / stretch).clamp(max=1)
        mirror = 1 - 2 * torch.randint(2, (n,), generator=generator) if c.flip else torch.ones(n)
        # the crop lies anywhere in the picture, and may leave it by `translate`
        lies = turns % 2 == 1
        across, down = torch.where(lies, height, width), torch.where(lies, width, height)
        x = uniform(n, -1, 1, generator) * (1 - across + 2 * c.translate)
        y = uniform(n, -1, 1, generator) * (1 - down + 2 * c.translate)
        cos, sin = angle.cos(), angle.sin()
        rows = [width * cos * mirror, -height * sin, x, width * sin * mirror, height * cos, y]
        return torch.stack(rows, dim=1).view(n, 2, 3)

    def colour(self, grey: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Matrices (n, 3, 3) and offsets (n, 3) from RGB in [0, 255] to augmented, standardised RGB; `grey` (n,)."""
        c, n = self.settings, len(grey)
        contrast = uniform(n, 1 - c.contrast, 1 + c.contrast, generator)
        gain = uniform(n, 1 - c.brightness, 1 + c.brightness, generator) * contrast
        saturation = uniform(n, 1 - c.saturation, 1 + c.saturation, generator)[:, None, None]
        turn = uniform(n, -c.hue, c.hue, generator) * (2 * math.pi)

        # Hue: a turn of the chroma plane of YIQ (NTSC), where it leaves brightness alone.
        to_yiq = torch.tensor([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
        rotation = torch.eye(3).repeat(n, 1, 1)
        rotation[:, 1, 1] = rotation[:, 2, 2] = turn.cos()
        rotation[:, 1, 2], rotation[:, 2, 1] = -turn.sin(), turn.sin()
        hue = to_yiq.inverse() @ rotation @ to_yiq
        to_grey = torch.tensor(LUMA).expand(3, 3)
        matrix = gain[:, None, None] * (saturation * torch.eye(3) + (1 - saturation) * to_grey) @ hue
        # brightness * (contrast * x + (1 - contrast) * grey): the same for all three channels
        offset = (gain / contrast * (1 - contrast) * grey)[:, None].expand(n, 3)

        scale, shift = torch.tensor(self.preprocessing.standardisation)
        return matrix * scale[:, None], offset * scale + shift


LUMA = [0.299, 0.587, 0.114]  # ITU-R BT.601


def uniform(n: int, low: float, high: float, generator: torch.Generator) -> Tensor:
    """n draws from U(low, high), float32."""
    return low + (high - low) * torch.rand(n, generator=generator)
