"""The training loss for soft targets, class weights, and logit adjustment."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F


class ClassificationLoss(nn.Module):
    """Cross-entropy with optional class weights, label smoothing and focusing.

    For logits z, target distribution y (smoothed) and p = softmax(z), one image costs

        sum_k  w_k * y_k * (1 - p_k)^gamma * -log p_k

    and a batch the mean over its images. gamma = 0 is cross-entropy; gamma > 0 the focal loss of Lin et al. 2017,
    "Focal Loss for Dense Object Detection", in its multi-class form.

    Args:
        class_weights: w, one per class; None for equal weights.
        label_smoothing: share of the target spread evenly over all classes (Szegedy et al. 2016).
        gamma: focusing exponent.
    """

    weights: Tensor | None

    def __init__(self, class_weights: Tensor | None = None, label_smoothing: float = 0.0, gamma: float = 0.0) -> None:
        super().__init__()
        self.register_buffer("weights", class_weights)
        self.label_smoothing = label_smoothing
        self.gamma = gamma

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of logits (N, K) for class indices (N,) or distributions (N, K)."""
        classes = logits.shape[-1]
        if targets.ndim == 1:
            targets = F.one_hot(targets, classes)
        # In bf16 a log-softmax loses small probabilities.
        log_p = F.log_softmax(logits.float(), dim=-1)
        y = targets.float() * (1 - self.label_smoothing) + self.label_smoothing / classes
        if self.weights is not None:
            y = y * self.weights
        if self.gamma:
            y = y * (1 - log_p.exp()) ** self.gamma
        return -(y * log_p).sum(-1).mean()


def class_weights(counts: Sequence[float], power: float) -> Tensor:
    """Return weights proportional to count^-power: 0 gives equal weights, 1 gives every class the same total weight.

    Their mean over the images is 1, so that the power does not change the size of the loss.
    """
    n = torch.tensor(counts, dtype=torch.float64)
    weights = n.pow(-power)
    return (weights * n.sum() / (weights * n).sum()).float()


def prior_logits(counts: Sequence[float], power: float) -> NDArray[np.float64]:
    """Return the logits (K,) that post-hoc logit adjustment subtracts: power * log(count / all).

    Menon et al. 2021, "Long-Tail Learning via Logit Adjustment", where `power` is tau. 0 changes nothing; 1 removes the
    class frequencies of the training. Every count must be positive.
    """
    n = np.asarray(counts, np.float64)
    return np.asarray(power * np.log(n / n.sum()))
