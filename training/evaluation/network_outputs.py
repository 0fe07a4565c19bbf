"""Run a network over a whole split: features and logits of each image, without augmentation."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from handlers.backbone import fuse
from handlers.preprocessing import Preprocessing
from training.data.batches import Images, batches, even_batches, standardise


@dataclass(frozen=True)
class NetworkOutputs:
    """A split's features (N, D), logits (N, K) of the images alone and with metadata, labels (N,) and lesions (N,)."""

    features: NDArray[np.float64]
    image_logits: NDArray[np.float64]
    logits: NDArray[np.float64]
    labels: NDArray[np.int64]
    lesions: NDArray[np.str_]


def pooled(backbone: Any, images: Tensor) -> Tensor:
    """Return the features (N, D) that timm's classifier takes, of standardised images (N, 3, S, S)."""
    features: Tensor = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
    return features


@torch.inference_mode()
def outputs_of(
    model: nn.Module,
    images: Images,
    batch_size: int,
    preprocessing: Preprocessing,
    device: torch.device,
    precision: torch.dtype = torch.float32,
) -> NetworkOutputs:
    """Compute all outputs in the split's order."""
    backbone: Any = model.eval()
    parts = []
    for pixels, _, metadata in batches(images, even_batches(np.arange(len(images)), batch_size), device):
        with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
            pooled_features = pooled(backbone, standardise(pixels, preprocessing))
            logits_alone = backbone.get_classifier()(pooled_features)
            outputs = pooled_features, logits_alone, fuse(backbone, logits_alone, metadata)
        parts.append([output.cpu().double().numpy() for output in outputs])
    features, image_logits, logits = (np.concatenate(column) for column in zip(*parts, strict=True))
    return NetworkOutputs(features, image_logits, logits, images.labels, images.lesions)
