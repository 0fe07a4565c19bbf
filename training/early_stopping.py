"""The best epoch by a validation figure, and early stopping."""

from collections.abc import Mapping
from typing import Any


def score(figures: Mapping[str, float], monitor: str) -> float:
    """Return the number that chooses the best epoch, the higher the better: balanced accuracy, or the negative loss."""
    return -figures["val_loss"] if monitor == "loss" else figures["val_balanced_accuracy"]


def out_of_patience(best: Mapping[str, Any] | None, epochs_done: int, patience: int) -> bool:
    """Return True if `patience` epochs (0: any number) brought no improvement on the best epoch."""
    return bool(best and patience and epochs_done - best["epoch"] >= patience)
