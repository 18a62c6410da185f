"""Batch norm without its map: what a norm module does is kept as vectors, and readers normalise as they load.

Statistics are reduced here, over all processes of a SyncBatchNorm on any device, and running statistics are updated
as often as the published block calls the module. The three readers are the pooling that makes keys, the attention
that makes queries, and the tail of a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .backends import requested_backend
from .ops import NormalizedAttention, NormalizedPool, NormalizedTail

FUSABLE_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class Normalization(NamedTuple):
    """What a batch norm does to the map at hand: z = (y − mean) · invstd · weight + bias, all (C), float32 at least.

    ``samples`` is the number of values behind batch statistics, None for running ones; ``group`` the processes that
    share them. ``shift`` is the bias of the convolution ahead, which batch statistics cancel: its gradient is zero.
    """

    mean: Tensor
    invstd: Tensor
    weight: Tensor
    bias: Tensor
    shift: Tensor | None
    samples: int | Tensor | None
    group: Any

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        return self.mean, self.invstd, self.weight, self.bias, self.shift


class Product(NamedTuple):
    """X Wᵀ + c: x (B, C, H, W), weight (C_out, C, 1, 1), constant (C_out); what is None is left out."""

    x: Tensor | None
    weight: Tensor | None
    constant: Tensor | None


def uses_batch_statistics(norm: nn.Module) -> bool:
    """Whether a call of this batch norm normalises by the statistics of its batch."""
    return norm.training or norm.running_mean is None


def normalization(norm: Any, y: Tensor, *, shift: Tensor | None = None, calls: int = 1) -> Normalization:
    """The normalisation that ``norm`` applies to ``y``, leaving the running statistics of ``calls`` calls behind.

    Args:
        norm: a BatchNorm2d or SyncBatchNorm.
        y: raw map (B, C, H, W); without the bias ``shift`` of its convolution where batch statistics are used.
        shift: that bias, which enters the running mean only.
        calls: how often the published block calls ``norm`` on this map.
    """
    dtype = torch.promote_types(y.dtype, torch.float32)
    weight = y.new_ones(y.shape[1], dtype=dtype) if norm.weight is None else norm.weight.to(dtype)
    bias = y.new_zeros(y.shape[1], dtype=dtype) if norm.bias is None else norm.bias.to(dtype)
    if not uses_batch_statistics(norm):
        mean, var = norm.running_mean.to(dtype), norm.running_var.to(dtype)
        return Normalization(mean, torch.rsqrt(var + norm.eps), weight, bias, None, None, None)
    local = y.shape[0] * y.shape[2] * y.shape[3]
    group = _shared_by(norm)
    if local == 1 and group is None:
        raise ValueError(
            f"expected more than one value per channel for batch statistics in training, got shape {tuple(y.shape)}"
        )
    with torch.no_grad():
        statistics = torch.ops.annnet.batch_norm_statistics(y) if local else weight.new_zeros(2, y.shape[1])
        mean, var = statistics.unbind()
        samples: int | Tensor = local
        if group is not None:
            mean, var, samples = _merge_statistics(mean, var, local, group)
        elif local == 0 and norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(calls)  # all that PyTorch does for a batch of nothing
        if norm.training and norm.running_mean is not None and (local or group is not None):
            batch_mean = mean if shift is None else mean + shift.to(dtype)
            for _ in range(calls):
                _update_running_statistics(norm, batch_mean, var * (samples / (samples - 1)))
    return Normalization(mean, torch.rsqrt(var + norm.eps), weight, bias, shift, samples, group)


def _update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, unbiased_var: Tensor) -> None:
    """What one training call of ``norm`` does to its buffers."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    factor = 1.0 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    norm.running_mean.copy_(torch.lerp(norm.running_mean.to(mean.dtype), mean, factor))
    norm.running_var.copy_(torch.lerp(norm.running_var.to(mean.dtype), unbiased_var, factor))


def _shared_by(norm: nn.Module) -> Any:
    """The process group whose processes share the statistics of ``norm``; None for one process."""
    if type(norm) is not nn.SyncBatchNorm or not norm.training or not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group if norm.process_group is not None else dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def _merge_statistics(mean: Tensor, var: Tensor, samples: int, group: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Statistics over the maps of all processes, which may differ in size; moments are merged in float64."""
    mean64, var64 = mean.double(), var.double()
    moments = torch.stack([torch.ones_like(mean64), mean64, var64 + mean64.square()]) * samples
    dist.all_reduce(moments, group=group)
    total = moments[0, 0]
    merged_mean = moments[1] / total
    merged_var = (moments[2] / total - merged_mean.square()).clamp_min(0)
    return merged_mean.to(mean.dtype), merged_var.to(var.dtype), total.to(mean.dtype)


def pool_rectified(y: Tensor, norm: Normalization, pool_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """pyramid_pool(relu(z)), (B, C, H, W) → (B, C, T)."""
    heights, widths = zip(*pool_sizes, strict=True)
    tokens: Tensor = NormalizedPool.apply(
        y, *norm.vectors, norm.samples, norm.group, list(heights), list(widths), requested_backend()
    )
    return tokens


def attend_rectified(
    y: Tensor,
    norm: Normalization,
    key: Tensor | None,
    value: Tensor,
    product: Product,
    pool_sizes: Sequence[tuple[int, int]],
) -> Tensor:
    """Attention of queries relu(z) over tokens, plus ``product``; ``key=None`` pools the keys from the same map.

    All operands are brought to the dtype of ``y``, as the convolution that made it brought its own.
    """
    heights, widths = zip(*pool_sizes, strict=True)
    out: Tensor
    out, _, _ = NormalizedAttention.apply(
        y,
        *norm.vectors,
        key,
        value.to(y.dtype),
        *(None if operand is None else operand.to(y.dtype) for operand in product),
        norm.samples,
        norm.group,
        y.shape[1] ** -0.5,
        list(heights),
        list(widths),
        requested_backend(),
    )
    return out


def apply_tail(y: Tensor, norm: Normalization, relu: bool, dropout: nn.Dropout2d | None) -> Tensor:
    """Dropout2d(act(z)), keeping y and one factor per image and channel; without gradients, y becomes it."""
    channel_scale = None
    if dropout is not None and dropout.training and dropout.p > 0:
        # Drawn as Dropout2d draws it for a map of this dtype, so that seeds mean the same.
        drawn = dropout(y.new_ones(y.shape[0], y.shape[1], 1, 1))
        channel_scale = drawn.flatten(1).to(norm.mean.dtype)
    if not torch.is_grad_enabled():
        torch.ops.annnet.batch_norm_apply_(y, norm.mean, norm.invstd, norm.weight, norm.bias, channel_scale, relu)
        return y
    out: Tensor = NormalizedTail.apply(
        y, *norm.vectors, channel_scale, relu, norm.samples, norm.group, requested_backend()
    )
    return out
