"""BatchNorm with statistics over all processes, also where torch's own refuses: on a CPU."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

import annnet_kernels as ak


def synchronise(network: nn.Module, device: torch.device) -> None:
    """Turn every BatchNorm2d into one that shares its statistics, in place; parameters and buffers stay the same."""
    if device.type != "cpu":
        nn.SyncBatchNorm.convert_sync_batchnorm(network)
        return
    for block in network.modules():
        if isinstance(block, (ak.AFNB, ak.APNB)):  # they reduce their statistics themselves, on any device
            nn.SyncBatchNorm.convert_sync_batchnorm(block)
    for norm in network.modules():
        if type(norm) is nn.BatchNorm2d:
            norm.__class__ = GlooBatchNorm2d


class _Sum(torch.autograd.Function):
    """Over all processes; so is its gradient."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


class GlooBatchNorm2d(nn.BatchNorm2d):
    """SyncBatchNorm for CPU tensors. For checks, not for speed."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        channels = x.shape[1]
        samples = x.new_tensor(x.numel() / channels)
        dist.all_reduce(samples)
        mean = _Sum.apply(x.sum((0, 2, 3))) / samples
        centred = x - mean.view(-1, 1, 1)
        var = _Sum.apply(centred.square().sum((0, 2, 3))) / samples
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * samples / (samples - 1), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return centred * scale.view(-1, 1, 1) + self.bias.view(-1, 1, 1)
