"""Grad-CAM as forward operations agrees with autograd and with the grad-cam package on every supported shape."""

import pytest
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from handlers.backbone import SplitAttention, split_attention
from handlers.gradcam import (
    AutogradGradCam,
    AveragedVitGradCam,
    ClassTokenVitGradCam,
    PooledConvGradCam,
    grad_cam,
    target_layer,
)
from tests.models import ARCHITECTURE, OPTIONS, tiny_backbone

# The same layers, fewer and narrower.
SMALL = {"channel_multiplier": 0.5, "depth_multiplier": 0.3}
CASES = {
    "vit": (ARCHITECTURE, OPTIONS, ClassTokenVitGradCam),
    "vit-conv-stem": (ARCHITECTURE, {**OPTIONS, "stem": "conv"}, ClassTokenVitGradCam),
    "vit-resnet-stem": (ARCHITECTURE, {**OPTIONS, "stem": "resnet"}, ClassTokenVitGradCam),
    "vit-efficientnet-stem": (ARCHITECTURE, {**OPTIONS, "stem": "efficientnet_lite0"}, ClassTokenVitGradCam),
    "vit-layer-scale": (ARCHITECTURE, {**OPTIONS, "init_values": 0.3}, ClassTokenVitGradCam),
    "vit-no-qkv-bias": (ARCHITECTURE, {**OPTIONS, "qkv_bias": False}, ClassTokenVitGradCam),
    "vit-registers": (ARCHITECTURE, {**OPTIONS, "reg_tokens": 2}, ClassTokenVitGradCam),
    "vit-average-pooling": (ARCHITECTURE, {**OPTIONS, "global_pool": "avg"}, AveragedVitGradCam),
    "vit-average-no-class-token": (
        ARCHITECTURE,
        {**OPTIONS, "global_pool": "avg", "class_token": False},
        AveragedVitGradCam,
    ),
    "vit-query-key-norm": (ARCHITECTURE, {**OPTIONS, "qk_norm": True}, AutogradGradCam),
    "resnet18": ("resnet18", {}, PooledConvGradCam),
    "efficientnet_b0": ("efficientnet_b0", {}, PooledConvGradCam),
    "efficientnetv2_s": ("tf_efficientnetv2_s", SMALL, PooledConvGradCam),
}


@pytest.fixture(params=CASES)
def case(request):
    architecture, options, kind = CASES[request.param]
    backbone = tiny_backbone(architecture=architecture, options=options)
    torch.manual_seed(1)
    return backbone, kind, torch.randn(3, 3, 64, 64), torch.tensor([-1, 4, 0])


def test_agrees_with_autograd(case):
    backbone, kind, images, target = case
    module = grad_cam(backbone)
    assert type(module) is kind
    with torch.inference_mode():
        logits, maps, features = module(images, target)
        expected_logits = backbone(images)
    _, expected, expected_features = AutogradGradCam(backbone)(images, target)
    assert torch.allclose(features, expected_features, atol=1e-5 * float(expected_features.abs().max()) + 1e-6)
    with torch.inference_mode():
        assert torch.allclose(backbone.get_classifier()(features), logits, atol=1e-5)
    assert torch.allclose(logits, expected_logits, atol=1e-5 * float(expected_logits.abs().max()) + 1e-6)
    assert float((maps - expected).abs().max() / expected.max()) < 1e-4
    assert (maps >= 0).all()


# The package turns the logits it takes gradients of into floats.
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")
def test_agrees_with_the_grad_cam_package(case):
    backbone, _, images, target = case
    logits, maps, _ = grad_cam(backbone)(images, target)
    wanted = torch.where(target < 0, logits.argmax(1), target)

    def to_grid(tokens):
        patches = tokens[:, backbone.num_prefix_tokens :]
        return patches.unflatten(1, backbone.patch_embed.grid_size).permute(0, 3, 1, 2)

    transform = to_grid if hasattr(backbone, "patch_embed") else None
    with GradCAM(backbone, [target_layer(backbone)], reshape_transform=transform) as reference:
        # The package enlarges its map to the image; a map of the same size keeps the comparison exact.
        reference.get_target_width_height = lambda images: (maps.shape[2], maps.shape[1])
        expected = torch.tensor(reference(images, [ClassifierOutputTarget(int(index)) for index in wanted]))
    # The package scales each map to [0, 1].
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    assert float(((maps - low) / (high - low + 1e-7) - expected).abs().max()) < 1e-3


def test_the_map_follows_the_target_class(case):
    backbone, _, images, _ = case
    module = grad_cam(backbone)
    maps = [module(images, torch.full((3,), index))[1] for index in range(8)]
    assert len({tuple(some.flatten().tolist()) for some in maps}) > 2


def test_autograd_leaves_no_hook_and_no_gradient(case):
    backbone, _, images, target = case
    AutogradGradCam(backbone)(images, target)
    assert not target_layer(backbone)._forward_hooks
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_an_unknown_backbone_is_refused_with_its_name():
    with pytest.raises(ValueError, match="MlpMixer"):
        grad_cam(tiny_backbone(architecture="mixer_s32_224", options={"img_size": 64}))


def test_attention_by_three_products_changes_nothing(case):
    backbone, kind, images, target = case
    with torch.no_grad():
        before = grad_cam(backbone)(images, target)
        split_attention(backbone)
        after = grad_cam(backbone)(images, target)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)
    attention = [block.attn for block in getattr(backbone, "blocks", []) if hasattr(block, "attn")]
    split = [isinstance(one, SplitAttention) for one in attention]
    assert split == ([True, False] if kind in (ClassTokenVitGradCam, AveragedVitGradCam) else [False] * len(split))
    if any(split):
        with pytest.raises(ValueError, match="no mask"):
            attention[0](torch.zeros(1, 4, 48), is_causal=True)
