"""Grad-CAM as forward operations agrees with autograd and with the grad-cam package for every family of backbones."""

import copy

import pytest
import torch
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from handlers.backbone import BackboneError, SplitAttention, build_backbone, split_attention
from handlers.gradcam import AutogradGradCam, ClassTokenVitGradCam, PooledGradCam, TappedBackbone, grad_cam, moved_back
from handlers.serving_graph import map_shift
from tests.models import ARCHITECTURE, OPTIONS, tiny_backbone, tiny_bundle
from training.config import ModelSettings

# The same layers, fewer and narrower.
SMALL = {"channel_multiplier": 0.5, "depth_multiplier": 0.3}
SHALLOW = {"depths": (1, 1, 1, 1)}
CONVNEXT = {**SHALLOW, "dims": (8, 16, 32, 64)}
SWIN = {**SHALLOW, "embed_dim": 16, "num_heads": (1, 2, 4, 8)}
# Architecture, options, Grad-CAM, and whether split_attention changes it.
CASES = {
    "vit": (ARCHITECTURE, OPTIONS, ClassTokenVitGradCam, True),
    "vit-conv-stem": (ARCHITECTURE, {**OPTIONS, "stem": "conv"}, ClassTokenVitGradCam, True),
    "vit-resnet-stem": (ARCHITECTURE, {**OPTIONS, "stem": "resnet"}, ClassTokenVitGradCam, True),
    "vit-efficientnet-stem": (ARCHITECTURE, {**OPTIONS, "stem": "efficientnet_lite0"}, ClassTokenVitGradCam, True),
    "vit-layer-scale": (ARCHITECTURE, {**OPTIONS, "init_values": 0.3}, ClassTokenVitGradCam, True),
    "vit-no-qkv-bias": (ARCHITECTURE, {**OPTIONS, "qkv_bias": False}, ClassTokenVitGradCam, True),
    "vit-registers": (ARCHITECTURE, {**OPTIONS, "reg_tokens": 2}, ClassTokenVitGradCam, True),
    "vit-average-pooling": (ARCHITECTURE, {**OPTIONS, "global_pool": "avg"}, PooledGradCam, True),
    "vit-no-class-token": (ARCHITECTURE, {**OPTIONS, "global_pool": "avg", "class_token": False}, PooledGradCam, True),
    "vit-attention-pooling": (ARCHITECTURE, {**OPTIONS, "global_pool": "map"}, AutogradGradCam, True),
    "vit-query-key-norm": (ARCHITECTURE, {**OPTIONS, "qk_norm": True}, AutogradGradCam, False),
    "deit": ("deit_tiny_patch16_224", OPTIONS, ClassTokenVitGradCam, True),
    "dinov2": ("vit_small_patch14_dinov2", OPTIONS, ClassTokenVitGradCam, True),
    "dinov3": ("vit_small_patch16_dinov3", OPTIONS, PooledGradCam, False),
    "eva02": ("eva02_tiny_patch14_224", OPTIONS, PooledGradCam, False),
    "eva02-class-token": ("eva02_tiny_patch14_224", {**OPTIONS, "global_pool": "token"}, AutogradGradCam, False),
    "beit": ("beit_base_patch16_224", {**OPTIONS, "global_pool": "token"}, AutogradGradCam, False),
    "swin": ("swin_tiny_patch4_window7_224", SWIN, PooledGradCam, False),
    "swin-half-turn": ("swin_tiny_patch4_window7_224", {**SWIN, "half_turn": True}, PooledGradCam, False),
    "swinv2": ("swinv2_tiny_window8_256", SWIN, PooledGradCam, False),
    "mixer": ("mixer_s32_224", {}, PooledGradCam, False),
    "convnext": ("convnext_tiny", CONVNEXT, PooledGradCam, False),
    "convnextv2": ("convnextv2_tiny", CONVNEXT, PooledGradCam, False),
    "densenet": ("densenet121", {"block_config": (1, 1, 1, 1)}, PooledGradCam, False),
    "regnetx": ("regnetx_002", {}, PooledGradCam, False),
    "regnety": ("regnety_002", {}, PooledGradCam, False),
    "resnet18": ("resnet18", {}, PooledGradCam, False),
    "efficientnet_b0": ("efficientnet_b0", {}, PooledGradCam, False),
    "efficientnetv2_s": ("tf_efficientnetv2_s", SMALL, PooledGradCam, False),
    "efficientnet_lite0": ("tf_efficientnet_lite0", {}, PooledGradCam, False),
    "efficientnet_lite0-stride-16": ("tf_efficientnet_lite0", {"output_stride": 16}, PooledGradCam, False),
    "efficientnet_lite0-half-turn": ("tf_efficientnet_lite0", {"half_turn": True}, PooledGradCam, False),
    "mobilenetv3": ("mobilenetv3_small_050", {}, AutogradGradCam, False),
    "mobilenetv4": ("mobilenetv4_conv_small_035", {}, AutogradGradCam, False),
    "mobilenetv4-hybrid": ("mobilenetv4_hybrid_medium_075", {}, AutogradGradCam, False),
}


