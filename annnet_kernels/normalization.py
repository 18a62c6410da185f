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
from .ops.functions import apply
from .tracers import exporting

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


class Statistics(NamedTuple):
    """Mean and biased variance (C) of a map, float32 at least, and the number of values behind each."""

    mean: Tensor
    var: Tensor
    samples: int | Tensor


def normalization(norm: Any, y: Tensor, *, shift: Tensor | None = None, calls: int = 1) -> Normalization:
    """The normalisation that ``norm`` applies to ``y``, leaving the running statistics of ``calls`` calls behind.

    Args:
        norm: a BatchNorm2d or SyncBatchNorm.
        y: raw map (B, C, H, W); without the bias ``shift`` of its convolution where batch statistics are used.
        shift: that bias, which enters the running mean only.
        calls: how often the published block calls ``norm`` on this map.
    """
    if not uses_batch_statistics(norm):
        return by_running_statistics(norm, y)
    group = shared_by(norm)
    statistics = local_statistics(y)
    refuse_one_value(y, group)
    if group is not None:
        moments = moments_of(statistics)
        dist.all_reduce(moments, group=group)
        statistics = statistics_of(moments, statistics.mean.dtype)
    return by_batch_statistics(norm, y, statistics, shift, calls, group)


def refuse_one_value(y: Tensor, group: Any) -> None:
    """One value has no variance. Where several processes share statistics, PyTorch leaves that to the caller."""
    if y.shape[0] * y.shape[2] * y.shape[3] == 1 and (group is None or dist.get_world_size(group) == 1):
        raise ValueError(
            f"expected more than one value per channel for batch statistics in training, got shape {tuple(y.shape)}"
        )


def by_running_statistics(norm: Any, y: Tensor) -> Normalization:
    """What ``norm`` does to ``y`` with frozen statistics."""
    weight, bias = _affine(norm, y)
    mean, var = norm.running_mean.to(weight.dtype), norm.running_var.to(weight.dtype)
    return Normalization(mean, torch.rsqrt(var + norm.eps), weight, bias, None, None, None)


def by_batch_statistics(
    norm: Any, y: Tensor, statistics: Statistics, shift: Tensor | None, calls: int, group: Any
) -> Normalization:
    """What ``norm`` does to ``y`` with these statistics, shared by the processes of ``group``; updates its buffers."""
    weight, bias = _affine(norm, y)
    mean, var, samples = statistics
    with torch.no_grad():
        if isinstance(samples, int) and samples == 0:
            if norm.training and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.add_(calls)  # all that PyTorch does for a batch of nothing
        elif norm.training and norm.running_mean is not None:
            batch_mean = mean if shift is None else mean + shift.to(mean.dtype)
            for _ in range(calls):
                _update_running_statistics(norm, batch_mean, var * (samples / (samples - 1)))
    return Normalization(mean, torch.rsqrt(var + norm.eps), weight, bias, shift, samples, group)


def _affine(norm: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm of the channels of ``y``, float32 at least."""
    dtype = torch.promote_types(y.dtype, torch.float32)
    weight = y.new_ones(y.shape[1], dtype=dtype) if norm.weight is None else norm.weight.to(dtype)
    bias = y.new_zeros(y.shape[1], dtype=dtype) if norm.bias is None else norm.bias.to(dtype)
    return weight, bias


def _update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, unbiased_var: Tensor) -> None:
    """What one training call of ``norm`` does to its buffers."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    factor = 1.0 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
    norm.running_mean.copy_(torch.lerp(norm.running_mean.to(mean.dtype), mean, factor))
    norm.running_var.copy_(torch.lerp(norm.running_var.to(mean.dtype), unbiased_var, factor))


def shared_by(norm: nn.Module) -> Any:
    """The process group whose processes share the statistics of ``norm``; None for one process."""
    if type(norm) is not nn.SyncBatchNorm or not norm.training or not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group if norm.process_group is not None else dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def local_statistics(y: Tensor) -> Statistics:
    """Statistics of the map (B, C, H, W) of this process; zeros where it holds nothing."""
    with torch.no_grad():
        samples = y.shape[0] * y.shape[2] * y.shape[3]
        if samples == 0:
            mean, var = y.new_zeros(2, y.shape[1], dtype=torch.promote_types(y.dtype, torch.float32)).unbind()
        else:
            mean, var = torch.ops.annnet.batch_norm_statistics(y).unbind()
        return Statistics(mean, var, samples)


def moments_of(statistics: Statistics) -> Tensor:
    """(2C + 1) in float64: count, sums, sums of squares. They add up over maps, which may differ in size."""
    mean, var = statistics.mean.double(), statistics.var.double()
    return torch.cat([torch.ones_like(mean[:1]), mean, var + mean.square()]) * statistics.samples


def statistics_of(moments: Tensor, dtype: torch.dtype) -> Statistics:
    """The inverse of :func:`moments_of`."""
    samples = moments[0]
    mean, square = (moments[1:] / samples).chunk(2)
    return Statistics(mean.to(dtype), (square - mean.square()).clamp_min(0).to(dtype), samples.to(dtype))


def pool_rectified(y: Tensor, norm: Normalization, pool_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """pyramid_pool(relu(z)), (B, C, H, W) → (B, C, T)."""
    heights, widths = zip(*pool_sizes, strict=True)
    tokens: Tensor = apply(
        NormalizedPool, y, *norm.vectors(), norm.samples, norm.group, list(heights), list(widths), requested_backend()
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

    The product is made first, and the attention adds to it in place. With the library's product (CPU, two threads,
    float32, forward and training step of 512 channels at 97 × 97 and 2048 at 49 × 49) that took the same time, within
    5 %, as writing the attention as a map of T channels and one product with it and X joined, or two products and a
    sum; but it makes no map beside the output. Not yet measured on a GPU.

    All operands are brought to the dtype of ``y``, as the convolution that made it brought its own.
    """
    heights, widths = zip(*pool_sizes, strict=True)
    out: Tensor
    out, _, _ = apply(
        NormalizedAttention,
        y,
        *norm.vectors(),
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
    return apply_scaled_tail(y, norm, relu, channel_scale(dropout, y, y.shape[1]))


def channel_scale(dropout: nn.Dropout2d | None, like: Tensor, channels: int) -> Tensor | None:
    """What Dropout2d multiplies a map with the batch and dtype of ``like`` by, (B, channels); None where nothing.

    Drawn as Dropout2d draws it for such a map, so that seeds mean the same.
    """
    if dropout is None or not dropout.training or dropout.p == 0:
        return None
    drawn: Tensor = dropout(like.new_ones(like.shape[0], channels, 1, 1))
    return drawn.flatten(1)


def apply_scaled_tail(y: Tensor, norm: Normalization, relu: bool, scale: Tensor | None) -> Tensor:
    """scale · act(z), (B, C) the scale of every image and channel; without gradients, y becomes it."""
    scale = None if scale is None else scale.to(norm.mean.dtype)
    if not (torch.is_grad_enabled() or exporting()):  # an exported program writes nothing in place
        torch.ops.annnet.batch_norm_apply_(y, norm.mean, norm.invstd, norm.weight, norm.bias, scale, relu)
        return y
    out: Tensor = apply(NormalizedTail, y, *norm.vectors(), scale, relu, norm.samples, norm.group, requested_backend())
    return out
