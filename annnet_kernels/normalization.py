"""Norms as tables: what a batch norm does to a map travels with the map, and readers apply it as they load.

A :class:`FeatureMap` is a raw map with its :class:`Norm`. Statistics are reduced here, over all processes of a
SyncBatchNorm on any device, and running statistics are updated as often as the published block calls the module. The
three readers are the pooling that makes keys, the attention that makes queries, and the tail of a block. What is here
stays inside the package: the gradient of a table is part of what its readers return.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .backends import requested_backend
from .functional import asymmetric_attention, pyramid_pool
from .ops import NormalizedAttention, NormalizedPool, NormalizedTail
from .ops.functions import apply
from .ops.normalized import Levels, Share
from .tracers import exporting

FUSABLE_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class Norm(NamedTuple):
    """What a batch norm does to the map at hand: z = (y − mean) · invstd · weight + bias.

    ``table`` (4, C) holds these four, float32 at least, and has no gradient; ``weight`` and ``bias`` are the module's
    parameters. ``conv_bias`` is the bias of the convolution ahead, which batch statistics cancel: its gradient is zero.
    """

    table: Tensor
    weight: Tensor | None
    bias: Tensor | None
    conv_bias: Tensor | None
    share: Share

    def operands(self) -> tuple[Tensor | None, ...]:
        """What a reader's Function takes behind the map."""
        return self.table, self.weight, self.bias, self.conv_bias


class FeatureMap(NamedTuple):
    """A map (B, C, H, W), and what its readers apply to it: the batch norm and then a ReLU, or nothing."""

    data: Tensor
    norm: Norm | None


class Skip(NamedTuple):
    """X Wᵀ + c: x (B, C, H, W), weight (C_out, C, 1, 1), constant (C_out); what is None is left out."""

    x: Tensor | None
    weight: Tensor | None
    constant: Tensor | None