@pytest.fixture(params=CASES)
def case(request):
    architecture, options, kind, _ = CASES[request.param]
    size = 56 if "patch14" in architecture else 64
    backbone = tiny_backbone(architecture=architecture, options=options, image_size=size)
    torch.manual_seed(1)
    return backbone, kind, torch.randn(3, 3, size, size), torch.tensor([-1, 4, 0])


# The package turns the logits it takes gradients of into floats.
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")
def test_agrees_with_autograd_and_with_the_grad_cam_package(case):
    backbone, kind, images, target = case
    module = grad_cam(backbone, images.shape[-1])
    assert type(module) is kind
    with torch.inference_mode():
        logits, maps, features = module(images, target)
        expected_logits = backbone(images)
        assert torch.allclose(backbone.get_classifier()(features), logits, atol=1e-5)
    assert torch.allclose(logits, expected_logits, atol=1e-5 * float(expected_logits.abs().max()) + 1e-6)
    assert (maps >= 0).all()

    reference = AutogradGradCam(backbone)
    _, expected, expected_features = reference(images, target)
    assert torch.allclose(features, expected_features, atol=1e-5 * float(expected_features.abs().max()) + 1e-6)
    assert float((maps - expected).abs().max() / expected.max()) < 1e-4
    assert not reference.tapped.layer._forward_hooks
    assert all(parameter.grad is None for parameter in backbone.parameters())

    targets = [ClassifierOutputTarget(int(index)) for index in torch.where(target < 0, logits.argmax(1), target)]
    tapped = TappedBackbone(backbone)
    with GradCAM(tapped, [tapped.layer], reshape_transform=tapped.channels_first) as package:
        # The package enlarges its map to the image; a map of the same size keeps the comparison exact.
        package.get_target_width_height = lambda images: (maps.shape[2], maps.shape[1])
        scaled = torch.tensor(package(images, targets))
    # The package scales each map to [0, 1].
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    assert float(((maps - low) / (high - low + 1e-7) - scaled).abs().max()) < 1e-3

    of_each_class = [module(images, torch.full((3,), index))[1].flatten().tolist() for index in range(8)]
    assert len({tuple(values) for values in of_each_class}) > 2


# A norm before the classifier, channels last, and two views of each picture.
@pytest.mark.parametrize("name", ["convnext", "swin", "efficientnet_lite0-half-turn"])
def test_pooled_networks_are_exported(name, tmp_path):
    architecture, options, _, _ = CASES[name]
    assert tiny_bundle(tmp_path / "bundle", architecture=architecture, options=options).config.runtime == "openvino"


def test_a_smaller_output_stride_keeps_the_weights_and_doubles_the_grid():
    settings = {"architecture": "tf_efficientnet_lite0", "image_size": 64, "symmetric_padding": True}
    coarse, fine = (ModelSettings(**settings, output_stride=stride) for stride in (32, 16))
    networks = [build_backbone(s.architecture, 8, s.image_size, options=s.options).eval() for s in (coarse, fine)]
    networks[1].load_state_dict(networks[0].state_dict())
    maps = [network.forward_features(torch.ones(1, 3, 64, 64)) for network in networks]
    assert [m.shape[-2:] for m in maps] == [(2, 2), (4, 4)]
    # With symmetric padding, every second cell of the fine grid is a cell of the coarse one.
    assert torch.allclose(maps[1][..., ::2, ::2], maps[0], atol=1e-4)


