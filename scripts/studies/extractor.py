"""Features and logits of a bundle's network, for studies that look inside it."""

import numpy as np
import torch
from numpy.typing import NDArray

from handlers.bundle import Bundle
from handlers.serving_graph import serving_module
from scripts.studies.detectors import DetectorInputs
from scripts.studies.study_error import StudyError
from training.evaluation.network_outputs import pooled

BATCH = 128


class Extractor:
    """Compute features and logits of a bundle's network from pixels, uint8 (N, S, S, 3)."""

    def __init__(self, bundle: Bundle) -> None:
        module = serving_module(bundle)
        self.backbone, self.module = module.cam.backbone, module
        head = self.backbone.get_classifier()
        if not isinstance(head, torch.nn.Linear):
            raise StudyError("Detectors need a head of one linear layer: choose a preset without head_hidden.")
        self.weight, self.bias = (t.detach().double().numpy() for t in (head.weight, head.bias))

    @torch.inference_mode()
    def __call__(self, pixels: NDArray[np.uint8]) -> DetectorInputs:
        features = []
        for start in range(0, len(pixels), BATCH):
            images = self.module.images(torch.tensor(pixels[start : start + BATCH]))
            features.append(pooled(self.backbone, images).double().numpy())
        joined = np.concatenate(features)
        return DetectorInputs(joined, joined @ self.weight.T + self.bias)  # in fp64, as the detectors expect
