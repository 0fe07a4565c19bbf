"""The naive model as a TorchServe handler on top of BaseHandler, in the way of TorchServe's own examples.

TorchServe takes the one class in this module; keep it one.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from ts.torch_handler.base_handler import BaseHandler

from scripts.studies.serving_bench.naive_model import NaiveModel


class StockHandler(BaseHandler):
    """Preprocess, inference, postprocess; `handle` is BaseHandler's."""

    def initialize(self, context: Any) -> None:
        """Load the model that the `handler` section of the archive's configuration names."""
        settings = context.model_yaml_config["handler"]
        self.naive = NaiveModel(Path(settings["folder"]), settings["threads"], settings["runtime"])
        self.context, self.manifest, self.initialized = context, context.manifest, True

    def preprocess(self, data: list[dict[str, Any]]) -> Tensor:
        """The forms of a batch to the network's input."""
        self.heat = any(row["gradcam"] != b"none" for row in data)
        images, self.pictures = self.naive.decode([bytes(row["data"]) for row in data])
        return images

    def inference(self, data: Tensor, *args: Any, **kwargs: Any) -> tuple[np.ndarray, np.ndarray | None]:
        """Probabilities and heatmaps. Not in inference mode, as BaseHandler's is: Grad-CAM needs gradients."""
        return self.naive.infer(data, self.heat)

    def postprocess(self, data: tuple[np.ndarray, np.ndarray | None]) -> list[dict[str, Any]]:
        """One answer a request."""
        pictures: list[Image.Image] = self.pictures
        return self.naive.answers(pictures, *data)
