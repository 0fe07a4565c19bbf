"""Validation after each epoch: its figures, and a line for the console."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from handlers.taxonomy import UNKNOWN
from mlflow_tracking import classification_metrics as metrics


def validation_figures(
    labels: NDArray[np.int64], logits: NDArray[np.floating[Any]], classes: Sequence[str]
) -> dict[str, float]:
    """Return the figures of one epoch among the classes other than UNK.

    Args:
        labels: (N,) indices into `classes`; images with -1 (a class without a logit) or UNK are left out.
        logits: (N, K).
    """
    lesions = [index for index, code in enumerate(classes) if code != UNKNOWN]  # UNK comes last
    labelled = np.isin(labels, lesions)
    y, p = labels[labelled], softmax(logits[labelled][:, lesions].astype(np.float64), axis=1)
    return {
        "val_loss": metrics.nll(y, p),
        "val_accuracy": metrics.accuracy(y, p),
        "val_balanced_accuracy": metrics.balanced_accuracy(y, p),
        "val_macro_f1": metrics.macro_f1(y, p),
        "val_macro_auc": metrics.macro_auc(y, p),
    }


def describe_epoch(row: Mapping[str, float], epochs: int) -> str:
    """Return one line for the console."""
    return (
        f"epoch {row['epoch']:>3}/{epochs}  loss {row['train_loss']:.4f}  val {row['val_loss']:.4f}  "
        f"accuracy {row['val_accuracy']:.3f}  balanced {row['val_balanced_accuracy']:.3f}  "
        f"F1 {row['val_macro_f1']:.3f}  AUC {row['val_macro_auc']:.3f}  lr {row['lr']:.1e}  {row['seconds']:.0f} s"
    )
