"""The processes of a run that torchrun starts: which one this is, and what they say to each other.

Each process holds the whole network and computes its part of each batch. The first one, rank 0, alone prints, logs and
writes. Without torchrun there is one process, and every method does nothing.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from handlers.errors import UserError
from mlflow_tracking.command_line import console, errors
from training.config import ConfigError, OptimizationSettings
from training.data.batches import BatchPart, Images, parts_of
from training.joint_batch_norm import join_batch_norms

# How long the others wait while one process reads the data. torchrun itself notices at once that a process has died.
PATIENCE = timedelta(hours=2)

T = TypeVar("T")


class RankError(UserError):
    """Another process of the run has ended."""


@dataclass(frozen=True)
class Ranks:
    """The processes of a run.

    Args:
        number: of this process.
        count: of all processes.
        local: this process's number on its machine.
    """

    number: int = 0
    count: int = 1
    local: int = 0

    @property
    def writes(self) -> bool:
        """Whether this process logs and writes files."""
        return self.number == 0

    def device(self, device: torch.device) -> torch.device:
        """Return this process's own device of the kind of `device`. Raises ConfigError."""
        if self.count == 1 or device.type == "cpu":
            return device
        if device.type != "cuda":
            raise ConfigError(f"device={device.type} trains in one process; start training without torchrun.")
        if self.local >= torch.cuda.device_count():
            raise ConfigError(
                f"A machine has {torch.cuda.device_count()} GPUs; start torchrun with at most that --nproc-per-node."
            )
        torch.cuda.set_device(self.local)
        return torch.device("cuda", self.local)

    def in_turn(self, task: Callable[[], T]) -> T:
        """Run a task that leaves files, first in one process of each machine, then in the others, which find them."""
        result = task() if self.local == 0 else None
        self.sum(torch.zeros(1))
        return task() if result is None else result

    def from_first(self, value: T) -> T:
        """Return rank 0's value."""
        if self.count > 1:
            values = [value]
            dist.broadcast_object_list(values, device=torch.device("cpu"))
            return values[0]
        return value

    def gather(self, rows: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the rows of all processes, in their order."""
        if self.count == 1:
            return rows
        parts: list[Any] = [None] * self.count
        dist.all_gather_object(parts, rows)
        return np.concatenate(parts)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up the tensors of all processes."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def largest(self, number: int) -> int:
        """Return the largest number of all processes."""
        if self.count == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def check_sizes(self, training: int, validation: int, settings: OptimizationSettings) -> None:
        """Raise ConfigError if there are too few images for a part of a batch, or of validation, in each process."""
        smallest = training // -(-training // settings.batch_size)
        if min(smallest, validation * settings.accumulate) < self.count * settings.accumulate:
            raise ConfigError(
                f"Batches of {smallest} images and {validation} validation images cannot be divided among {self.count} "
                f"processes with accumulate={settings.accumulate}; use a larger batch_size or fewer processes."
            )

    def own(self, images: Images) -> Images:
        """Return this process's share of images that need no order."""
        edges = [len(images) * number // self.count for number in (self.number, self.number + 1)]
        return images.rows(slice(*edges))

    def parts(self, batches: list[NDArray[np.int64]], accumulate: int) -> list[BatchPart]:
        """Return this process's parts of an epoch's batches."""
        return parts_of(batches, self.count, self.number, accumulate)

    def prepared(self, model: nn.Module, settings: OptimizationSettings, device: torch.device) -> nn.Module:
        """Return the model with batch norms over all processes, if the settings say so."""
        return join_batch_norms(model, device) if self.count > 1 and settings.sync_batch_norm else model

    def connected(self, model: nn.Module) -> nn.Module:
        """Return the model to call in training, whose backward pass averages the gradients of all processes.

        It is for one epoch: other parameters may be trainable in the next.
        """
        # Buffers: batch norms agree already, or are averaged at the end of the epoch.
        return DistributedDataParallel(model, forward_sync_buffers=False) if self.count > 1 else model

    def average_gradients(self, network: nn.Module, now: bool) -> None:
        """Let the next backward pass average all processes' gradients, or only add to this process's own."""
        if isinstance(network, DistributedDataParallel):
            network.require_backward_grad_sync = now

    def average_buffers(self, *models: nn.Module) -> None:
        """Average the running statistics of batch norms over all processes."""
        if self.count > 1:
            for buffer in (buffer for model in models for buffer in model.buffers() if buffer.is_floating_point()):
                dist.all_reduce(buffer)
                buffer /= self.count

    def part(self) -> None:
        """End the connection between the processes."""
        if self.count > 1:
            dist.destroy_process_group()


ALONE = Ranks()  # one process, without torchrun


def is_rank_error(error: BaseException | None) -> bool:
    """Return True for an error of torch's that says that another process cannot be reached."""
    return isinstance(error, dist.DistNetworkError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that torchrun started. Only the first process that fails prints its error.

    Raises:
        RankError: another process has ended.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks()
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    store = dist.distributed_c10d._get_default_store()  # outlives the processes, in torchrun
    ranks = Ranks(dist.get_rank(), count, int(os.environ["LOCAL_RANK"]))
    console.quiet = not ranks.writes
    try:
        yield ranks
    except Exception as error:
        errors.quiet = store.add("failed", 1) > 1
        if is_rank_error(error):
            raise RankError("Another process of this run has ended before the first epoch.") from None
        raise
