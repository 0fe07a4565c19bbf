"""A network that cannot be built, run or explained is refused with its reason before data are read."""

import pytest

from handlers.backbone import BackboneError
from training.backbone_check import check_backbone
from training.config import ModelSettings
from training.train import main


@pytest.mark.parametrize(
    ("architecture", "size", "nearest"),
    [
        ("vit_tiny_patch16_224", 225, 224),  # the last pixels would be cut off
        ("deit_tiny_patch16_224", 130, 128),
        ("vit_small_patch14_dinov2", 160, 154),
        ("vit_small_patch16_dinov3", 170, 176),
        ("swin_tiny_patch4_window7_224", 98, 100),
        ("densenet121", 28, 29),  # a smaller map vanishes between the stages
    ],
)
def test_the_nearest_image_size_is_suggested(architecture, size, nearest):
    with pytest.raises(BackboneError) as caught:
        check_backbone(ModelSettings(architecture=architecture, image_size=size))
    assert str(caught.value) == f"{architecture} cannot take images of {size} pixels. Use image_size={nearest}."


@pytest.mark.parametrize(
    ("architecture", "size"),
    [
        ("deit_tiny_patch16_224", 128),
        ("eva02_tiny_patch14_224", 140),
        ("mobilenetv4_conv_small", 50),
        ("swin_tiny_patch4_window7_224", 128),
        ("pvt_v2_b0", 160),  # its patches overlap, so that they need not divide the side
    ],
)
def test_other_sizes_than_the_pretrained_are_taken(architecture, size):
    check_backbone(ModelSettings(architecture=architecture, image_size=size))


@pytest.mark.parametrize(
    ("architecture", "settings", "reason"),
    [
        ("deit_tiny_distilled_patch16_224", [], "does not end in one linear layer"),
        ("coat_lite_tiny", [], "coat_lite_tiny classifies its class token, but no layer is known"),
        ("resnet18", ["depth=3"], "resnet18 cannot be built with"),
        ("vit_tiny_patch16_224", ["image_size=225"], "Use image_size=224"),
    ],
)
def test_a_network_is_refused_before_data_are_read(tmp_path, architecture, settings, reason):
    settings = [f"architecture={architecture}", f"manifest={tmp_path / 'nowhere.csv'}", *settings]
    with pytest.raises(BackboneError, match=reason):
        main(["pretrained=false", *settings], output=str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("architecture", "options", "reason"),
    [
        ("vit_tiny_patch16_224", {}, "needs a convolutional network, but VisionTransformer is none"),
        ("resnet18", {"head_hidden": [8]}, "needs a head of one linear layer"),
    ],
)
def test_half_turn_is_refused_where_it_cannot_be_explained(architecture, options, reason):
    with pytest.raises(BackboneError, match=f"half_turn {reason}"):
        check_backbone(ModelSettings(architecture=architecture, image_size=64, half_turn=True, **options))
