"""Random numbers of a batch's images, the same however processes divide the batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


class Draws:
    """Random numbers for some rows of a batch.

    Every number is drawn for the whole batch, so an image's numbers depend on the seed and its place in the batch only.
    They are on the CPU, so that every device sees the same.

    Args:
        seed: numbers that identify the batch, such as seed, epoch and step.
        size: images of the whole batch.
        rows: the rows to draw for; all by default.
    """

    def __init__(self, seed: Sequence[int], size: int, rows: slice = slice(None)) -> None:
        self.size, self.rows = size, rows
        number = int(np.random.SeedSequence(seed).generate_state(1)[0])
        self.generator = torch.Generator().manual_seed(number)

    def __len__(self) -> int:
        return len(range(self.size)[self.rows])

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Draw a number from U(low, high) for each row: float32 (N,)."""
        return low + (high - low) * torch.rand(self.size, generator=self.generator)[self.rows]

    def integers(self, end: int) -> Tensor:
        """Draw an integer from 0 to end - 1 for each row: int64 (N,)."""
        return torch.randint(end, (self.size,), generator=self.generator)[self.rows]

    def joint_seed(self) -> int:
        """Draw one seed, the same for all rows of the batch."""
        return int(torch.randint(2**31, (1,), generator=self.generator))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator of the CPU, which torchvision's transforms use, inside the context only."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
