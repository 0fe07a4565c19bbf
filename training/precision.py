"""The type that autocast computes in: as set, the GPU's best, or on CPUs the faster one by a few timed steps."""

import copy
import time
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from mlflow_tracking.command_line import console
from training.config import TrainConfig
from training.recipe import forward, set_trainable

TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ROUNDS = 4  # steps of each type; the first warms up
LARGEST_BATCH = 8  # of a timed step
# torch.cpu.get_capabilities: instructions that multiply in bf16, of x86 and of ARM processors. Others emulate it.
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def choose_precision(
    config: TrainConfig, model: nn.Module, device: torch.device, measured: Mapping[str, str]
) -> tuple[torch.dtype, dict[str, str]]:
    """Return the type to train in (float32: no autocast), and what was measured, for the checkpoint.

    Args:
        model: on `device`; it is not changed.
        measured: the measurements of the resumed run, the faster type by kind of device.
    """
    kept = dict(measured)
    if config.precision != "auto":
        return TYPES[config.precision], kept
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)  # emulated bf16 is slower than fp32
        return TYPES["bf16" if bf16 else "fp16"], kept
    if device.type != "cpu" or not any(torch.cpu.get_capabilities().get(name) for name in BF16_INSTRUCTIONS):
        return torch.float32, kept
    if device.type not in kept:
        seconds = step_seconds(config, model, device)
        kept[device.type] = min(seconds, key=seconds.__getitem__)
        console.print(
            f"A training step takes {seconds['fp32'] * 1000:.0f} ms in fp32 and {seconds['bf16'] * 1000:.0f} ms in "
            f"bf16 on this processor; training uses {kept[device.type]}."
        )
    return TYPES[kept[device.type]], kept


def step_seconds(config: TrainConfig, model: nn.Module, device: torch.device) -> dict[str, float]:
    """Return the shortest time of a training step of random images in fp32 and in bf16, in alternation."""
    network = copy.deepcopy(model)
    set_trainable(network, frozen_stages=config.frozen_stages)
    size = config.image_size
    images = torch.rand(min(config.batch_size, LARGEST_BATCH), 3, size, size, device=device)
    times: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for _ in range(ROUNDS):
        for name, values in times.items():
            began = time.perf_counter()
            logits = forward(network, images, TYPES[name])
            network.zero_grad()
            F.cross_entropy(logits.float(), logits.argmax(1)).backward()
            values.append(time.perf_counter() - began)
    return {name: min(values[1:]) for name, values in times.items()}
