"""The training losses, all for soft targets, so that label smoothing and mixup need no second version; and what may be
taken off the logits after training."""

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
        """Scalar loss of logits (N, K) against class indices (N,) or distributions (N, K)."""
        classes = logits.shape[-1]
        if targets.ndim == 1:
            targets = F.one_hot(targets, classes)
        # In bf16 a log-softmax loses the small probabilities that the loss is about.
        log_p = F.log_softmax(logits.float(), dim=-1)
        y = targets.float() * (1 - self.label_smoothing) + self.label_smoothing / classes
        if self.weights is not None:
            y = y * self.weights
        if self.gamma:
            y = y * (1 - log_p.exp()) ** self.gamma
        return -(y * log_p).sum(-1).mean()


def class_weights(counts: Sequence[int], power: float) -> Tensor:
    """Weights proportional to count^-power whose mean over the images (not the classes) is 1.

    That mean keeps the size of the loss, and so the meaning of the learning rate, whatever the power: 0 gives equal
    weights, 1 lets every class count the same in total.
    """
    n = torch.tensor(counts, dtype=torch.float64)
    weights = n.pow(-power)
    return (weights * n.sum() / (weights * n).sum()).float()


def prior_logits(counts: Sequence[int], power: float) -> NDArray[np.float64]:
    """What post-hoc logit adjustment takes off the logits (K,): power * log(count / all), for classes that have images.

    Menon et al. 2021, "Long-Tail Learning via Logit Adjustment", where `power` is tau. 0 leaves the logits alone; 1
    removes the training set's class frequencies from them, and nothing else.
    """
    n = np.asarray(counts, np.float64)
    return np.asarray(power * np.log(n / n.sum()))
