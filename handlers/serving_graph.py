"""The serving graph as a torch module: standardisation, backbone, Grad-CAM and residuals in one call.

OpenVINO's graph is exported from it, and TorchRuntime runs it directly. Import it inside functions, as it needs torch.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from handlers.backbone import BackboneError, build_backbone
from handlers.bundle import WEIGHTS, Bundle, BundleError
from handlers.gradcam import grad_cam
from handlers.preprocessing import Preprocessing
from handlers.weights import BASIS, Weights, load_weights, read_weights

# TensorFlow pads more at the right and at the bottom. Its weights with symmetric padding (`pad_type`) look one pixel
# further up and left in each of the five halvings, at its scale: 1 + 2 + 4 + 8 + 16 pixels of the picture.
SYMMETRIC_SHIFT = 31
LAST_STRIDE = 32  # of those networks, if `output_stride` does not say otherwise


class ServingModule(nn.Module):
    """A network in eval mode and fp32, from uint8 pixels to logits, Grad-CAM maps and residuals.

    `map_shift` as for handlers.gradcam.GradCam.
    """

    def __init__(
        self, backbone: nn.Module, preprocessing: Preprocessing, weights: Weights, map_shift: float = 0.0
    ) -> None:
        super().__init__()
        self.cam = grad_cam(backbone.eval(), preprocessing.image_size, map_shift)
        scale, offset = preprocessing.standardisation
        self.scale, self.offset = (nn.Buffer(torch.tensor(each)[:, None, None]) for each in (scale, offset))
        self.origin, self.basis = (None if t is None else nn.Buffer(t) for t in (weights.origin, weights.basis))

    def images(self, pixels: Tensor) -> Tensor:
        """Standardise pixels uint8 (N, S, S, 3) to the backbone's input (N, 3, S, S)."""
        return pixels.permute(0, 3, 1, 2).float() * self.scale + self.offset

    def forward(self, pixels: Tensor, target: Tensor, metadata: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits (N, K), maps (N, h, w) and residuals (N,); arguments as for handlers.runtimes.Runtime."""
        logits, maps, features = self.cam(self.images(pixels), target, metadata)
        if self.basis is None:
            return logits, maps, torch.zeros_like(logits[:, 0])
        outside = (features - self.origin) @ self.basis
        return logits, maps, (outside * outside).sum(-1).sqrt()


def map_shift(options: Mapping[str, Any]) -> float:
    """Return ServingModule's `map_shift` for a network with these options of handlers.backbone.build_backbone."""
    if options.get("pad_type") != "":
        return 0.0
    stride = options.get("output_stride", LAST_STRIDE)
    # A cell of a finer grid has its middle further up and left.
    return float(SYMMETRIC_SHIFT - (LAST_STRIDE - stride) / 2) / stride


def serving_module(bundle: Bundle) -> ServingModule:
    """Build the module of a bundle, or of a draft, from its weights.

    Raises:
        BundleError: the network cannot be built, the weights do not fit it, or its rejection needs a space of known
            lesions that the weights file does not hold.
    """
    config = bundle.config
    try:
        backbone = build_backbone(
            config.architecture,
            len(config.classes),
            config.preprocessing.image_size,
            options=config.options,
            metadata_width=len(config.metadata.columns),
        )
    except BackboneError as error:
        raise BundleError(f"The bundle's network cannot be built. {error}") from error
    weights = read_weights(bundle)
    if config.calibration.rejection and config.calibration.rejection.residual_weight and weights.basis is None:
        raise BundleError(f"The bundle's rejection needs {BASIS} in {WEIGHTS}, which lacks it.")
    try:
        load_weights(backbone, weights.network)
    except ValueError as error:
        raise BundleError(f"The weights do not fit {config.architecture}: {error}.") from error
    return ServingModule(backbone, config.preprocessing, weights, map_shift(config.options)).eval()
