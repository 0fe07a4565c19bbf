"""The network: a timm backbone with a classification head, and late fusion with metadata."""

import difflib
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention, HybridEmbed
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer_hybrid import ConvStem
from torch import Tensor, nn

from handlers.errors import UserError

# Stem -> the timm model whose first stages, and pretrained weights, it has.
PRETRAINED_STEMS = {"resnet": "resnet18", "efficientnet_lite0": "tf_efficientnet_lite0"}
STEMS = ("patch", "conv", *PRETRAINED_STEMS)
METADATA_HIDDEN = 32  # more than the 12 numbers that encode age, sex and site, and tiny compared with any backbone


class BackboneError(UserError):
    """A backbone that cannot be built."""


def build_backbone(
    architecture: str,
    num_classes: int,
    image_size: int,
    pretrained: Mapping[str, Tensor] | None = None,
    options: dict[str, Any] | None = None,
    metadata_width: int = 0,
) -> nn.Module:
    """Build a timm model with `num_classes` outputs for square inputs of `image_size` pixels.

    Args:
        architecture: a timm model name, such as "vit_small_patch16_224" or "efficientnet_b0".
        num_classes: number of logits.
        image_size: input side in pixels; most transformers are built for it.
        pretrained: first weights under timm's names, of the architecture or of the model in PRETRAINED_STEMS.
        options: keyword arguments for timm, and three of this project. `stem` replaces a vision transformer's patch
            projection, which helps when training from scratch on little data: "conv" by stride-2 convolutions (Xiao et
            al. 2021, "Early Convolutions Help Transformers See Better"), "resnet" and "efficientnet_lite0" by the
            stages of that network up to the same stride (the hybrid of Dosovitskiy et al. 2021, "An Image is Worth
            16x16 Words"), which are `patch_embed.backbone` and keep timm's names. `head_hidden` are the widths of
            hidden layers between features and logits, each linear, batch norm, ReLU and dropout. `half_turn` makes it
            a HalfTurn.
        metadata_width: width D of the encoded metadata (handlers.metadata) that `fuse` adds; 0 for none.

    Raises:
        BackboneError: an unknown architecture or option, or pretrained weights that do not fit.
    """
    if not timm.is_model(architecture):
        if similar := difflib.get_close_matches(architecture, timm.list_models(), n=3):
            raise BackboneError(f"timm has no model named {architecture!r}. Similar names: {', '.join(similar)}.")
        raise BackboneError(f"timm has no model named {architecture!r}. timm.list_models() lists them all.")
    arguments = dict(options or {})
    pretrained_cfg: Any = timm.get_pretrained_cfg(architecture)
    if pretrained_cfg.fixed_input_size:  # timm's sign of a model that takes `img_size`
        arguments["img_size"] = image_size
    hidden, stem = arguments.pop("head_hidden", []), arguments.pop("stem", "patch")
    half_turn = arguments.pop("half_turn", False)
    if stem not in STEMS:
        raise BackboneError(f"stem is {stem!r}: it must be one of {', '.join(STEMS)}.")
    if stem != "patch":
        network = PRETRAINED_STEMS.get(stem)
        arguments["embed_layer"] = partial(_network_stem, network) if network else _conv_stem
    backbone = _create(architecture, None if stem in PRETRAINED_STEMS else pretrained, num_classes, arguments)
    if pretrained and stem in PRETRAINED_STEMS:
        _load_stem(backbone.patch_embed.backbone, pretrained)
    if hidden:
        # timm's own name for it: `head`, `fc` or `classifier`
        name = backbone.default_cfg["classifier"]
        setattr(backbone, name, _deep_head(backbone.get_classifier(), hidden, arguments.get("drop_rate", 0.0)))
    if metadata_width:
        backbone.metadata_head = MetadataHead(metadata_width, num_classes)
    if half_turn:  # the class is changed, as a deep copy of the network would keep an exchanged method of the original
        backbone.__class__ = type(f"HalfTurn{type(backbone).__name__}", (HalfTurn, type(backbone)), {})
    return backbone


