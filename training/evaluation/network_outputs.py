"""Run a network over a whole split: features and logits of each image, without augmentation."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from handlers.backbone import fuse
from handlers.preprocessing import Preprocessing
from training.data.batches import Images, batches, standardise


@dataclass(frozen=True)
class NetworkOutputs:
    """A split's features (N, D), logits (N, K) of the images alone, and logits (N, K) with the recorded metadata."""

    features: NDArray[np.float64]
    image_logits: NDArray[np.float64]
    logits: NDArray[np.float64]


def pooled(backbone: Any, images: Tensor) -> Tensor:
    """Return the features (N, D) that timm's classifier takes, of standardised images (N, 3, S, S)."""
    features: Tensor = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
    return features


@torch.inference_mode()
def outputs_of(
    model: nn.Module, images: Images, batch_size: int, preprocessing: Preprocessing, device: torch.device
) -> NetworkOutputs:
    """Compute all outputs in fp32, in the split's order."""
    backbone: Any = model.eval()
    parts = []
    for pixels, _, metadata in batches(images, np.arange(len(images)), batch_size, device):
        features = pooled(backbone, standardise(pixels, preprocessing))
        image_logits = backbone.get_classifier()(features)
        outputs = features, image_logits, fuse(backbone, image_logits, metadata)
        parts.append([output.cpu().double().numpy() for output in outputs])
    return NetworkOutputs(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: Images,
    batch_size: int,
    preprocessing: Preprocessing,
    device: torch.device,
    precision: torch.dtype,
) -> NDArray[np.float32]:
    """Return the logits (N, K) with metadata, in the split's order: the quick way, for validation after each epoch."""
    model.eval()
    parts = []
    for pixels, _, metadata in batches(images, np.arange(len(images)), batch_size, device):
        with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
            logits = fuse(model, model(standardise(pixels, preprocessing)), metadata)
        parts.append(logits.float().cpu())
    return torch.cat(parts).numpy()
