"""Checkpoints: the state of a run, written atomically and read without running any code in the file."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from handlers.errors import UserError
from handlers.files import atomic_file
from training.early_stopping import score

LAST, BEST = "last.pt", "best.pt"


class CheckpointError(UserError):
    """A checkpoint that cannot be used."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) to `path`, atomically and durably."""
    with atomic_file(path) as file:
        torch.save(state, file)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, accepting tensors and plain values only. Raises CheckpointError."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"There is no checkpoint {path}.") from None
    except Exception as error:  # torch, zipfile and pickle raise different errors for damaged files
        raise CheckpointError(f"{path} is not a checkpoint of this project ({type(error).__name__}).") from error
    return state


def find(path: Path) -> Path:
    """Return the checkpoint to resume from, given as a file or as a run's folder. Raises CheckpointError."""
    path = path / LAST if path.is_dir() else path
    if path.name == BEST:
        raise CheckpointError(f"{path} holds only weights; resume from {path.with_name(LAST)}.")
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}.")
    return path


@dataclass
class TrainingState:
    """Everything that an epoch changes. `best` holds the best epoch and its score."""

    model: nn.Module
    ema: ModelEmaV3
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    epoch: int = 0  # epochs done
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None

    def add_epoch(self, figures: dict[str, float], monitor: str) -> bool:
        """Record the figures of the next epoch; return True if it is the best so far."""
        self.epoch += 1
        self.history.append({"epoch": self.epoch, **figures})
        is_best = self.best is None or score(figures, monitor) > self.best["score"]
        if is_best:
            self.best = {"epoch": self.epoch, "score": score(figures, monitor)}
        return is_best

    def to_dict(self) -> dict[str, Any]:
        """Return tensors and plain values for `save`."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "epoch": self.epoch,
            "history": self.history,
            "best": self.best,
        }

    def restore(self, checkpoint: dict[str, Any], monitor: str) -> None:
        """Load a checkpoint. The optimiser keeps its own settings, and the best epoch gets its score by `monitor`: both
        may differ in a resumed run.

        Raises:
            CheckpointError: the checkpoint holds another network.
        """
        groups = self.optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        try:
            self.model.load_state_dict(checkpoint["model"])
            self.ema.module.load_state_dict(checkpoint["ema"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            self.scaler.load_state_dict(checkpoint["scaler"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"The checkpoint holds another network ({str(error).strip().splitlines()[0]}); resume without changing "
                "the model."
            ) from error
        for group, own in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(own)
        self.epoch, self.history, self.best = checkpoint["epoch"], checkpoint["history"], checkpoint["best"]
        if self.best:
            self.best["score"] = score(self.history[self.best["epoch"] - 1], monitor)
