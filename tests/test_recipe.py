"""The parts of the training loop: losses, optimiser, schedule, freezing, heads, mixing."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from handlers.backbone import build_backbone
from handlers.gradcam import grad_cam
from training import finish
from training.config import load_config
from training.data.draws import Draws
from training.losses import ClassificationLoss, class_weights, prior_logits
from training.recipe import heads_of, learning_rate, make_mix, make_optimizer, seed_everything, set_trainable


def logits_and_labels(n=16, classes=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, classes, generator=generator) * 2, torch.randint(classes, (n,), generator=generator)


# ---- losses


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_equals_that_of_torch(smoothing):
    z, y = logits_and_labels()
    expected = F.cross_entropy(z, y, label_smoothing=smoothing)
    torch.testing.assert_close(ClassificationLoss(label_smoothing=smoothing)(z, y), expected)
    soft = torch.softmax(torch.randn(16, 5), 1)
    expected = F.cross_entropy(z, soft, label_smoothing=smoothing)
    torch.testing.assert_close(ClassificationLoss(label_smoothing=smoothing)(z, soft), expected)


def test_class_weights_multiply_the_loss_of_each_image():
    z, y = logits_and_labels()
    w = torch.tensor([1.0, 2, 3, 4, 5])
    expected = F.cross_entropy(z, y, weight=w, reduction="none").mean()
    torch.testing.assert_close(ClassificationLoss(w)(z, y), expected)


def test_focal_loss_by_hand():
    z, y = torch.tensor([[math.log(3), 0.0], [0.0, 0.0]]), torch.tensor([0, 1])  # p of the truth: 3/4 and 1/2
    expected = -((1 / 4) ** 2 * math.log(3 / 4) + (1 / 2) ** 2 * math.log(1 / 2)) / 2
    assert ClassificationLoss(gamma=2.0)(z, y).item() == pytest.approx(expected)


def test_class_weights_balance_classes_and_keep_the_mean_weight():
    counts = [900, 90, 10]
    for power in (0.0, 0.5, 1.0):
        w = class_weights(counts, power)
        assert (w * torch.tensor(counts)).sum().item() == pytest.approx(1000, rel=1e-5)
        assert (w[1] / w[0]).item() == pytest.approx(10**power, rel=1e-5)


# ---- optimiser, schedule, mixing


def test_logit_adjustment_removes_the_class_frequencies():
    """Menon et al. 2021: logits that hold only the class frequencies are all equal after the adjustment."""
    counts = [900, 90, 10]
    frequencies = np.log(np.array(counts) / 1000)
    assert np.ptp(frequencies - prior_logits(counts, 1.0)) == pytest.approx(0, abs=1e-12)
    assert frequencies - prior_logits(counts, 0.5) == pytest.approx(frequencies / 2)
    assert not prior_logits(counts, 0.0).any()


@pytest.mark.parametrize("hidden", [[], [8]])
def test_logit_adjustment_is_part_of_the_bias(hidden):
    backbone = build_backbone("test_vit", 3, 32, options={"head_hidden": hidden} if hidden else {}).eval()
    images, shift = torch.rand(2, 3, 32, 32), np.array([-0.1, -2.0, -4.0])
    with torch.inference_mode():
        before = backbone(images)
        finish.lower_bias(backbone, shift)
        assert backbone(images).numpy() == pytest.approx(before.numpy() - shift, abs=1e-5)


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    config = load_config(None, ["lr=1e-3", "min_lr=1e-5", "epochs=10", "warmup_epochs=2"])
    rates = [learning_rate(config, step, 100) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-3 / 200)
    assert max(rates) == rates[200] == pytest.approx(1e-3)
    assert rates[:201] == sorted(rates[:201])
    assert rates[200:] == sorted(rates[200:], reverse=True)
    assert rates[600] == pytest.approx((1e-3 + 1e-5) / 2)  # half way down
    assert rates[-1] == pytest.approx(1e-5, rel=0.01)
    assert learning_rate(load_config(None, ["lr=1e-3", "scheduler=constant", "warmup_epochs=0"]), 0, 100) == 1e-3


def test_the_period_of_warm_restarts_doubles():
    settings = ["lr=1e-3", "min_lr=1e-5", "epochs=9", "warmup_epochs=2", "scheduler=restarts", "restart_epochs=1"]
    rates = [learning_rate(load_config(None, settings), step, 100) for step in range(900)]
    tops = [step for step in range(201, 900) if rates[step] > rates[step - 1]]
    assert tops == [300, 500]  # periods of 1, 2 and 4 epochs after the warm-up
    assert [rates[step] for step in tops] == pytest.approx([1e-3] * 2)
    assert rates[400] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates[499] == pytest.approx(1e-5, rel=0.01)


def test_layer_decay_slows_early_layers():
    model = build_backbone("test_vit", 3, 32)
    groups = make_optimizer(model, load_config(None, ["layer_decay=0.5"])).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    scales = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert scales["head.weight"] == 1
    assert scales["patch_embed.proj.weight"] == min(scales.values()) < scales["blocks.0.attn.qkv.weight"] < 1
    plain = make_optimizer(model, load_config(None)).param_groups
    assert {group["lr_scale"] for group in plain} == {1.0}


@pytest.mark.parametrize(("architecture", "head"), [("resnet18", "fc"), ("regnety_002", "head.fc")])
def test_a_frozen_backbone_does_not_change(architecture, head):
    model = build_backbone(architecture, 3, 32)
    optimizer = make_optimizer(model, load_config(None))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for heads in (heads_of(model), []):
        set_trainable(model, heads)
        model(torch.randn(4, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        if heads:
            assert changed == {f"{head}.weight", f"{head}.bias"}  # not even a running mean of a batch norm
    first_layer, _ = next(model.named_parameters())
    assert first_layer in changed
    assert {name for name in before if name.endswith("running_mean")} <= changed


@pytest.mark.parametrize(
    ("architecture", "last", "first"),
    [
        ("resnet18", "layer2.1.bn2.running_mean", "layer3.0.bn1.running_mean"),
        ("efficientnet_lite0", "blocks.1.1.bn3.running_mean", "blocks.2.0.bn1.running_mean"),
        ("test_vit", "blocks.1.mlp.fc2.weight", "blocks.2.mlp.fc2.weight"),
    ],
)
def test_frozen_stages_keep_their_weights_and_norms(architecture, last, first):
    torch.manual_seed(0)
    model = build_backbone(architecture, 3, 64, options={"depth": 3} if architecture == "test_vit" else {})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    set_trainable(model, frozen_stages=3)
    assert model.training
    model(torch.randn(4, 3, 64, 64)).square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert last not in changed
    assert first in changed


@pytest.mark.parametrize("architecture", ["test_vit", "resnet18", "efficientnet_b0"])
def test_a_head_with_hidden_layers(architecture):
    model = build_backbone(architecture, 3, 32, options={"head_hidden": [16, 8], "drop_rate": 0.3})
    widths = [
        (layer.in_features, layer.out_features) for layer in model.get_classifier() if hasattr(layer, "in_features")
    ]
    assert widths == [(model.num_features, 16), (16, 8), (8, 3)]
    assert [type(layer).__name__ for layer in model.get_classifier()][1:4] == ["BatchNorm1d", "ReLU", "Dropout"]
    cam = grad_cam(model.eval(), 32)
    logits, maps, features = cam(torch.randn(2, 3, 32, 32), torch.tensor([-1, 0]))
    assert logits.shape == (2, 3)
    assert not cam.exportable
    assert maps.ndim == 3
    assert features.shape == (2, model.num_features)


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam)])
def test_norms_biases_and_tokens_are_not_decayed(name, kind):
    model = build_backbone("test_vit", 3, 32)
    optimizer = make_optimizer(model, load_config(None, [f"optimizer={name}", "weight_decay=0.1"]))
    assert type(optimizer) is kind
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for parameter_name, parameter in model.named_parameters():
        spared = parameter.ndim == 1 or parameter_name in ("pos_embed", "cls_token")
        assert decay[id(parameter)] == (0 if spared else 0.1), parameter_name


def test_mixing_blends_images_and_targets_equally():
    mix = make_mix(load_config(None, ["mixup_alpha=1", "mix_probability=1"]), 4)
    labels = torch.arange(4)
    images, targets = mix(torch.eye(4)[:, :, None, None].repeat(1, 1, 2, 2), labels, Draws((0,), 4))
    torch.testing.assert_close(images[:, :, 0, 0], targets)  # each image is its own one-hot
    assert 0 < targets.max(1).values[0] < 1
    plain = make_mix(load_config(None), 4)
    assert plain("images", "labels", None) == ("images", "labels")


def test_a_network_memorises_a_batch():
    seed_everything(0, 0)
    config = load_config(None, ["lr=2e-3", "weight_decay=0"])
    model = build_backbone("test_vit", 4, 32)
    optimizer, criterion = make_optimizer(model, config), ClassificationLoss()
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8) % 4
    losses = []
    for _ in range(60):
        loss = criterion(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1
    assert losses[-1] < 0.02
