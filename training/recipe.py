"""The ingredients of the training loop that a configuration chooses: device, seeds, optimiser, schedule, mixing."""

import math
import random
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.transforms import v2

from training.config import ConfigError, TrainConfig


def seed_everything(seed: int, epoch: int) -> torch.Generator:
    """Seed every global generator for one epoch, and return one for the augmentation."""
    number = int(np.random.SeedSequence((seed, epoch)).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    return torch.Generator().manual_seed(number)


def choose_device(config: TrainConfig) -> tuple[torch.device, torch.dtype]:
    """The device, and the type that autocast computes in (float32: no autocast).

    Raises ConfigError for a device that this machine does not have.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in there if there[name]) if config.device == "auto" else config.device
    if not there[name]:
        raise ConfigError(f"device={name} is not available on this machine; use device=auto.")
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if config.precision != "auto":
        return torch.device(name), named[config.precision]
    if name == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # emulated, it is slower than fp32
        return torch.device(name), torch.bfloat16 if bf16 else torch.float16
    return torch.device(name), torch.float32


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or Adam; norms, biases, position and class tokens are not decayed.

    Each group has `lr_scale`, the factor of its learning rate: 1, or with `layer_decay` the layer's power of it (Clark
    et al. 2020, "ELECTRA"; layers as timm groups them).
    """
    kept: Collection[str] = getattr(model, "no_weight_decay", tuple)()
    if config.layer_decay < 1:
        groups = param_groups_layer_decay(
            model, config.weight_decay, no_weight_decay_list=kept, layer_decay=config.layer_decay
        )
    else:
        groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=kept)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
    return kind([{"lr_scale": 1.0, **group} for group in groups], lr=config.lr, fused=True)


def attention_kernel(device: torch.device) -> AbstractContextManager[None]:
    """How attention is computed within: on the CPU by plain products, since the backward pass of torch's fused kernel
    takes a quarter of the whole step there (64 tokens, bf16); elsewhere as torch chooses."""
    kernel: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    return kernel


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Learning rate of optimiser step `step` (from 0) where an epoch has `steps`: linear warm-up, then the schedule.

    `restarts` is the cosine begun again after `restart_epochs`, and each time with twice the period (SGDR with T_mult
    = 2; Loshchilov & Hutter 2017).
    """
    warmup = config.warmup_epochs * steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.scheduler == "constant":
        return config.lr
    since, period = step - warmup, max(1.0, config.epochs * steps - warmup)
    if config.scheduler == "restarts":
        period = config.restart_epochs * steps
        while since >= period:
            since, period = since - period, 2 * period
    done = min(1.0, since / period)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


def set_trainable(model: nn.Module, heads: Collection[str] = ()) -> None:
    """Put the model into training mode: all of it, or the heads of these names alone, with the rest as it is when it
    predicts."""
    model.train(not heads)
    model.requires_grad_(not heads)
    for name in heads:
        model.get_submodule(name).train().requires_grad_(True)


def heads_of(model: nn.Module) -> list[str]:
    """The names of the classifier and, where there is one, of the head for metadata."""
    backbone: Any = model
    names = (backbone.default_cfg["classifier"], "metadata_head")
    return [name for name in names if hasattr(backbone, name)]


def make_mix(config: TrainConfig, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Mixup (Zhang et al. 2018) or CutMix (Yun et al. 2019) by the batch; targets become distributions (N, classes)."""
    ways: list[nn.Module] = []
    if config.mixup_alpha:
        ways.append(v2.MixUp(alpha=config.mixup_alpha, num_classes=classes))
    if config.cutmix_alpha:
        ways.append(v2.CutMix(alpha=config.cutmix_alpha, num_classes=classes))
    if not ways:
        return lambda images, labels: (images, labels)
    mix: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = v2.RandomApply(
        [v2.RandomChoice(ways)], config.mix_probability
    )
    return mix
