"""Checkpoints: written whole or not at all, read without running any code in them."""

from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from handlers.errors import UserError
from handlers.files import atomic_file

LAST, BEST = "last.pt", "best.pt"


class CheckpointError(UserError):
    """A checkpoint that cannot be used, with a sentence saying why."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) to `path`, atomically and durably."""
    with atomic_file(path) as file:
        torch.save(state, file)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; only tensors and plain values are accepted. Raises CheckpointError."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"There is no checkpoint {path}.") from None
    except Exception as error:  # torch, zipfile and pickle each have their own words for a damaged file
        raise CheckpointError(f"{path} is not a checkpoint of this project ({type(error).__name__}).") from error
    return state


def find(path: Path) -> Path:
    """The checkpoint to resume from, given as a file or as a run's output folder. Raises CheckpointError."""
    path = path / LAST if path.is_dir() else path
    if path.name == BEST:
        raise CheckpointError(f"{path} holds weights alone; resume from {path.with_name(LAST)}.")
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}.")
    return path


def restore(
    state: dict[str, Any],
    model: nn.Module,
    ema: ModelEmaV3,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> tuple[int, list[dict[str, Any]], dict[str, Any] | None]:
    """Put everything back as it was; returns the epochs done, their history and the best of them.

    The optimiser's settings stay those of `optimizer`: a run may be resumed with others.

    Raises:
        CheckpointError: the settings now describe another network.
    """
    try:
        model.load_state_dict(state["model"])
        ema.module.load_state_dict(state["ema"])
        settings = [{name: value for name, value in g.items() if name != "params"} for g in optimizer.param_groups]
        optimizer.load_state_dict(state["optimizer"])
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)
        scaler.load_state_dict(state["scaler"])
        return state["epoch"], state["history"], state["best"]
    except (KeyError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"The checkpoint does not fit these settings ({first}); resume without changing the model."
        ) from error
