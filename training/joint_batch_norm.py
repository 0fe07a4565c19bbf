"""Batch norm over the images of all processes: torch's own on GPUs, and the same in plain operations on CPUs."""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from timm.layers import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm


def join_batch_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """Make every batch norm of the model use the mean and variance of all processes' images while it trains.

    Parameters, buffers and their names stay, so checkpoints fit the model with and without it.
    """
    if device.type == "cuda":
        converted: nn.Module = convert_sync_batchnorm(model)
        return converted
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.forward = partial(_forward, module)  # type: ignore[method-assign]
    return model


def _forward(norm: Any, x: Tensor) -> Tensor:
    if norm.training:
        norm.num_batches_tracked.add_(1)
        x = _JointBatchNorm.apply(x, norm.weight, norm.bias, norm)
    else:
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
    for name in ("drop", "act"):  # timm's batch norms contain the layers that follow
        x = getattr(norm, name, nn.Identity())(x)
    return x


class _JointBatchNorm(torch.autograd.Function):
    """Ioffe & Szegedy 2015, with sums over the images of all processes, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: Any) -> Tensor:
        # torch.var_mean is slow on CPUs where the channels are the last dimension in memory.
        mean, variance = torch.batch_norm_update_stats(x.float(), None, None, 0.0)
        own = torch.cat([mean, variance, mean.new_tensor([x.numel() / x.shape[1]])])
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        means, variances, counts = torch.stack(parts).split([len(mean), len(mean), 1], 1)
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        variance = ((variances + (means - mean).square()) * counts).sum(0) / count
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = norm.eps
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, norm.eps)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, mean, variance, count = ctx.saved_tensors
        values, shape = x.float(), (-1, *(1,) * (x.ndim - 2))
        # As if mean and variance were constants; what they contribute is added below.
        dx, sum_dy_x, sum_dy = torch.ops.aten.native_batch_norm_backward(
            gradient.float(), values, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        totals = torch.cat([sum_dy, sum_dy_x])
        dist.all_reduce(totals)
        scale = (variance + ctx.eps).rsqrt()
        mean_dy, mean_dy_x = (totals / count).chunk(2)
        slope = -weight * scale * scale * mean_dy_x
        dx.addcmul_(values, slope.view(shape)).sub_((weight * scale * mean_dy + slope * mean).view(shape))
        return dx.to(x.dtype), sum_dy_x, sum_dy, None
