"""The forward of a block, on one page: whole maps, folds and row shards run this one.

What is linear in a block comes collapsed from its present weights (:class:`Collapsed`), or was folded before
(``folding.FoldedBlock``). How maps are cut is the other choice: :data:`WHOLE`, or the bands of ``row_shards.Rows``.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import onnx
from ..ops import Projections
from ..ops.functions import apply
from ..ops.normalized import Levels
from ..runtime.autocast import autocast_dtype
from ..runtime.backends import requested_backend, use_backend
from . import programs
from .collapse import Parts, Projection, Weights, biases_of, constant_of, token_values, weights_of
from .normalization import (
    FUSABLE_NORMS,
    NO_SHIFT,
    FeatureMap,
    Norm,
    Shift,
    apply_tail,
    attend,
    channel_scale,
    levels_of,
    norm_of,
    pool_map,
    uses_batch_statistics,
)


class Read(NamedTuple):
    """What a block reads of its maps before the attention."""

    tokens: Tensor
    """(B, C_l, T): the pooled low-level map."""
    keys: Tensor | None
    """(B, C_k, T); None where the attention pools them from the map of the queries, as in an APNB."""
    query: FeatureMap
    """(B, C_k, H, W)."""
    skip: Tensor | None
    """X_h W_2ᵀ, (B, C_out, H, W); None without a bottleneck."""
    scale: Tensor | None
    """(B, C_out): what dropout multiplies the output by, where that had to be drawn already."""


class Linear(Protocol):
    """The linear part of a block: what is multiplied with the pooled tokens and with the high-level map."""

    @property
    def skip_weight(self) -> Tensor | None:
        """W_2, (C_out, C_h, 1, 1)."""

    @property
    def constant(self) -> Tensor | None:
        """c, (C_out), where it is to be added."""

    @property
    def cancelled(self) -> Sequence[Tensor]:
        """Biases whose gradient of zero the tail returns."""

    def values(self, tokens: Tensor) -> Tensor:
        """U, (B, C_out, T), in the dtype of the tokens."""

    def finish(self, out: Tensor, cut: Cut, scale: Tensor | None) -> Tensor:
        """What follows the bottleneck."""


class Cut(Protocol):
    """How this process holds the maps of a block."""

    def read(self, parts: Parts, linear: Linear, low: Tensor, high: Tensor) -> Read:
        """Tokens, keys and queries of the whole maps; statistics are updated here, once."""

    def attend(self, read: Read, values: Tensor, constant: Tensor | None, parts: Parts) -> Tensor:
        """A U + X_h W_2ᵀ + c, (B, C_out, H, W), written into the skip."""

    def with_norm(self, norm: Any, y: Tensor, shift: Shift) -> FeatureMap:
        """``y`` with what ``norm`` does to the whole map."""


def block_forward(
    parts: Parts, linear: Linear, low: Tensor, high: Tensor, cut: Cut, *, recompute: bool = False
) -> Tensor:
    """The block's output (B, C_out, H, W) from low (B, C_l, H_l, W_l) and high (B, C_h, H, W).

    With ``recompute`` the map ahead of the tail is not kept for the backward pass but made again there.
    """
    read = cut.read(parts, linear, low, high)
    values = linear.values(read.tokens).to(read.query.data.dtype)  # as wide as queries that PyTorch's norm finished
    out = cut.attend(read, values, linear.constant, parts)
    if not recompute or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return linear.finish(out, cut, read.scale)
    again = partial(_attend_again, parts, linear, high, cut, read._replace(skip=None), values, out.dtype)
    with recomputed(out, again):
        return linear.finish(out, cut, read.scale)


def _attend_again(
    parts: Parts, linear: Linear, high: Tensor, cut: Cut, read: Read, values: Tensor, dtype: torch.dtype
) -> Tensor:
    """The map ahead of the tail, from everything that was read but the skip."""
    weight = linear.skip_weight
    skip = None if weight is None else F.conv2d(high.to(dtype), weight.to(dtype))
    return cut.attend(read._replace(skip=skip), values, linear.constant, parts)


def collapsed_forward(parts: Parts, low: Tensor, high: Tensor, *, recompute: bool = False) -> Tensor:
    """:func:`block_forward` on whole maps, from the block's present weights."""
    repeated = None if recompute else programs.run(_collapsed, parts, low, high)
    return _collapsed(parts, low, high, recompute) if repeated is None else repeated


