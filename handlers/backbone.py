"""Building a timm backbone with a linear classification head, the one way for training and serving."""

import difflib
import logging
import math
from functools import partial
from typing import Any

import timm
from timm.layers import HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import nn


class BackboneError(ValueError):
    """A backbone that cannot be built, with a sentence saying why and what to do."""


def build_backbone(
    architecture: str,
    num_classes: int,
    image_size: int,
    pretrained: bool = False,
    options: dict[str, Any] | None = None,
) -> nn.Module:
    """Build a timm model with `num_classes` outputs for square inputs of `image_size` pixels.

    Args:
        architecture: a timm model name, such as "vit_small_patch16_224" or "efficientnet_b0".
        num_classes: number of logits.
        image_size: input side, pixels; vision transformers are built (and their position embedding resampled) for it.
        pretrained: load timm's weights from the model hub.
        options: further keyword arguments for timm; for vision transformers also `stem`, worth it when training from
            scratch on little data: "conv" replaces the patch projection by stride-2 convolutions (Xiao et al. 2021,
            "Early Convolutions Help Transformers See Better"), "resnet" by ResNet-18 up to the same stride (the
            hybrid of Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words"). For any backbone `head_hidden`: widths
            of hidden layers between its features and the logits, each linear, batch norm, ReLU and dropout.

    Raises:
        BackboneError: unknown architecture or options, or pretrained weights out of reach.
    """
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f" Perhaps one of {', '.join(near)}?" if near else ""
        raise BackboneError(f"timm has no model named {architecture!r}.{hint}")
    arguments = dict(options or {})
    if timm.models.model_entrypoint(architecture).__module__.startswith("timm.models.vision_transformer"):
        arguments["img_size"] = image_size
    hidden = arguments.pop("head_hidden", [])
    stem = arguments.pop("stem", "patch")
    if stem not in STEMS:
        raise BackboneError(f"stem must be one of {', '.join(STEMS)}, not {stem!r}.")
    if stem != "patch":
        if pretrained:
            raise BackboneError(f"stem={stem!r} has no pretrained weights; use stem='patch' or pretrained=false.")
        arguments["embed_layer"] = STEMS[stem]
    hub_log = logging.getLogger("huggingface_hub")
    level = hub_log.level
    hub_log.setLevel(logging.CRITICAL)  # its retries are many lines; what matters is in the one sentence below
    backbone: Any
    try:
        backbone = timm.create_model(architecture, pretrained=pretrained, num_classes=num_classes, **arguments)
    except (TypeError, AssertionError) as error:
        raise BackboneError(f"{architecture} cannot be built with {arguments}: {error}") from error
    except Exception as error:
        if not pretrained:
            raise
        raise BackboneError(
            f"The pretrained weights of {architecture} cannot be fetched from the model hub "
            f"({type(error).__name__}); check the network, or train from scratch with pretrained=false."
        ) from error
    finally:
        hub_log.setLevel(level)
    if hidden:
        # timm's own name for it: `head`, `fc` or `classifier`
        name = backbone.default_cfg["classifier"]
        setattr(backbone, name, _deep_head(backbone.get_classifier(), hidden, arguments.get("drop_rate", 0.0)))
    return backbone


def _deep_head(linear: nn.Module, hidden: list[int], drop_rate: float) -> nn.Module:
    if not isinstance(linear, nn.Linear):
        raise BackboneError(f"head_hidden needs a backbone with one linear layer for a head, not {linear}.")
    layers: list[nn.Module] = []
    width = linear.in_features
    for wide in hidden:
        layers += [nn.Linear(width, wide), nn.BatchNorm1d(wide), nn.ReLU(), nn.Dropout(drop_rate)]
        width = wide
    return nn.Sequential(*layers, nn.Linear(width, linear.out_features))


def _conv_stem(img_size: int, patch_size: int, in_chans: int, embed_dim: int, **kwargs: Any) -> nn.Module:
    """Convolutions of stride 2 down to the patch grid, each twice as wide as the one before."""
    depth = int(math.log2(patch_size))
    stem = partial(
        ConvStem,
        depth=depth,
        channels=tuple(embed_dim // 2 ** (depth - 1 - i) for i in range(depth)),
        stride=(2,) * depth,
    )
    return HybridEmbed(
        backbone=stem(in_chans=in_chans), img_size=img_size, patch_size=1, proj=False, embed_dim=embed_dim, **kwargs
    )


def _resnet_stem(img_size: int, patch_size: int, in_chans: int, embed_dim: int, **kwargs: Any) -> nn.Module:
    """ResNet-18 cut off where its stride is that of the patches, then a projection to the transformer's width."""
    stage = int(math.log2(patch_size)) - 1
    if patch_size not in (4, 8, 16, 32):
        raise BackboneError(f"stem='resnet' needs patches of 4, 8, 16 or 32 pixels, not {patch_size}.")
    resnet = timm.create_model("resnet18", features_only=True, out_indices=(stage,), in_chans=in_chans)
    return HybridEmbed(backbone=resnet, img_size=img_size, patch_size=1, embed_dim=embed_dim, **kwargs)


STEMS = {"patch": None, "conv": _conv_stem, "resnet": _resnet_stem}


def is_vision_transformer(backbone: nn.Module) -> bool:
    """Whether the backbone is one of timm's plain vision transformers."""
    return isinstance(backbone, VisionTransformer)
