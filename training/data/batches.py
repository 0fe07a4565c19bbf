"""From the manifest to batches: splits loaded through the image cache, the order of an epoch, batches on the device."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from handlers.metadata import Metadata
from handlers.preprocessing import Preprocessing
from handlers.taxonomy import CODES, UNKNOWN
from training.data.draws import Draws
from training.data.image_cache import build_cache


def classes_in(frame: pd.DataFrame) -> tuple[str, ...]:
    """Return the codes with at least one training image, in taxonomy order. These get a logit."""
    present = set(frame.loc[frame["split"] == "train", "label"])
    return tuple(code for code in CODES if code in present)


@dataclass(frozen=True)
class Images:
    """The images of a split.

    `pixels` is uint8 (N, S, S, 3), memory-mapped. `labels` is int64 (N,), with -1 for a class without a logit.
    `metadata` is float32 (N, D), encoded.
    """

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]
    lesions: NDArray[np.str_]
    sources: NDArray[np.str_]
    metadata: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, rows: slice) -> "Images":
        """Return some of the images."""
        return Images(*(getattr(self, column.name)[rows] for column in fields(self)))


def load_split(
    frame: pd.DataFrame,
    split: str,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    cache_dir: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
    metadata: Metadata | None = None,
) -> Images:
    """Load one split of a manifest through the cache. `classes` are the codes that have a logit. Raises DataError."""
    rows = frame[frame["split"] == split].reset_index(drop=True)
    index = {code: i for i, code in enumerate(classes)}
    return Images(
        build_cache(rows, preprocessing, cache_dir, progress),
        rows["label"].map(lambda code: index.get(code, -1)).to_numpy(np.int64),
        rows["lesion_id"].to_numpy(str),
        rows["source"].to_numpy(str),
        encode_rows(rows, metadata or Metadata()),
    )


def encode_rows(rows: pd.DataFrame, metadata: Metadata) -> NDArray[np.float32]:
    """Encode the manifest's age, sex and site for the network: (N, D). An unknown word counts as missing."""
    records = rows[list(metadata.fields)].to_dict("records")
    return np.array([metadata.encode(metadata.understood(record)) for record in records], np.float32).reshape(
        len(rows), -1
    )


def sampling_weights(images: Images, power: float, by_source: bool) -> NDArray[np.float64]:
    """Return each training image's share (N,) of the draws: its group's frequency^-power, summing to 1.

    A group is a class, or a class of one source.
    """
    sources = images.sources if by_source else np.zeros(len(images), str)
    names = np.char.add(np.char.add(images.labels.astype(str), " "), sources)
    _, groups, counts = np.unique(names, return_inverse=True, return_counts=True)
    weights = counts[groups] ** -float(power)
    return np.asarray(weights / weights.sum(), np.float64)


def drawn_shares(
    labels: NDArray[np.int64], weights: NDArray[np.float64], classes: Sequence[str], outliers: float
) -> NDArray[np.float64]:
    """Return each class's expected share (K,) of an epoch's images, when `outliers` of them become UNK."""
    shares = np.bincount(labels, weights, len(classes)) * (1 - outliers)
    if outliers:
        shares[classes.index(UNKNOWN)] += outliers
    return np.asarray(shares)


def epoch_order(weights: NDArray[np.float64], seed: int, epoch: int) -> NDArray[np.int64]:
    """Return the order in which an epoch visits the training images: N indices, from `sampling_weights`.

    A shuffle if the weights are equal, otherwise draws with replacement. The order depends on the arguments alone, so a
    resumed epoch is the same epoch.
    """
    rng = np.random.default_rng((seed, epoch))
    if np.ptp(weights) < 1e-12:
        return rng.permutation(len(weights))
    return rng.choice(len(weights), size=len(weights), p=weights)


def even_batches(order: NDArray[np.int64], batch_size: int) -> list[NDArray[np.int64]]:
    """Divide the order into the fewest batches of at most `batch_size` images; their sizes differ by one at most.

    A short last batch would weigh its images more, and batch norm cannot use a batch of one.
    """
    return np.array_split(order, -(-len(order) // batch_size))


@dataclass(frozen=True)
class BatchPart:
    """The rows of a batch that a process computes at once."""

    batch: NDArray[np.int64]  # indices of all images of the batch
    rows: slice
    step: int  # of the epoch
    is_last: bool  # of the process's parts of this batch

    @property
    def images(self) -> NDArray[np.int64]:
        """The indices (N,) of the part's images."""
        return self.batch[self.rows]

    @property
    def share(self) -> float:
        """The part's share of the batch's images."""
        return len(self.images) / len(self.batch)


def parts_of(batches: Sequence[NDArray[np.int64]], processes: int, process: int, accumulate: int) -> list[BatchPart]:
    """Return one process's parts of an epoch: `accumulate` of each batch, one after another.

    All parts of all processes hold each image of a batch once, and differ by one image at most.
    """
    count, first = processes * accumulate, process * accumulate
    return [
        BatchPart(
            batch, slice(len(batch) * k // count, len(batch) * (k + 1) // count), step, k == first + accumulate - 1
        )
        for step, batch in enumerate(batches)
        for k in range(first, first + accumulate)
    ]


def batches(
    images: Images, chosen: Sequence[NDArray[np.int64]], device: torch.device
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield pixels uint8 (N, S, S, 3), labels int64 (N,) and metadata float32 (N, D) on `device`, for each of `chosen`.

    The next batch is gathered while the last one is used.
    """

    def gather(places: NDArray[np.int64]) -> tuple[Tensor, ...]:
        # Rows in file order are read faster from a disk.
        by_place = np.argsort(places)
        pixels = np.empty((len(places), *images.pixels.shape[1:]), np.uint8)
        pixels[by_place] = images.pixels[places[by_place]]
        arrays = (pixels, images.labels[places], images.metadata[places])
        tensors = tuple(torch.from_numpy(array) for array in arrays)
        return tuple(tensor.pin_memory() for tensor in tensors) if device.type == "cuda" else tensors

    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(gather, chosen[0])
        for number in range(1, len(chosen) + 1):
            pixels, labels, metadata = (tensor.to(device, non_blocking=True) for tensor in coming.result())
            if number < len(chosen):
                coming = pool.submit(gather, chosen[number])
            yield pixels, labels, metadata


def withhold(encoded: Tensor, metadata: Metadata, share: float, draws: Draws) -> Tensor:
    """Blank values of encoded metadata (N, D) at random, so that a network learns to do without them.

    An image loses all values with probability `share`, otherwise each value independently with the same probability.
    """
    if not metadata.fields:
        return encoded
    whole = draws.uniform() >= share
    kept = torch.stack([whole & (draws.uniform() >= share) for _ in metadata.fields], 1)
    return encoded * kept[:, list(metadata.columns)].to(encoded)


def standardise(pixels: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Standardise pixels for the network: uint8 (N, S, S, 3) to float32 (N, 3, S, S)."""
    scale, offset = torch.tensor(preprocessing.standardisation, device=pixels.device)
    return (pixels * scale + offset).permute(0, 3, 1, 2).contiguous()