def _collapsed(parts: Parts, low: Tensor, high: Tensor, recompute: bool = False) -> Tensor:
    return block_forward(parts, Collapsed.of(parts), low, high, WHOLE, recompute=recompute)


class Collapsed(NamedTuple):
    """The linear part of a block from its present weights.

    c is left out where batch statistics follow, which cancel it: there it moves the running mean alone, and neither it
    nor its share of the weights' gradients has to be carried through the maps.
    """

    tail: Sequence[nn.Module]
    weights: Weights
    skip_weight: Tensor | None
    constant: Tensor | None
    shift: Shift
    cancelled: tuple[Tensor, ...]
    """What batch statistics cancel in a block whose tail uses them. (Fields: torch 2.10 traces no property here.)"""

    @classmethod
    def of(cls, parts: Parts) -> Collapsed:
        """Reads every weight once."""
        weights, biases = weights_of(parts), biases_of(parts)
        if parts.join is None or not _cancels_constants(parts.tail):
            return cls(parts.tail, weights, weights.high, constant_of(weights, biases), NO_SHIFT, ())
        with torch.no_grad():
            constant = constant_of(weights, biases) if parts.tail[0].running_mean is not None else None
        readers = [parts.query] if parts.is_shared() else [parts.key, parts.query]
        ahead = [reader.conv.bias for reader in readers if _is_fusable(reader) and uses_batch_statistics(reader.norm)]
        cancelled = tuple(bias for bias in (*ahead, *biases) if bias is not None)
        return cls(parts.tail, weights, weights.high, None, Shift(constant, cancelled), cancelled)

    def values(self, tokens: Tensor) -> Tensor:
        """The collapse itself."""
        return token_values(self.weights, tokens)

    def finish(self, out: Tensor, cut: Cut, scale: Tensor | None) -> Tensor:
        """Norm, activation and dropout."""
        return epilogue(self.tail, out, cut, scale, self.shift)


def _cancels_constants(tail: Sequence[nn.Module]) -> bool:
    """Whether a tail begins with batch statistics that its reader applies."""
    norm = tail[0] if len(tail) > 0 else None
    return type(norm) in FUSABLE_NORMS and uses_batch_statistics(norm) and not onnx.exporting()


class Raw(NamedTuple):
    """What :class:`Projections` makes; maps of projections whose norm no reader can apply are missing."""

    tokens: Tensor
    key: Tensor | None
    query: Tensor | None
    skip: Tensor | None


Cast = Callable[[Tensor, torch.dtype], Tensor]


def project(
    parts: Parts,
    skip_weight: Tensor | None,
    low: Tensor,
    high: Tensor,
    levels: Levels | None,
    cast_weight: Cast = Tensor.to,
) -> Raw:
    """The linear maps of both maps, in the dtype of the autocast where there is one."""
    dtype = _compute_dtype(high)
    high = high.to(dtype)
    other = None if parts.is_shared() else low.to(dtype)
    if other is high:  # torch.compile traces no Function that gets one tensor twice
        other = high.view_as(high)
    key = (None, None) if parts.is_shared() else _weights_of_raw(parts.key, dtype, cast_weight)
    query = _weights_of_raw(parts.query, dtype, cast_weight)
    skip = None if skip_weight is None else cast_weight(skip_weight, dtype)
    return Raw(*apply(Projections, other, high, *key, *query, skip, levels, requested_backend()))


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Of the products: that of the autocast, but for float64, which PyTorch's own operators leave as it is."""
    cast_to = autocast_dtype(x)
    return x.dtype if cast_to is None or x.dtype == torch.float64 else cast_to


