"""The parts of the training loop that settings choose: device, seeds, network, optimiser, schedule, loss, mixing."""

import math
import random
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from timm.models import group_parameters
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.transforms import v2

from handlers.backbone import build_backbone
from training.config import AugmentationSettings, ConfigError, LossSettings, ModelSettings, OptimizationSettings
from training.data.draws import Draws, seeded
from training.losses import ClassificationLoss, class_weights
from training.pretrained import PretrainedWeights

Mix = Callable[[Tensor, Tensor, Draws], tuple[Tensor, Tensor]]


def seed_everything(seed: int, epoch: int, process: int = 0) -> None:
    """Seed every global generator of a process for one epoch."""
    number = int(np.random.SeedSequence((seed, epoch, process)).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def choose_device(device: str) -> torch.device:
    """Return the device "cuda", "mps" or "cpu"; for "auto" the first of them that this machine has.

    Raises:
        ConfigError: this machine does not have the device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in available if available[name]) if device == "auto" else device
    if not available[name]:
        raise ConfigError(f"device={name} is not available on this machine; use device=auto.")
    return torch.device(name)


def make_model(settings: ModelSettings, classes: int, pretrained: PretrainedWeights | None = None) -> nn.Module:
    """Return the network on the CPU, with these weights or random ones. Raises BackboneError."""
    return build_backbone(
        settings.architecture,
        classes,
        settings.image_size,
        pretrained.tensors if pretrained else None,
        settings.options,
        len(settings.metadata_inputs.columns),
    )


def make_optimizer(model: nn.Module, settings: OptimizationSettings) -> torch.optim.Optimizer:
    """Return AdamW or Adam without weight decay on norms, biases, position and class tokens.

    Each group has `lr_scale`, the factor of its learning rate: 1, or with `layer_decay` the layer's power of it (Clark
    et al. 2020, "ELECTRA"; layers as timm groups them).
    """
    undecayed: Collection[str] = getattr(model, "no_weight_decay", tuple)()
    if settings.layer_decay < 1:
        groups = param_groups_layer_decay(
            model, settings.weight_decay, no_weight_decay_list=undecayed, layer_decay=settings.layer_decay
        )
    else:
        groups = param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=undecayed)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[settings.optimizer]
    return kind([{"lr_scale": 1.0, **group} for group in groups], lr=settings.lr, fused=True)


def make_loss(settings: LossSettings, counts: Sequence[float]) -> ClassificationLoss:
    """Return the training loss for classes with these `counts` of training images."""
    weights = class_weights(counts, settings.class_weight_power) if settings.class_weight_power else None
    gamma = settings.focal_gamma if settings.loss == "focal" else 0.0
    return ClassificationLoss(weights, settings.label_smoothing, gamma)


def attention_kernel(device: torch.device) -> AbstractContextManager[None]:
    """Choose the attention kernel: plain products on the CPU, where the backward pass of torch's fused kernel is slow,
    and torch's own choice elsewhere."""
    kernel: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    return kernel


def forward(network: nn.Module, images: Tensor, precision: torch.dtype) -> Tensor:
    """Return the logits (N, K) of standardised images (N, 3, S, S), computed in `precision` where autocast allows."""
    autocast = torch.autocast(images.device.type, precision, enabled=precision is not torch.float32)
    with autocast, attention_kernel(images.device):
        logits: Tensor = network(images.contiguous(memory_format=torch.channels_last))
    return logits


def learning_rate(settings: OptimizationSettings, step: int, steps: int) -> float:
    """Return the learning rate of step `step` (from 0) of epochs with `steps` steps: linear warm-up, then the schedule.

    `restarts` restarts the cosine after `restart_epochs`, with each period twice as long as the one before (SGDR with
    T_mult = 2; Loshchilov & Hutter 2017).
    """
    warmup = settings.warmup_epochs * steps
    if step < warmup:
        return settings.lr * (step + 1) / warmup
    if settings.scheduler == "constant":
        return settings.lr
    since, period = step - warmup, max(1.0, settings.epochs * steps - warmup)
    if settings.scheduler == "restarts":
        period = settings.restart_epochs * steps
        while since >= period:
            since, period = since - period, 2 * period
    done = min(1.0, since / period)
    return settings.min_lr + (settings.lr - settings.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def set_trainable(model: nn.Module, heads: Collection[str] = (), frozen_stages: int = 0) -> None:
    """Put the model into training mode, or only these heads; the rest is then frozen in evaluation mode.

    `frozen_stages` are always frozen: the stem counts as the first stage (timm's coarse grouping of layers).
    """
    model.train(not heads)
    model.requires_grad_(not heads)
    if frozen_stages:
        backbone: Any = model
        stages = group_parameters(model, backbone.group_matcher(coarse=True), reverse=True)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and stages[name] >= frozen_stages)
        for module in model.modules():  # frozen norms must not follow the batches
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
    for name in heads:
        model.get_submodule(name).train().requires_grad_(True)


def heads_of(model: nn.Module) -> list[str]:
    """Return the names of the classifier and of the metadata head, if the model has one."""
    backbone: Any = model
    modules = dict(backbone.named_modules())
    return [name for name in (backbone.default_cfg["classifier"], "metadata_head") if name in modules]


def make_mix(settings: AugmentationSettings, classes: int) -> Mix:
    """Return mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019); mixed targets are (N, classes).

    All parts of a batch are mixed alike, each image with a neighbour of its part.
    """
    transforms: list[nn.Module] = []
    if settings.mixup_alpha:
        transforms.append(v2.MixUp(alpha=settings.mixup_alpha, num_classes=classes))
    if settings.cutmix_alpha:
        transforms.append(v2.CutMix(alpha=settings.cutmix_alpha, num_classes=classes))
    if not transforms:
        return lambda images, labels, draws: (images, labels)
    transform = v2.RandomApply([v2.RandomChoice(transforms)], settings.mix_probability)

    def mix(images: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        with seeded(draws.joint_seed()):
            mixed: tuple[Tensor, Tensor] = transform(images, labels)
        return mixed

    return mix
