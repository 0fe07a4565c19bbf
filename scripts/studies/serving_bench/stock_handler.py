"""A first TorchServe handler for comparison: timm in fp32, torchvision's transforms, the grad-cam package.

It extends BaseHandler as TorchServe's own examples do. One forward pass serves probabilities and heatmap, and whole
batches go through the package at once. TorchServe uses the one class of this module; keep it one.
"""

import base64
import io
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.image import show_cam_on_image
from torch import Tensor
from torchvision import transforms
from ts.torch_handler.base_handler import BaseHandler

from handlers.bundle import Bundle
from handlers.gradcam import TappedBackbone
from handlers.serving_graph import serving_module


class StockHandler(BaseHandler):
    """Preprocess, inference, postprocess; `handle` is BaseHandler's."""

    def initialize(self, context: Any) -> None:
        """Load the network of the bundle that the `handler` section of the archive's configuration names."""
        bundle = Bundle.load(Path(context.model_yaml_config["handler"]["bundle"]))
        preprocessing = bundle.config.preprocessing
        self.size, self.classes = preprocessing.image_size, bundle.config.classes
        self.backbone = TappedBackbone(serving_module(bundle).cam.backbone.float()).eval()
        self.transform = transforms.Compose(
            [
                transforms.Resize((self.size, self.size), transforms.InterpolationMode.BICUBIC),
                transforms.ToTensor(),
                transforms.Normalize(preprocessing.mean, preprocessing.std),
            ]
        )
        self.grad_cam = GradCAM(self.backbone, [self.backbone.layer], reshape_transform=self.backbone.channels_first)
        self.context, self.manifest, self.initialized = context, context.manifest, True

    def preprocess(self, data: list[dict[str, Any]]) -> Tensor:
        """The forms of a batch to the network's input (N, 3, S, S)."""
        self.heat = any(row["gradcam"] != b"none" for row in data)
        self.pictures = [Image.open(io.BytesIO(bytes(row["data"]))).convert("RGB") for row in data]
        return torch.stack([self.transform(picture) for picture in self.pictures])

    def inference(self, data: Tensor, *args: Any, **kwargs: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Probabilities (N, K), and heatmaps (N, S, S) in [0, 1] of the top classes if a request wants them."""
        if self.heat:
            maps = self.grad_cam(data, None)  # no target: the top class
            return self.grad_cam.outputs.detach().softmax(1).numpy(), maps
        with torch.inference_mode():
            return self.backbone(data).softmax(1).numpy(), None

    def postprocess(self, data: tuple[np.ndarray, np.ndarray | None]) -> list[dict[str, Any]]:
        """One answer a request: probabilities by class, and the overlay as a JPEG in base64 (or null)."""
        probabilities, maps = data
        answers = []
        for row, picture in enumerate(self.pictures):
            overlay = None
            if maps is not None:
                small = np.asarray(picture.resize((self.size, self.size)), np.float32) / 255
                blended = show_cam_on_image(small, maps[row], use_rgb=True)
                overlay = base64.b64encode(cv2.imencode(".jpg", blended[:, :, ::-1])[1].tobytes()).decode()
            scores = dict(zip(self.classes, probabilities[row].tolist(), strict=True))
            answers.append({"probabilities": scores, "overlay": overlay})
        return answers