@pytest.mark.parametrize(("stride", "cells"), [(32, 31 / 32), (16, 23 / 16)])
def test_maps_of_symmetric_padding_are_moved_back(stride, cells):
    settings = {"architecture": "tf_efficientnet_lite0", "image_size": 64, "output_stride": stride}
    assert map_shift(ModelSettings(**settings).options) == 0
    assert map_shift(ModelSettings(**settings, symmetric_padding=True).options) == cells


def test_moving_back_interpolates_and_keeps_the_heat():
    maps = torch.zeros(1, 4, 4)
    maps[0, 2, 3] = 1
    expected = torch.zeros(4, 4)
    expected[0:2, 1] = 0.25  # by a cell and a half, up and left
    expected[0:2, 2:] = 0.5  # the last column is repeated
    assert torch.allclose(moved_back(maps, 1.5)[0], expected)
    assert torch.allclose(moved_back(maps, 1.0)[0, :3, :3].nonzero(), torch.tensor([[1, 2]]))
    turned = maps.flip(1, 2)
    assert torch.equal(moved_back(turned, -1.5), moved_back(maps, 1.5).flip(1, 2))
    assert moved_back(maps.to("meta"), 1.0).device.type == "meta", "as on a GPU"


@pytest.mark.parametrize("architecture", ["tf_efficientnet_lite0", "swin_tiny_patch4_window7_224"])
def test_half_turn_averages_the_picture_and_its_half_turn(architecture):
    size, images = 64, torch.randn(2, 3, 64, 64)
    options = SWIN if architecture.startswith("swin") else {"pad_type": ""}
    both = tiny_backbone(architecture=architecture, options={**options, "half_turn": True}, image_size=size)
    once = tiny_backbone(architecture=architecture, options=options, image_size=size)
    once.load_state_dict(both.state_dict())
    target, turned = torch.tensor([1, 3]), images.flip(2, 3)
    with torch.no_grad():
        expected = (once(images) + once(turned)) / 2
        assert torch.allclose(both(images), expected, atol=1e-5)
        assert torch.allclose(copy.deepcopy(both)(images), expected, atol=1e-5), "as the averaged weights of training"
        logits, maps, _ = grad_cam(both, size, 1.4)(images, target)
        assert torch.allclose(logits, expected, atol=1e-5)
        assert torch.allclose(grad_cam(both, size, 1.4)(turned, target)[1], maps.flip(1, 2), atol=1e-5)
        once.train()
        both.train()
        torch.manual_seed(0)
        in_training = both(images)
        torch.manual_seed(0)
        assert torch.equal(in_training, once(images))


def test_a_backbone_with_two_classifiers_is_refused():
    backbone = build_backbone("deit_tiny_distilled_patch16_224", 8, 64, options=OPTIONS)
    with pytest.raises(BackboneError, match="deit_tiny_distilled_patch16_224 does not end in one linear layer"):
        grad_cam(backbone.eval(), 64)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith(("vit", "dei", "din"))])
def test_attention_by_three_products_changes_nothing(name):
    architecture, options, _, plain = CASES[name]
    backbone = tiny_backbone(architecture=architecture, options=options, image_size=112)
    images, target = torch.randn(3, 3, 112, 112), torch.tensor([-1, 4, 0])
    with torch.no_grad():
        before = grad_cam(backbone, 112)(images, target)
        split_attention(backbone)
        after = grad_cam(backbone, 112)(images, target)
    for tensor, expected in zip(after, before, strict=True):
        torch.testing.assert_close(tensor, expected, atol=1e-5, rtol=1e-4)
    assert [isinstance(block.attn, SplitAttention) for block in backbone.blocks] == [plain, False]
    if plain:
        with pytest.raises(ValueError, match="no mask"):
            backbone.blocks[0].attn(torch.zeros(1, 4, 48), is_causal=True)
