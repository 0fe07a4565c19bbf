"""Logits and Grad-CAM in one pass: the backward of Grad-CAM written out as forward operations.

Grad-CAM (Selvaraju et al. 2017) weighs the channels of an activation map by the mean gradient of the target logit and
keeps the positive part. The activation map is the network's last feature map. Where its gradient is short enough to
write down, Grad-CAM costs little more than the forward pass, needs no autograd, and exports in one graph:

* average pooling, at most a layer norm, and a linear layer (most convolutional networks, Swin, averaging vision
  transformers): the gradient is the same in all cells, namely the linear layer's row, led back through the norm and
  divided by the number of cells (without a norm this is CAM of Zhou et al. 2016; Selvaraju et al., appendix A);
* vision transformer with a class token: the activation is `blocks[-1].norm1`, the last place where patches still
  influence the class token. Only the class token's query runs through the last block, and as only the patch mean of
  the gradient is needed, the backward through keys and values collapses to two products of a vector with a matrix.

All other backbones (hidden layers in the head, attention pooling, rotary positions with a class token, ...) use
`AutogradGradCam`, which is slower and cannot be exported. `grad_cam` chooses by comparing numbers, not by a list of
architectures.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from handlers.backbone import BackboneError, HalfTurn, fuse, is_vision_transformer


class GradCam(nn.Module):
    """The base: `forward(images (N,3,S,S), target int64 (N,), metadata) -> logits (N,K), map (N,h,w), features (N,D)`.

    A negative target means the top class. Metadata are encoded (handlers.metadata) or None. They add to the logits, but
    do not change the map, as what they add does not depend on the picture. The map is not negative and not normalised.
    The features are the input of the backbone's classifier. `map_shift` is how many cells too far down and right the
    last feature map lies; the map is moved back.
    """

    exportable = True

    def __init__(self, backbone: nn.Module, map_shift: float = 0.0) -> None:
        super().__init__()
        self.backbone: Any = backbone  # timm's classes have attributes that nn.Module does not declare
        self.map_shift = map_shift

    def _logits(self, features: Tensor, metadata: Tensor | None) -> Tensor:
        return fuse(self.backbone, self.backbone.get_classifier()(features), metadata)

    def _row(self, logits: Tensor, target: Tensor) -> Tensor:
        """Return the gradient of the target's logit at the features (N, D)."""
        return F.embedding(_resolve(logits, target), self.backbone.get_classifier().weight)

    def _map(self, weight: Tensor, *views: Tensor) -> Tensor:
        """Sum the channels of cells (N, h, w, C) by weight (N, C); return the positive part of the views' mean.

        A second view was turned by 180 degrees, so it lies too far up and left.
        """
        sums = [torch.einsum("nhwc,nc->nhw", cells, weight) for cells in views]
        if self.map_shift:
            shifts = (self.map_shift, -self.map_shift)
            sums = [moved_back(each, shift) for each, shift in zip(sums, shifts, strict=False)]
        return torch.relu(torch.stack(sums).mean(0))


class PooledGradCam(GradCam):
    """Backbones that average their last feature map, normalise the mean by `norm` if they have one, and classify it."""

    def __init__(self, backbone: nn.Module, norm: nn.LayerNorm | None, map_shift: float = 0.0) -> None:
        super().__init__(backbone, map_shift)
        self.norm = norm

    def forward(self, images: Tensor, target: Tensor, metadata: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        backbone = self.backbone
        views = backbone.views(images) if isinstance(backbone, HalfTurn) else (backbone.forward_features(images),)
        activation = torch.stack(views).mean(0)
        features = backbone.forward_head(activation, pre_logits=True)
        logits = self._logits(features, metadata)
        cells, gradient = feature_cells(backbone, activation), self._row(logits, target)
        if self.norm is not None:
            gradient = _layer_norm_backward(gradient, cells.mean((1, 2)), self.norm)
        weight = gradient / (cells.shape[1] * cells.shape[2])
        return logits, self._map(weight, *(feature_cells(backbone, view) for view in views)), features


class ClassTokenVitGradCam(GradCam):
    """Vision transformers that classify from the class token."""

    @staticmethod
    def supports(backbone: Any) -> bool:
        """Return whether the last block has the parts that `forward` reads; `grad_cam` compares the numbers."""
        if not (is_vision_transformer(backbone) and backbone.global_pool == "token"):
            return False
        block = backbone.blocks[-1]
        parts = (type(block), type(getattr(block, "attn", None)), type(getattr(block, "mlp", None)))
        return parts == (Block, Attention, Mlp) and isinstance(block.mlp.act, nn.GELU)

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
        logits = self._logits(features, metadata)

        # Backward, from the target logit to the mean over patches of the gradient at `normed`.
        gradient = _layer_norm_backward(self._row(logits, target), after_mlp, vit.norm)
        through_mlp = _gelu_backward((gradient * scale2) @ mlp.fc2.weight, hidden, mlp.act) @ mlp.fc1.weight
        gradient = gradient + _layer_norm_backward(through_mlp, after_attention, block.norm2)
        output = ((gradient * scale1) @ attention.proj.weight).unflatten(-1, (heads, 1, width))  # at weights @ value
        at_weights = output @ value.transpose(-2, -1)
        at_scores = weights * (at_weights - (weights * at_weights).sum(-1, keepdim=True))  # softmax backward
        first = vit.num_prefix_tokens
        mean_at_value = (weights[..., first:].mean(-1, keepdim=True) * output).flatten(1)
        mean_at_key = (at_scores[..., first:].mean(-1, keepdim=True) * query).flatten(1)
        weight = mean_at_value @ value_weight + mean_at_key @ key_weight  # (N, D)
        return logits, self._map(weight, feature_cells(vit, normed)), features


class TappedBackbone(nn.Module):
    """A backbone from images to logits, in the form that the grad-cam package takes.

    A hook on `layer` reads the last feature map. If only the class token is classified, patches of the output of
    `forward_features` influence nothing, so `layer` is the last place where they do.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.tap = nn.Identity()
        self.layer: nn.Module = self.tap
        if getattr(backbone, "global_pool", None) == "token":
            if not hasattr(backbone, "blocks"):
                raise BackboneError(
                    f"{backbone.default_cfg['architecture']} classifies its class token, but no layer is known where "
                    "patches still influence it. Choose another architecture."
                )
            self.layer = backbone.blocks[-1].norm1

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.backbone.get_classifier()(self.features(images))
        return logits

    def features(self, images: Tensor) -> Tensor:
        """Return the input of the classifier (N, D)."""
        features: Tensor = self.backbone.forward_head(self.tap(self.backbone.forward_features(images)), pre_logits=True)
        return features

    def channels_first(self, activation: Tensor) -> Tensor:
        """Return the output of `layer` as (N, C, h, w): the package's reshape_transform."""
        return feature_cells(self.backbone, activation).movedim(-1, 1)


class AutogradGradCam(GradCam):
    """Any backbone, through autograd; the reference for the other classes."""

    exportable = False

    def __init__(self, backbone: nn.Module, map_shift: float = 0.0) -> None:
        super().__init__(backbone, map_shift)
        self.tapped = TappedBackbone(backbone)

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

            hook = self.tapped.layer.register_forward_hook(keep)
            try:
                features = self.tapped.features(images)
            finally:
                hook.remove()
            logits = self._logits(features, metadata)
            classes = _resolve(logits, target)
            (gradient,) = torch.autograd.grad(logits.gather(1, classes[:, None]).sum(), kept[0])
        weight = feature_cells(self.backbone, gradient).mean((1, 2))
        cells = feature_cells(self.backbone, kept[0].detach())
        return logits.detach(), self._map(weight, cells), features.detach()


def grad_cam(backbone: Any, image_size: int, map_shift: float = 0.0) -> GradCam:
    """Return the fastest Grad-CAM module that is exact for a backbone in eval mode, by its answers to random images.

    `map_shift` as for GradCam.

    Raises:
        BackboneError: the classifier is not one linear layer.
    """
    if isinstance(backbone.get_classifier(), nn.Sequential):  # hidden layers: head_hidden
        return AutogradGradCam(backbone, map_shift)
    if not isinstance(backbone.get_classifier(), nn.Linear):
        raise BackboneError(
            f"{backbone.default_cfg['architecture']} does not end in one linear layer. Choose another architecture."
        )
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        activation = backbone.forward_features(images)
        features = backbone.forward_head(activation, pre_logits=True)
        mean = feature_cells(backbone, activation).mean((1, 2))
        norms = [module for module in backbone.modules() if isinstance(module, nn.LayerNorm)]
        for norm in [None, *reversed(norms)]:
            if _close(_normalise(mean, norm), features):
                return PooledGradCam(backbone, norm, map_shift)
        reference, target = AutogradGradCam(backbone, map_shift), torch.zeros(2, dtype=torch.int64)
        expected = reference(images, target)
        if ClassTokenVitGradCam.supports(backbone):
            candidate = ClassTokenVitGradCam(backbone, map_shift)
            if all(map(_close, candidate(images, target), expected)):
                return candidate
    return reference


def feature_cells(backbone: Any, activation: Tensor) -> Tensor:
    """Return a feature map (N, C, h, w) or (N, h, w, C), or tokens (N, L, C) of a square grid, as (N, h, w, C).

    Class and register tokens, which stand first, are left out.
    """
    if activation.ndim == 4:
        return activation.movedim(1, -1) if activation.shape[1] == backbone.num_features else activation
    tokens = activation.shape[1]
    prefix = getattr(backbone, "num_prefix_tokens", tokens - math.isqrt(tokens) ** 2)
    side = math.isqrt(tokens - prefix)
    return activation[:, prefix:].unflatten(1, (side, side))


def moved_back(maps: Tensor, cells: float) -> Tensor:
    """Move maps (N, h, w) by a number of cells up and left, with linear interpolation; cells at the edge are repeated.

    A negative number moves them down and right.
    """

    def weights(count: int) -> Tensor:
        """Return (count, count): how much of each old cell a new cell takes."""
        old = torch.arange(count, dtype=maps.dtype, device=maps.device)
        new = (old + cells).clamp(0, count - 1)
        return (1 - (new[:, None] - old).abs()).clamp(min=0)

    return weights(maps.shape[1]) @ maps @ weights(maps.shape[2]).T


def _resolve(logits: Tensor, target: Tensor) -> Tensor:
    return torch.where(target < 0, logits.argmax(-1), target)


def _close(tensor: Tensor, expected: Tensor) -> bool:
    if tensor.shape != expected.shape:
        return False
    return torch.allclose(tensor, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


def _normalise(inputs: Tensor, norm: nn.LayerNorm | None) -> Tensor:
    """Normalise inputs (N, D) by a norm of their width, which may be made for feature maps, like timm's LayerNorm2d."""
    if norm is None or norm.normalized_shape != inputs.shape[1:]:
        return inputs
    return F.layer_norm(inputs, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


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
