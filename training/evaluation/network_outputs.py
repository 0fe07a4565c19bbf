"""Run a network over a whole split: features and logits of each image, without augmentation."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from handlers.backbone import fuse
from handlers.preprocessing import Preprocessing
from training.data.batches import Images, batches, standardise
from training.evaluation.detectors import Outputs


def pooled(backbone: Any, images: Tensor) -> Tensor:
    """Return the features (N, D) that timm's classifier takes, of standardised images (N, 3, S, S)."""
    features: Tensor = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
    return features


@torch.inference_mode()
def outputs_of(
    model: nn.Module, images: Images, batch_size: int, preprocessing: Preprocessing, device: torch.device
) -> tuple[Outputs, NDArray[np.float64]]:
    """Return a split's features and logits of the images alone, and its logits (N, K) with metadata, in fp32."""
    backbone: Any = model.eval()
    features, image_logits, logits = [], [], []
    for pixels, _, metadata in batches(images, np.arange(len(images)), batch_size, device):
        inputs = pooled(backbone, standardise(pixels, preprocessing))
        alone = backbone.get_classifier()(inputs)
        features.append(inputs.cpu().double().numpy())
        image_logits.append(alone.cpu().double().numpy())
        logits.append(fuse(backbone, alone, metadata).cpu().double().numpy())
    return Outputs(np.concatenate(features), np.concatenate(image_logits)), np.concatenate(logits)


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: Images,
    batch_size: int,
    preprocessing: Preprocessing,
    device: torch.device,
    precision: torch.dtype,
) -> NDArray[np.float32]:
    """Return a split's logits (N, K) with metadata, in its order."""
    model.eval()
    parts = []
    for pixels, _, metadata in batches(images, np.arange(len(images)), batch_size, device):
        with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
            logits = fuse(model, model(standardise(pixels, preprocessing)), metadata)
        parts.append(logits.float().cpu())
    return torch.cat(parts).numpy()
