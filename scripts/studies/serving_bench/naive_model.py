"""What people write first: a timm model in fp32, torchvision's transforms, and the grad-cam package.

It is what this project is compared with, so it is written with some care: one forward pass serves probabilities and
heatmap, whole batches go through the package at once, and the overlay has the network's small size. It runs inside
TorchServe (stock_handler.py) and FastAPI (fastapi_app.py). That the architecture is built by handlers.backbone, a thin
layer over timm.create_model, gives it the same network as every other.
"""

import base64
import io
import json
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

from handlers.backbone import build_backbone
from handlers.bundle import Bundle
from handlers.files import write_json
from handlers.gradcam import target_layer
from handlers.serving_graph import serving_module

WEIGHTS, ONNX, DESCRIPTION = "weights.pt", "model.onnx", "model.json"


def export(bundle: Bundle, folder: Path, onnx: bool) -> None:
    """Write a bundle's weights and description for NaiveModel, and the same network as ONNX if wanted."""
    config = bundle.config
    backbone = serving_module(bundle).cam.backbone
    torch.save(backbone.state_dict(), folder / WEIGHTS)
    preprocessing = config.preprocessing
    description: dict[str, Any] = {
        "architecture": config.architecture,
        "options": config.options,
        "classes": list(config.classes),
    }
    description |= {"size": preprocessing.image_size, "mean": preprocessing.mean, "std": preprocessing.std}
    write_json(folder / DESCRIPTION, description)
    if onnx:
        example = torch.zeros(2, 3, preprocessing.image_size, preprocessing.image_size)
        shapes = ({0: torch.export.Dim("batch", min=1, max=1024)},)
        program = torch.onnx.export(
            backbone, (example,), input_names=["images"], dynamic_shapes=shapes, dynamo=True, verbose=False
        )
        assert program is not None, "dynamo=True gives a program"
        program.save(folder / ONNX)


class NaiveModel:
    """The model of a folder that `export` wrote.

    Args:
        threads: torch's, and ONNX Runtime's.
        runtime: "torch", or "onnxruntime" for the probabilities; heatmaps are torch's in both.
    """

    def __init__(self, folder: Path, threads: int, runtime: str) -> None:
        torch.set_num_threads(threads)
        described = json.loads((folder / DESCRIPTION).read_text())
        self.size, self.classes = described["size"], described["classes"]
        self.model: Any = build_backbone(
            described["architecture"], len(self.classes), self.size, options=described["options"]
        )
        self.model.load_state_dict(torch.load(folder / WEIGHTS, weights_only=True))
        self.model.eval()
        self.transform = transforms.Compose(
            [
                transforms.Resize((self.size, self.size), transforms.InterpolationMode.BICUBIC),
                transforms.ToTensor(),
                transforms.Normalize(described["mean"], described["std"]),
            ]
        )
        to_grid = self._to_grid if hasattr(self.model, "patch_embed") else None
        self.cam = GradCAM(self.model, [target_layer(self.model)], reshape_transform=to_grid)
        self.session = None
        if runtime == "onnxruntime":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            self.session = onnxruntime.InferenceSession(folder / ONNX, options, providers=["CPUExecutionProvider"])

    def _to_grid(self, tokens: Tensor) -> Tensor:
        patches = tokens[:, self.model.num_prefix_tokens :]
        return patches.unflatten(1, self.model.patch_embed.grid_size).permute(0, 3, 1, 2)

    def decode(self, files: list[bytes]) -> tuple[Tensor, list[Image.Image]]:
        """Image files to the network's input (N, 3, S, S), and the pictures."""
        pictures = [Image.open(io.BytesIO(file)).convert("RGB") for file in files]
        return torch.stack([self.transform(picture) for picture in pictures]), pictures

    def infer(self, images: Tensor, heat: bool) -> tuple[np.ndarray, np.ndarray | None]:
        """Probabilities (N, K), and with `heat` the top classes' heatmaps (N, S, S) in [0, 1]."""
        # The package runs forward and backward itself; its forward's logits are there to be used.
        maps = self.cam(images, None) if heat else None  # no target: the top class
        if self.session:
            logits = torch.tensor(self.session.run(None, {"images": images.numpy()})[0])
        elif heat:
            logits = self.cam.outputs.detach()
        else:
            with torch.inference_mode():
                logits = self.model(images)
        return logits.softmax(1).numpy(), maps

    def answers(
        self, pictures: list[Image.Image], probabilities: np.ndarray, maps: np.ndarray | None
    ) -> list[dict[str, Any]]:
        """The answers as JSON has them: probabilities by class, and the overlay as a JPEG in base64 (or null)."""
        answers = []
        for row, picture in enumerate(pictures):
            overlay = None
            if maps is not None:
                small = np.asarray(picture.resize((self.size, self.size)), np.float32) / 255
                blended = show_cam_on_image(small, maps[row], use_rgb=True)
                overlay = base64.b64encode(cv2.imencode(".jpg", blended[:, :, ::-1])[1].tobytes()).decode()
            scores = dict(zip(self.classes, probabilities[row].tolist(), strict=True))
            answers.append({"probabilities": scores, "overlay": overlay})
        return answers
