"""What a network says of a whole split: features, logits, each image once and as it is."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from handlers.backbone import fuse
from training.config import TrainConfig
from training.data.dataset import Images, batches, standardise
from training.evaluation.detectors import Outputs


def pooled(backbone: Any, images: Tensor) -> Tensor:
    """The features (N, D) that timm's classifier takes, of standardised images (N, 3, S, S)."""
    features: Tensor = backbone.forward_head(backbone.forward_features(images), pre_logits=True)
    return features


@torch.inference_mode()
def outputs_of(
    model: nn.Module, images: Images, config: TrainConfig, device: torch.device
) -> tuple[Outputs, NDArray[np.float64]]:
    """Features (the classifier's input) and logits of a split's pictures alone, and its logits (N, K) with the metadata
    that are recorded; in its order, without augmentation, in fp32."""
    backbone: Any = model.eval()
    features, logits, told = [], [], []
    for pixels, _, metadata in batches(images, np.arange(len(images)), config.batch_size, device):
        inputs = pooled(backbone, standardise(pixels, config.preprocessing))
        alone = backbone.get_classifier()(inputs)
        features.append(inputs.cpu().double().numpy())
        logits.append(alone.cpu().double().numpy())
        told.append(fuse(backbone, alone, metadata).cpu().double().numpy())
    return Outputs(np.concatenate(features), np.concatenate(logits)), np.concatenate(told)


@torch.inference_mode()
def predict(
    model: nn.Module, images: Images, config: TrainConfig, device: torch.device, precision: torch.dtype
) -> NDArray[np.float32]:
    """Logits (N, K) of a split with its metadata, in its order, without augmentation."""
    model.eval()
    found = []
    for pixels, _, metadata in batches(images, np.arange(len(images)), config.batch_size, device):
        with torch.autocast(device.type, precision, enabled=precision is not torch.float32):
            logits = fuse(model, model(standardise(pixels, config.preprocessing)), metadata)
        found.append(logits.float().cpu())
    return torch.cat(found).numpy()
