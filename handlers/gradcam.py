"""Logits and Grad-CAM in one pass: the backward of Grad-CAM written out as forward operations.

Grad-CAM (Selvaraju et al. 2017) weighs the channels of an activation map by the mean gradient of the target logit and
keeps the positive part. For the supported backbones that gradient is short enough to write down, so the map costs
little more than the forward pass, needs no autograd, and exports in one graph:

* global average pooling and a linear head (ResNet, EfficientNet, EfficientNetV2): the gradient is the head's row,
  divided by the number of cells (the equality with CAM of Zhou et al. 2016 is in Selvaraju et al., appendix A);
* vision transformer with average pooling: the activation is the last block's output, whose gradient is the same for
  every patch;
* vision transformer with a class token: the activation is `blocks[-1].norm1`, the last place where patches still
  influence the class token. Only the class token's query runs through the last block, and as only the patch mean of
  the gradient is needed, the backward through keys and values collapses to two products of a vector with a matrix.

Other backbones (query-key norm, attention pooling, hidden layers in the head, ...) use `AutogradGradCam`, which gives
the same numbers through autograd, is slower, and cannot be exported.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, SelectAdaptivePool2d
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from handlers.backbone import fuse, is_vision_transformer


class GradCam(nn.Module):
    """The base: `forward(images (N,3,S,S), target int64 (N,), metadata) -> logits (N,K), map (N,h,w), features (N,D)`.

    A negative target means the top class. Metadata are encoded (handlers.metadata) or None. They add to the logits, but
    do not change the map, as what they add does not depend on the picture. The map is not negative and not normalised.
    The features are the input of the backbone's classifier.
    """

    exportable = True

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone: Any = backbone  # timm's classes have attributes that nn.Module does not declare

    def _resolve(self, logits: Tensor, target: Tensor) -> Tensor:
        return torch.where(target < 0, logits.argmax(-1), target)


class PooledConvGradCam(GradCam):
    """Convolutional backbones: feature map, global average pooling, linear head."""

    @staticmethod
    def supports(backbone: Any) -> bool:
        """Return whether average pooling feeds one linear layer directly (unlike in MobileNetV3)."""
        pool, head = getattr(backbone, "global_pool", None), backbone.get_classifier()
        return (
            isinstance(pool, SelectAdaptivePool2d)
            and pool.pool_type in ("avg", "fast")
            and isinstance(head, nn.Linear)
            and head.in_features == backbone.num_features
        )

    def forward(self, images: Tensor, target: Tensor, metadata: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        features = self.backbone.forward_features(images)
        pooled = self.backbone.forward_head(features, pre_logits=True)
        logits = fuse(self.backbone, self.backbone.get_classifier()(pooled), metadata)
        weight = F.embedding(self._resolve(logits, target), self.backbone.get_classifier().weight)
        cells = features.shape[2] * features.shape[3]
        return logits, torch.relu(torch.einsum("nchw,nc->nhw", features, weight / cells)), pooled


class AveragedVitGradCam(GradCam):
    """Vision transformers that average their patch tokens, then normalise and classify."""

    @staticmethod
    def supports(backbone: Any) -> bool:
        """Return whether it has average pooling, at most a norm after it (timm's fc_norm), and a linear head."""
        return (
            is_vision_transformer(backbone)
            and backbone.global_pool == "avg"
            and backbone.attn_pool is None
            and not backbone.pool_include_prefix
            and isinstance(backbone.norm, nn.Identity)
            and isinstance(backbone.fc_norm, nn.LayerNorm | nn.Identity)
            and isinstance(backbone.head, nn.Linear)
        )

    def forward(self, images: Tensor, target: Tensor, metadata: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        vit = self.backbone
        patches = vit.forward_features(images)[:, vit.num_prefix_tokens :]
        pooled = patches.mean(1)
        features = vit.fc_norm(pooled)
        logits = fuse(vit, vit.head(features), metadata)
        gradient = F.embedding(self._resolve(logits, target), vit.head.weight)
        if isinstance(vit.fc_norm, nn.LayerNorm):
            gradient = _layer_norm_backward(gradient, pooled, vit.fc_norm)
        weight = gradient / patches.shape[1]
        return logits, _token_map(patches, weight, vit), features


class ClassTokenVitGradCam(GradCam):
    """Vision transformers that classify from the class token."""

    @staticmethod
    def supports(backbone: Any) -> bool:
        """Return whether it has timm's plain pre-norm blocks and attention, class token pooling and a linear head."""
        if not (is_vision_transformer(backbone) and backbone.global_pool == "token"):
            return False
        block = backbone.blocks[-1]
        attention: Any = getattr(block, "attn", None)
        return (
            (type(block), type(attention)) == (Block, Attention)
            and attention.attn_dim == block.norm1.normalized_shape[0]
            and attention.gate is None
            and isinstance(attention.q_norm, nn.Identity)
            and isinstance(attention.k_norm, nn.Identity)
            and isinstance(attention.norm, nn.Identity)
            and isinstance(block.norm1, nn.LayerNorm)
            and isinstance(block.norm2, nn.LayerNorm)
            and isinstance(block.mlp.act, nn.GELU)
            and isinstance(block.mlp.norm, nn.Identity)
            and isinstance(backbone.norm, nn.LayerNorm)
            and isinstance(backbone.fc_norm, nn.Identity)
            and isinstance(backbone.head, nn.Linear)
            and backbone.cls_token is not None
        )

    def forward(self, images: Tensor, target: Tensor, metadata: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        vit = self.backbone
        tokens = vit.norm_pre(vit.patch_drop(vit._pos_embed(vit.patch_embed(images))))
        for block in vit.blocks[:-1]:
            tokens = block(tokens)
        block = vit.blocks[-1]
        attention, mlp = block.attn, block.mlp
        heads, width = attention.num_heads, attention.head_dim
        scale1, scale2 = _layer_scale(block.ls1), _layer_scale(block.ls2)
        query_weight, key_weight, value_weight = attention.qkv.weight.chunk(3)
        bias = attention.qkv.bias
        query_bias, key_value_bias = (None, None) if bias is None else (bias[: heads * width], bias[heads * width :])

        # Forward, for the class token alone. H heads of width d, T tokens, D = H * d channels.
        normed = block.norm1(tokens)  # (N, T, D): the activation Grad-CAM looks at
        query = F.linear(normed[:, 0], query_weight, query_bias).unflatten(-1, (heads, 1, width)) * attention.scale
        key_value = F.linear(normed, torch.cat([key_weight, value_weight]), key_value_bias)
        key, value = key_value.unflatten(-1, (2, heads, width)).permute(2, 0, 3, 1, 4).unbind(0)  # (N, H, T, d) each
        weights = (query @ key.transpose(-2, -1)).softmax(-1)  # (N, H, 1, T)
        after_attention = tokens[:, 0] + scale1 * attention.proj((weights @ value).flatten(1))
        hidden = mlp.fc1(block.norm2(after_attention))
        after_mlp = after_attention + scale2 * mlp.fc2(mlp.act(hidden))
        features = vit.norm(after_mlp)
        logits = fuse(vit, vit.head(features), metadata)

        # Backward, from the target logit to the mean over patches of the gradient at `normed`.
        gradient = F.embedding(self._resolve(logits, target), vit.head.weight)
        gradient = _layer_norm_backward(gradient, after_mlp, vit.norm)
        through_mlp = _gelu_backward((gradient * scale2) @ mlp.fc2.weight, hidden, mlp.act) @ mlp.fc1.weight
        gradient = gradient + _layer_norm_backward(through_mlp, after_attention, block.norm2)
        output = ((gradient * scale1) @ attention.proj.weight).unflatten(-1, (heads, 1, width))  # at weights @ value
        at_weights = output @ value.transpose(-2, -1)
        at_scores = weights * (at_weights - (weights * at_weights).sum(-1, keepdim=True))  # softmax backward
        first = vit.num_prefix_tokens
        mean_at_value = (weights[..., first:].mean(-1, keepdim=True) * output).flatten(1)
        mean_at_key = (at_scores[..., first:].mean(-1, keepdim=True) * query).flatten(1)
        weight = mean_at_value @ value_weight + mean_at_key @ key_weight  # (N, D)
        return logits, _token_map(normed[:, first:], weight, vit), features


class AutogradGradCam(GradCam):
    """Any backbone whose last feature map or tokens are known, through autograd; the reference for the other classes.

    Raises ValueError at construction for an unknown backbone.
    """

    exportable = False

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__(backbone)
        self.layer = target_layer(backbone)

    def forward(self, images: Tensor, target: Tensor, metadata: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        kept: list[Tensor] = []
        with torch.inference_mode(False), torch.enable_grad():
            # autograd refuses tensors made in inference mode
            images, target = images.clone(), target.clone()
            metadata = None if metadata is None else metadata.clone()

            def keep(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
                # The map needs the gradient at this activation only, so nothing before it is recorded.
                kept.append(output.detach().requires_grad_(True))
                return kept[0]

            hook = self.layer.register_forward_hook(keep)
            try:
                features = self.backbone.forward_head(self.backbone.forward_features(images), pre_logits=True)
                logits = fuse(self.backbone, self.backbone.get_classifier()(features), metadata)
            finally:
                hook.remove()
            classes = self._resolve(logits, target)
            (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), kept[0])
        activation, logits, features = kept[0].detach(), logits.detach(), features.detach()
        if activation.ndim == 3:
            first = getattr(self.backbone, "num_prefix_tokens", 0)
            return logits, _token_map(activation[:, first:], gradient[:, first:].mean(1), self.backbone), features
        return logits, torch.relu(torch.einsum("nchw,nc->nhw", activation, gradient.mean((2, 3)))), features


def grad_cam(backbone: nn.Module) -> GradCam:
    """Return the fastest exact Grad-CAM module for a backbone in eval mode."""
    for kind in (ClassTokenVitGradCam, AveragedVitGradCam, PooledConvGradCam):
        if kind.supports(backbone):
            return kind(backbone)
    return AutogradGradCam(backbone)


def target_layer(backbone: Any) -> nn.Module:
    """Return the layer whose activation Grad-CAM uses, as the grad-cam package expects it.

    Raises ValueError for a backbone of unknown shape.
    """
    if is_vision_transformer(backbone):
        return backbone.blocks[-1] if backbone.global_pool == "avg" else backbone.blocks[-1].norm1
    if hasattr(backbone, "layer4"):  # ResNet
        return backbone.layer4
    if hasattr(backbone, "conv_head") and hasattr(backbone, "bn2"):  # EfficientNet: convolution, norm with activation
        return backbone.bn2
    raise ValueError(f"Grad-CAM does not support {type(backbone).__name__}: its last feature layer is not known.")


def _token_map(patches: Tensor, weight: Tensor, vit: Any) -> Tensor:
    height, width = vit.patch_embed.grid_size
    return torch.relu((patches @ weight[:, :, None]).squeeze(-1)).reshape(-1, height, width)


def _layer_scale(module: Any) -> Tensor | float:
    return 1.0 if isinstance(module, nn.Identity) else module.gamma


def _layer_norm_backward(gradient: Tensor, inputs: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Compute the gradient at the inputs (N, D) of a layer norm from the gradient at its output (N, D)."""
    centred = inputs - inputs.mean(-1, keepdim=True)
    inverse = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + norm.eps)
    normed = centred * inverse
    scaled = gradient * norm.weight
    return inverse * (scaled - scaled.mean(-1, keepdim=True) - normed * (scaled * normed).mean(-1, keepdim=True))


def _gelu_backward(gradient: Tensor, inputs: Tensor, gelu: nn.GELU) -> Tensor:
    """Compute the gradient at the inputs of GELU: d/dx x·Φ(x) = Φ(x) + x·φ(x), or its tanh approximation."""
    if gelu.approximate == "tanh":
        c, a = 0.7978845608028654, 0.044715  # sqrt(2/π); Hendrycks & Gimpel 2016
        t = torch.tanh(c * (inputs + a * inputs**3))
        return gradient * (0.5 * (1 + t) + 0.5 * inputs * (1 - t * t) * c * (1 + 3 * a * inputs**2))
    normal_cdf = 0.5 * (1 + torch.erf(inputs * 0.7071067811865476))
    normal_pdf = torch.exp(-0.5 * inputs * inputs) * 0.3989422804014327
    return gradient * (normal_cdf + inputs * normal_pdf)
