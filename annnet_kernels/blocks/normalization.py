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
from torch import Tensor, nn

from ..functional import asymmetric_attention, pyramid_pool
from ..ops import NormalizedAttention, NormalizedPool, NormalizedTail
from ..ops.functions import apply
from ..ops.normalized import Levels, Share
from ..ops.registration import steps
from ..runtime.backends import requested_backend
from ..runtime.tracers import exporting

FUSABLE_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class Norm(NamedTuple):
    """What a batch norm does to the map at hand: z = (y − mean) · invstd · weight + bias.

    ``table`` (4, C) holds these four, float32 at least, and has no gradient; ``weight`` and ``bias`` are the module's
    parameters. ``cancelled`` are biases ahead of the norm, which batch statistics cancel: their gradient is zero.
    """

    table: Tensor
    weight: Tensor | None
    bias: Tensor | None
    share: Share
    cancelled: tuple[Tensor, ...] = ()

    def biases(self, count: int) -> tuple[Tensor | None, ...]:
        """The cancelled biases as a reader takes them, that many."""
        return (*self.cancelled, *(None,) * (count - len(self.cancelled)))


class FeatureMap(NamedTuple):
    """A map (B, C, H, W), and what its readers apply to it: the batch norm and then a ReLU, or nothing."""

    data: Tensor
    norm: Norm | None


class Shift(NamedTuple):
    """A constant (C) that is left out of a map, since the norm behind it takes it into account.

    Batch statistics cancel it: it moves the running mean and nothing else, and the gradient of the parameters it is
    made of, ``biases``, is zero.
    """

    value: Tensor | None = None
    biases: tuple[Tensor, ...] = ()


NO_SHIFT = Shift()


def uses_batch_statistics(norm: Any) -> bool:
    """Whether a call of this batch norm normalises by the statistics of its batch."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def norm_of(norm: Any, y: Tensor, shift: Shift = NO_SHIFT, calls: int = 1) -> Norm:
    """What ``norm`` does to ``y``, leaving the running statistics of ``calls`` calls behind.

    Args:
        norm: a BatchNorm2d or SyncBatchNorm.
        y: raw map (B, C, H, W).
        shift: what was left out of y because batch statistics cancel it.
        calls: how often the published block calls ``norm`` on this map.
    """
    if not uses_batch_statistics(norm):
        return frozen_norm(norm, y, shift)
    group = shared_by(norm)
    refuse_one_value(y, group)
    if group is None:
        return batch_norm(norm, y, None, shift, calls, None)
    sums = sums_of(y)
    dist.all_reduce(sums, group=group)
    return batch_norm(norm, y, sums, shift, calls, group)


def refuse_one_value(y: Tensor, group: Any) -> None:
    """One value has no variance. Where several processes share statistics, PyTorch leaves that to the caller."""
    if y.shape[0] * y.shape[2] * y.shape[3] == 1 and (group is None or dist.get_world_size(group) == 1):
        raise ValueError(
            f"expected more than one value per channel for batch statistics in training, got shape {tuple(y.shape)}"
        )


def frozen_norm(norm: Any, y: Tensor, shift: Shift) -> Norm:
    """What ``norm`` does to ``y``, plus the shift that was left out of it, by its running statistics."""
    mean, var = _running_statistics(norm)
    with torch.no_grad():
        table = steps.batch_norm_table(y, mean, var, norm.weight, norm.bias, shift.value, norm.eps)
    return Norm(table, norm.weight, norm.bias, Share(None, None))


def batch_norm(norm: Any, y: Tensor, sums: Tensor | None, shift: Shift, calls: int, group: Any) -> Norm:
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
        table = steps.batch_norm_update(
            y, moments, weight, bias, shift.value, mean, var, count, norm.eps, norm.momentum, calls
        )
    return Norm(table, weight, bias, Share(samples, group), shift.biases)


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
        count, mean, deviation = steps.batch_norm_moments(y).unbind()
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
    y, norm = map
    if norm is None:
        return pyramid_pool(y, pool_sizes)
    constants = norm.share, levels_of(pool_sizes), requested_backend()
    tokens: Tensor = apply(NormalizedPool, y, norm.table, norm.weight, norm.bias, *constants, *norm.biases(1))
    return tokens


def levels_of(pool_sizes: Sequence[tuple[int, int]]) -> Levels:
    """The pyramid of these pool sizes."""
    heights, widths = zip(*pool_sizes, strict=True)
    return Levels(list(heights), list(widths))


def attend(
    query: FeatureMap,
    key: Tensor | None,
    value: Tensor,
    skip: Tensor | None,
    constant: Tensor | None,
    pool_sizes: Sequence[tuple[int, int]],
) -> Tensor:
    """Attention of queries over tokens, plus skip (B, C, H, W) and constant (C), the sum written into ``skip``.

    ``key=None`` pools the keys from the map of the queries. The constant is float32 at least.
    """
    y, norm = query
    if norm is None:
        key = pyramid_pool(y, pool_sizes) if key is None else key
        context = asymmetric_attention(y, key, value)
        assert isinstance(context, Tensor)
        context = context if skip is None else context + skip
        return context if constant is None else context + constant.to(y.dtype)[:, None, None]
    tokens_and_addends = key, value, skip, constant
    constants = norm.share, levels_of(pool_sizes), requested_backend()
    operands = y, norm.table, norm.weight, norm.bias, *tokens_and_addends, *constants, *norm.biases(1)
    out: Tensor = apply(NormalizedAttention, *operands)[0]
    return out


def apply_tail(map: FeatureMap, relu: bool, scale: Tensor | None) -> Tensor:
    """scale · act(z), (B, C) the scale of every image and channel; without gradients, the map becomes it."""
    y, norm = map
    assert norm is not None
    scale = None if scale is None else scale.to(norm.table.dtype)
    if not (torch.is_grad_enabled() or exporting()):  # an exported program writes nothing in place
        steps.batch_norm_apply_(y, norm.table, scale, relu)
        return y
    constants = relu, norm.share, requested_backend()
    out: Tensor = apply(NormalizedTail, y, norm.table, norm.weight, norm.bias, scale, *constants, *norm.biases(5))
    return out


def channel_scale(dropout: nn.Dropout2d | None, like: Tensor, channels: int) -> Tensor | None:
    """What Dropout2d multiplies a map with the batch of ``like`` by, (B, channels); None where nothing.

    Drawn as Dropout2d draws it for such a map, so that seeds mean the same, and in float32 at least.
    """
    if dropout is None or not dropout.training or dropout.p == 0:
        return None
    accumulator = torch.promote_types(like.dtype, torch.float32)
    kept = 1 - dropout.p
    drawn = like.new_empty((like.shape[0], channels), dtype=accumulator).bernoulli_(kept)
    return drawn.div_(kept) if kept > 0 else drawn
