"""The ingredients of the training loop that a configuration chooses: device, seeds, optimiser, schedule, mixing."""

import math
import random
from collections.abc import Callable, Collection

import numpy as np
import torch
from timm.optim import param_groups_weight_decay
from torch import Tensor, nn
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
    """The device, and the type that autocast computes in (float32: no autocast)."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(name for name in there if there[name]) if config.device == "auto" else config.device
    if not there[name]:
        raise ConfigError(f"device={name} is not available on this machine; use device=auto.")
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if config.precision != "auto":
        return torch.device(name), named[config.precision]
    if name == "cuda":
        return torch.device(name), torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return torch.device(name), torch.float32


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW or Adam; norms, biases, position and class tokens are not decayed."""
    kept: Collection[str] = getattr(model, "no_weight_decay", tuple)()
    groups = param_groups_weight_decay(model, config.weight_decay, no_weight_decay_list=kept)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
    return kind(groups, lr=config.lr)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """Learning rate of optimiser step `step` (from 0) where an epoch has `steps`: linear warm-up, then the schedule."""
    warmup = config.warmup_epochs * steps
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.scheduler == "constant":
        return config.lr
    done = min(1.0, (step - warmup) / max(1.0, config.epochs * steps - warmup))
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1 + math.cos(math.pi * done))


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
