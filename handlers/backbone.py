"""Building a timm backbone with a classification head, and late fusion; the one way for training and serving."""

import difflib
import logging
import math
from functools import partial
from typing import Any

import timm
import torch.nn.functional as F
from timm.layers import Attention, HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from handlers.errors import UserError

METADATA_HIDDEN = 32  # more than the 12 numbers that age, sex and site are; next to nothing beside any backbone


class BackboneError(UserError):
    """A backbone that cannot be built, with a sentence saying why and what to do."""


def build_backbone(
    architecture: str,
    num_classes: int,
    image_size: int,
    pretrained: bool = False,
    options: dict[str, Any] | None = None,
    metadata_width: int = 0,
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
        metadata_width: D of the encoded metadata (handlers.metadata) that the model takes; its `metadata_head` is for
            `fuse`. 0: none.

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
    if metadata_width:
        backbone.metadata_head = MetadataHead(metadata_width, num_classes)
    return backbone


class MetadataHead(nn.Module):
    """Encoded metadata (N, D) to what they add to the picture's logits (N, K).

    Without biases, so that zeros, which mean that nothing is known, add exactly nothing; the ones in the encoding do
    what biases would. It begins by adding nothing to anything.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, METADATA_HIDDEN, bias=False)
        self.logits = nn.Linear(METADATA_HIDDEN, num_classes, bias=False)
        nn.init.zeros_(self.logits.weight)

    def forward(self, metadata: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.hidden(metadata).relu())
        return logits


def fuse(backbone: Any, logits: Tensor, metadata: Tensor | None) -> Tensor:
    """Late fusion: the picture's logits (N, K), with those of the encoded metadata (N, D) where the model takes them.

    A sum, so the gradients that Grad-CAM needs are those of the picture's logits.
    """
    head = getattr(backbone, "metadata_head", None)
    return logits if head is None or metadata is None else logits + head(metadata)


class SplitAttention(nn.Module):
    """timm's attention of a whole sequence (N, L, D), with three products for queries, keys and values in place of one.

    The same numbers. A compiler need not take the joint product apart again: OpenVINO runs ViT-S/16 in 8 % less time.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = attention.num_heads, attention.qkv, attention.proj

    @staticmethod
    def supports(attention: nn.Module) -> bool:
        """Plain attention: no norm of queries and keys or of the outcome, no gate."""
        return (
            type(attention) is Attention
            and all(isinstance(part, nn.Identity) for part in (attention.q_norm, attention.k_norm, attention.norm))
            and attention.gate is None
        )

    def forward(self, tokens: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """As timm's blocks call it. Raises ValueError for a mask, which a classifier of images has none of."""
        if attn_mask is not None or is_causal:
            raise ValueError("SplitAttention takes no mask.")
        weights = self.qkv.weight.chunk(3)
        biases = (None, None, None) if self.qkv.bias is None else self.qkv.bias.chunk(3)
        query, key, value = (
            F.linear(tokens, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for weight, bias in zip(weights, biases, strict=True)
        )
        outcome: Tensor = self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return outcome


def split_attention(backbone: Any) -> None:
    """Give every block but the last, of which Grad-CAM reads the parts, a SplitAttention where it can have one."""
    for block in getattr(backbone, "blocks", [])[:-1] if is_vision_transformer(backbone) else []:
        if SplitAttention.supports(block.attn):
            block.attn = SplitAttention(block.attn)


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