def uses_batch_statistics(norm: Any) -> bool:
    """Whether a call of this batch norm normalises by the statistics of its batch."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def norm_of(norm: Any, y: Tensor, *, conv_bias: Tensor | None = None, calls: int = 1) -> Norm:
    """What ``norm`` does to ``y``, leaving the running statistics of ``calls`` calls behind.

    Args:
        norm: a BatchNorm2d or SyncBatchNorm.
        y: raw map (B, C, H, W); without the bias ``conv_bias`` of its convolution where batch statistics are used.
        conv_bias: that bias, which enters the running mean only.
        calls: how often the published block calls ``norm`` on this map.
    """
    if not uses_batch_statistics(norm):
        return frozen_norm(norm, y)
    group = shared_by(norm)
    refuse_one_value(y, group)
    if group is None:
        return batch_norm(norm, y, None, conv_bias, calls, None)
    sums = sums_of(y)
    dist.all_reduce(sums, group=group)
    return batch_norm(norm, y, sums, conv_bias, calls, group)


def refuse_one_value(y: Tensor, group: Any) -> None:
    """One value has no variance. Where several processes share statistics, PyTorch leaves that to the caller."""
    if y.shape[0] * y.shape[2] * y.shape[3] == 1 and (group is None or dist.get_world_size(group) == 1):
        raise ValueError(
            f"expected more than one value per channel for batch statistics in training, got shape {tuple(y.shape)}"
        )


def frozen_norm(norm: Any, y: Tensor) -> Norm:
    """What ``norm`` does to ``y`` by its running statistics."""
    mean, var = _running_statistics(norm)
    with torch.no_grad():
        table = torch.ops.annnet.batch_norm_table(y, mean, var, norm.weight, norm.bias, norm.eps)
    return Norm(table, norm.weight, norm.bias, None, Share(None, None))


def batch_norm(norm: Any, y: Tensor, sums: Tensor | None, conv_bias: Tensor | None, calls: int, group: Any) -> Norm:
    """What ``norm`` does to ``y`` by batch statistics: those of y, or of ``sums`` that the group has added up."""
    samples: int | Tensor = y.shape[0] * y.shape[2] * y.shape[3]
    moments = None
    weight, bias = norm.weight, norm.bias
    with torch.no_grad():
        if sums is not None:
            moments, samples = moments_of(sums), sums[0].to(torch.promote_types(y.dtype, torch.float32))
        tracked = norm.training and norm.track_running_stats
        mean, var = _running_statistics(norm) if tracked else (None, None)
        count = norm.num_batches_tracked if tracked else None
        table = torch.ops.annnet.batch_norm_update(
            y, moments, weight, bias, conv_bias, mean, var, count, norm.eps, norm.momentum, calls
        )
    return Norm(table, weight, bias, conv_bias, Share(samples, group))


def _running_statistics(norm: Any) -> tuple[Any, Any]:
    """Both, or None and None; PyTorch refuses a norm with one of them."""
    mean, var = norm.running_mean, norm.running_var
    if (mean is None) != (var is None):
        given = "running_var" if mean is None else "running_mean"
        raise ValueError(f"{type(norm).__name__}: expected running_mean and running_var, or neither, got {given} alone")
    return mean, var


def shared_by(norm: nn.Module) -> Any:
    """The process group whose processes share the statistics of ``norm``; None for one process."""
    if type(norm) is not nn.SyncBatchNorm or not norm.training or not (dist.is_available() and dist.is_initialized()):
        return None
    group = norm.process_group if norm.process_group is not None else dist.group.WORLD
    return group if dist.get_world_size(group) > 1 else None


def sums_of(y: Tensor) -> Tensor:
    """(2C + 1) in float64: how many values a channel has, their sums and sums of squares. They add up over maps."""
    with torch.no_grad():
        count, mean, deviation = torch.ops.annnet.batch_norm_moments(y).unbind()
        sums = count * mean
        return torch.cat([count[:1], sums, deviation + sums * mean])


def moments_of(sums: Tensor) -> Tensor:
    """(3, C) as ``batch_norm_moments`` makes them: the inverse of :func:`sums_of`."""
    count = sums[0]
    sum_, squares = sums[1:].chunk(2)
    mean = sum_ / count
    return torch.stack([count.expand_as(mean), mean, (squares - sum_ * mean).clamp_min(0)])


def pool_map(map: FeatureMap, pool_sizes: Sequence[tuple[int, int]]) -> Tensor:
    """The tokens (B, C, T) of the finished map."""
    if map.norm is None:
        return pyramid_pool(map.data, pool_sizes)
    levels = levels_of(pool_sizes)
    tokens: Tensor = apply(NormalizedPool, map.data, *map.norm.operands(), map.norm.share, levels, requested_backend())
    return tokens


def levels_of(pool_sizes: Sequence[tuple[int, int]]) -> Levels:
    """The pyramid of these pool sizes."""
    heights, widths = zip(*pool_sizes, strict=True)
    return Levels(list(heights), list(widths))


def attend(
    query: FeatureMap, key: Tensor | None, value: Tensor, skip: Skip, pool_sizes: Sequence[tuple[int, int]]
) -> Tensor:
    """Attention of queries over tokens, plus ``skip``; ``key=None`` pools the keys from the map of the queries.

    The product is made first, and the attention adds to it in place. With the library's product (CPU, two threads,
    float32, forward and training step of 512 channels at 97 × 97 and 2048 at 49 × 49) that took the same time, within
    5 %, as writing the attention as a map of T channels and one product with it and X joined, or two products and a
    sum; but it makes no map beside the output. Not yet measured on a GPU.

    All operands are brought to the dtype of the query's map, as the convolution that made it brought its own; the
    constant stays wide.
    """
    y, norm = query
    if norm is None:
        key = pyramid_pool(y, pool_sizes) if key is None else key
        return asymmetric_attention(y, key, value.to(y.dtype)) + _skipped(skip, y)
    x, weight, constant = skip
    out: Tensor
    out, _, _ = apply(
        NormalizedAttention,
        y,
        *norm.operands(),
        key,
        value.to(y.dtype),
        *(None if operand is None else operand.to(y.dtype) for operand in (x, weight)),
        None if constant is None else constant.to(norm.table.dtype),
        norm.share,
        levels_of(pool_sizes),
        requested_backend(),
    )
    return out


def _skipped(skip: Skip, y: Tensor) -> Tensor:
    """X Wᵀ + c in the dtype of ``y``; c alone, (C, 1, 1), without a bottleneck."""
    x, weight, constant = (None if operand is None else operand.to(y.dtype) for operand in skip)
    assert constant is not None
    return constant[:, None, None] if x is None or weight is None else F.conv2d(x, weight, constant)


def apply_tail(map: FeatureMap, relu: bool, scale: Tensor | None) -> Tensor:
    """scale · act(z), (B, C) the scale of every image and channel; without gradients, the map becomes it."""
    y, norm = map
    assert norm is not None
    scale = None if scale is None else scale.to(norm.table.dtype)
    if not (torch.is_grad_enabled() or exporting()):  # an exported program writes nothing in place
        torch.ops.annnet.batch_norm_apply_(y, norm.table, scale, relu)
        return y
    out: Tensor = apply(NormalizedTail, y, *norm.operands(), scale, relu, norm.share, requested_backend())
    return out


def channel_scale(dropout: nn.Dropout2d | None, like: Tensor, channels: int) -> Tensor | None:
    """What Dropout2d multiplies a map with the batch and dtype of ``like`` by, (B, channels); None where nothing.

    Drawn as Dropout2d draws it for such a map, so that seeds mean the same.
    """
    if dropout is None or not dropout.training or dropout.p == 0:
        return None
    drawn: Tensor = dropout(like.new_ones(like.shape[0], channels, 1, 1))
    return drawn.flatten(1)