class HalfTurn:
    """A timm backbone that looks at each picture twice: in eval mode it averages the last feature maps of both views.

    The second view is the picture turned by 180 degrees. Where only an average and a linear layer follow the map, the
    logits are the mean of those of both views (test-time augmentation).
    """

    def forward_features(self: Any, images: Tensor) -> Tensor:
        """Return the feature map (N, C, h, w) or (N, h, w, C) of images (N, 3, S, S)."""
        if self.training:
            features: Tensor = super().forward_features(images)  # type: ignore[misc]  # of timm's class
            return features
        upright, turned = self.views(images)
        return (upright + turned) / 2

    def views(self: Any, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the feature maps of the images, and of the turned images, turned back.

        Raises BackboneError if the network's last features are no map.
        """
        both = super().forward_features(torch.cat([images, images.flip(2, 3)]))  # type: ignore[misc]
        upright, turned = both[: images.shape[0]], both[images.shape[0] :]  # torch.export would fix chunk's sizes
        if turned.ndim != 4:
            raise BackboneError(
                f"half_turn needs a convolutional network, but {type(self).__bases__[1].__name__} is none."
            )
        return upright, turned.flip((2, 3) if turned.shape[1] == self.num_features else (1, 2))


def _create(
    architecture: str, pretrained: Mapping[str, Tensor] | None, num_classes: int, arguments: dict[str, Any]
) -> Any:
    if pretrained:  # timm resamples position embeddings to the image size, and leaves out a head of other classes
        arguments = arguments | {"pretrained_cfg_overlay": {"state_dict": dict(pretrained)}}
    try:
        return timm.create_model(architecture, pretrained=bool(pretrained), num_classes=num_classes, **arguments)
    except (TypeError, AssertionError) as error:
        raise BackboneError(f"{architecture} cannot be built with {arguments}: {error}.") from error
    except RuntimeError as error:
        if not pretrained:
            raise
        raise BackboneError(f"The pretrained weights do not fit {architecture}: {str(error)[:200]}.") from error


def _load_stem(stem: nn.Module, pretrained: Mapping[str, Tensor]) -> None:
    """Load the tensors that a stem shares with a whole network. Raises BackboneError if one is missing."""
    own = stem.state_dict()
    if missing := [name for name in own if name not in pretrained and not name.endswith("num_batches_tracked")]:
        raise BackboneError(f"The pretrained weights lack {missing[0]} of the stem.")
    stem.load_state_dict({name: pretrained[name] for name in own if name in pretrained}, strict=False)


class MetadataHead(nn.Module):
    """Map encoded metadata (N, D) to summands (N, K) of the picture's logits, which are 0 before training.

    There are no biases, so that missing metadata, encoded as zeros, add exactly nothing. The ones in the encoding act
    as biases.
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
    """Add the logits of encoded metadata (N, D), where the model takes them, to the picture's logits (N, K).

    As this is a sum, Grad-CAM's gradients are those of the picture's logits.
    """
    head = getattr(backbone, "metadata_head", None)
    return logits if head is None or metadata is None else logits + head(metadata)


class SplitAttention(nn.Module):
    """timm's attention with three products for queries, keys and values instead of one joint product.

    It gives the same numbers, and OpenVINO runs it faster, as it need not split the joint product again.
    """

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = attention.num_heads, attention.qkv, attention.proj

    @staticmethod
    def supports(attention: nn.Module) -> bool:
        """Return whether this is plain attention, without norms of queries, keys or output, and without a gate."""
        return (
            type(attention) is Attention
            and all(isinstance(part, nn.Identity) for part in (attention.q_norm, attention.k_norm, attention.norm))
            and attention.gate is None
        )

    def forward(self, tokens: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """Attend over tokens (N, L, D). Raises ValueError for a mask; image classifiers use none."""
        if attn_mask is not None or is_causal:
            raise ValueError("SplitAttention takes no mask.")
        weights = self.qkv.weight.chunk(3)
        biases = (None, None, None) if self.qkv.bias is None else self.qkv.bias.chunk(3)
        query, key, value = (
            F.linear(tokens, weight, bias).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for weight, bias in zip(weights, biases, strict=True)
        )
        output: Tensor = self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))
        return output


def split_attention(backbone: Any) -> None:
    """Use SplitAttention in every block that supports it, except the last, whose parts Grad-CAM reads."""
    for block in getattr(backbone, "blocks", [])[:-1] if is_vision_transformer(backbone) else []:
        if SplitAttention.supports(block.attn):
            block.attn = SplitAttention(block.attn)


def _deep_head(linear: nn.Module, hidden: list[int], drop_rate: float) -> nn.Module:
    if not isinstance(linear, nn.Linear):
        raise BackboneError(f"head_hidden needs a backbone whose head is one linear layer, but this head is {linear}.")
    layers: list[nn.Module] = []
    width = linear.in_features
    for hidden_width in hidden:
        layers += [nn.Linear(width, hidden_width), nn.BatchNorm1d(hidden_width), nn.ReLU(), nn.Dropout(drop_rate)]
        width = hidden_width
    return nn.Sequential(*layers, nn.Linear(width, linear.out_features))


def _conv_stem(img_size: int, patch_size: int, in_chans: int, embed_dim: int, **kwargs: Any) -> nn.Module:
    """Build convolutions of stride 2 down to the patch grid, each twice as wide as the previous one."""
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


def _network_stem(
    network: str, img_size: int, patch_size: int, in_chans: int, embed_dim: int, **kwargs: Any
) -> nn.Module:
    """Build a convolutional network up to the stride of the patches, and a projection to the transformer's width."""
    if patch_size not in (4, 8, 16, 32):
        raise BackboneError(f"A stem needs patches of 4, 8, 16 or 32 pixels, but they have {patch_size}.")
    stage = int(math.log2(patch_size)) - 1
    stages: Any = timm.create_model(network, features_only=True, out_indices=(stage,), in_chans=in_chans)
    if hasattr(stages, "blocks"):  # timm keeps the later stages of an EfficientNet, which compute nothing
        del stages.blocks[stages.feature_info.get_dicts()[0]["stage"] :]
    return HybridEmbed(backbone=stages, img_size=img_size, patch_size=1, embed_dim=embed_dim, **kwargs)


def is_vision_transformer(backbone: nn.Module) -> bool:
    """Return whether the backbone is one of timm's plain vision transformers."""
    return isinstance(backbone, VisionTransformer)