def _weights_of_raw(
    projection: Projection, dtype: torch.dtype, cast_weight: Cast
) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a projection whose raw map is read with its norm; batch statistics cancel the bias."""
    if not _is_fusable(projection):
        return None, None
    conv = projection.conv
    bias = None if conv.bias is None or _leaves_bias_out(projection.norm) else cast_weight(conv.bias, dtype)
    return cast_weight(conv.weight, dtype), bias


def _is_fusable(projection: Projection) -> bool:
    return type(projection.norm) in FUSABLE_NORMS and type(projection.activation) is nn.ReLU


def _leaves_bias_out(norm: Any) -> bool:
    """Whether a raw map comes without its convolution's bias: batch statistics cancel it; without gradients a table
    holds it, which spares a pass over the map."""
    return uses_batch_statistics(norm) or not torch.is_grad_enabled()


def shift_of(projection: Projection, linear: Linear) -> Shift:
    """What a projection leaves out of its raw map."""
    bias = projection.conv.bias
    if bias is None or not _is_fusable(projection) or not _leaves_bias_out(projection.norm):
        return NO_SHIFT
    return Shift(bias, () if linear.cancelled or not uses_batch_statistics(projection.norm) else (bias,))


class Whole:
    """One process holds the whole maps."""

    cast_weight: Cast = staticmethod(Tensor.to)

    def read(self, parts: Parts, linear: Linear, low: Tensor, high: Tensor) -> Read:
        sizes, shared = parts.pool_sizes(), parts.is_shared()
        raw = project(parts, linear.skip_weight, low, high, levels_of(sizes), self.cast_weight)
        calls = 2 if shared else 1  # a published APNB projects twice
        query = self._map(parts.query, raw.query, high, shift_of(parts.query, linear), calls)
        keys = None if shared else pool_map(self._map(parts.key, raw.key, low, shift_of(parts.key, linear), 1), sizes)
        return Read(raw.tokens, keys, query, raw.skip, None)

    def attend(self, read: Read, values: Tensor, constant: Tensor | None, parts: Parts) -> Tensor:
        return attend(read.query, read.keys, values, read.skip, constant, parts.pool_sizes())

    def with_norm(self, norm: Any, y: Tensor, shift: Shift, calls: int = 1) -> FeatureMap:
        return FeatureMap(y, self.norm_of(norm, y, shift, calls))

    def norm_of(self, norm: Any, y: Tensor, shift: Shift, calls: int) -> Norm:
        """What ``norm`` does to ``y``, leaving the running statistics of ``calls`` calls behind."""
        return norm_of(norm, y, shift, calls)

    def _map(self, projection: Projection, y: Tensor | None, x: Tensor, shift: Shift, calls: int) -> FeatureMap:
        """Queries or keys: the raw map with its norm where readers can apply that, else the finished map.

        ``calls`` is how often the published block calls the projection on this map.
        """
        if y is None:
            return FeatureMap(_finished(projection, x, calls), None)
        return self.with_norm(projection.norm, y, shift, calls)


WHOLE = Whole()


def _finished(projection: Projection, x: Tensor, calls: int) -> Tensor:
    """activation(norm(conv(x))) as a map; a norm with running statistics is called as often as published."""
    y = projection.conv(x)
    if projection.norm.training and any(True for _ in projection.norm.buffers()):
        with torch.no_grad():
            for _ in range(calls - 1):
                projection.norm(y)
    finished: Tensor = projection.activation(projection.norm(y))
    return finished


def epilogue(
    tail: Sequence[nn.Module], out: Tensor, cut: Cut = WHOLE, scale: Tensor | None = None, shift: Shift = NO_SHIFT
) -> Tensor:
    """Norm, activation and dropout behind the bottleneck; a batch norm and what follows it as one reader of ``out``.

    ``scale`` is what dropout multiplies by where that was drawn already.
    """
    modules = list(tail)
    if modules and type(modules[0]) in FUSABLE_NORMS and not onnx.exporting():  # a graph holds standard operators
        norm = modules.pop(0)
        relu = len(modules) > 0 and type(modules[0]) is nn.ReLU  # torch 2.11 traces no bool() of a list
        if relu:
            modules.pop(0)
        dropout = cast(nn.Dropout2d, modules.pop(0)) if modules and type(modules[0]) is nn.Dropout2d else None
        map = cut.with_norm(norm, out, shift)
        out = apply_tail(map, relu, channel_scale(dropout, out, out.shape[1]) if scale is None else scale)
    for module in modules:
        out = module(out)
    return out


@contextmanager
def recomputed(out: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """Inside this context autograd does not save ``out``; the backward pass calls ``make()`` to compute it again."""
    backend, reference = requested_backend(), weakref.ref(out)  # autograd keeps the hooks, and what they hold

    def pack(kept: Tensor) -> Tensor | None:
        out = reference()
        return None if out is not None and kept.is_set_to(out) else kept

    def unpack(kept: Tensor | None) -> Tensor:
        if kept is not None:
            return kept
        with use_backend(backend), torch.no_grad():
            return make()

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield
