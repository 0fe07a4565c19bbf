"""Check, before data are read, that the network of the settings can be built, run and explained."""

from typing import Any

import timm
import torch
from torch import nn

from handlers.backbone import BackboneError, build_backbone
from handlers.errors import UserError
from handlers.gradcam import PooledGradCam, grad_cam
from training.config import ModelSettings


def check_backbone(settings: ModelSettings) -> None:
    """Build the network and explain images of random pixels with it.

    Raises:
        BackboneError: the reason, and for a wrong image size the nearest size that works.
    """
    size, name = settings.image_size, settings.architecture
    if (nearest := nearest_size(settings)) not in (size, None):
        raise BackboneError(f"{name} cannot take images of {size} pixels. Use image_size={nearest}.")
    try:
        explainer = grad_cam(_build(settings, size), size)
    except UserError:
        raise
    except Exception as error:  # timm's models fail in many ways
        raise BackboneError(
            f"Grad-CAM cannot explain {name} ({type(error).__name__}: {str(error)[:200]}). Choose another architecture."
        ) from error
    if settings.half_turn and not isinstance(explainer, PooledGradCam):
        raise BackboneError("half_turn needs a head of one linear layer. Leave half_turn or head_hidden out.")


def _build(settings: ModelSettings, size: int) -> Any:
    return build_backbone(settings.architecture, 2, size, options=settings.options).eval()


def nearest_size(settings: ModelSettings) -> int | None:
    """Return the image size nearest to that of the settings which the network takes, if there is one."""
    size = settings.image_size
    if _takes(settings, size):
        return size
    pretrained_cfg: Any = timm.get_pretrained_cfg(settings.architecture)
    with torch.device("meta"):
        patch = _patch_size(_build(settings, pretrained_cfg.input_size[-1]))
    # Most patches and strides are at most 32; windows need larger multiples.
    sizes = {*range(max(1, size - 32), size + 33), *range(32, 513, 32)}
    for candidate in sorted(sizes, key=lambda candidate: (abs(candidate - size), -candidate)):
        if candidate % patch == 0 and _takes(settings, candidate):
            return candidate
    return None


def _takes(settings: ModelSettings, size: int) -> bool:
    """Return whether the network runs on images of this size, and its patches cover them. Only shapes are computed."""
    try:
        with torch.device("meta"), torch.no_grad():
            backbone = _build(settings, size)
            backbone(torch.zeros(1, 3, size, size))
    except Exception:
        return False
    return size % _patch_size(backbone) == 0


def _patch_size(backbone: Any) -> int:
    """Return the side of a transformer's patches; 1 where none are cut or they overlap."""
    projection = getattr(getattr(backbone, "patch_embed", None), "proj", None)
    if isinstance(projection, nn.Conv2d) and projection.kernel_size == projection.stride:
        return projection.stride[0]
    return 1
