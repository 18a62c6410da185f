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

from . import onnx
from .backends import requested_backend, use_backend
from .collapse import Parts, Projection, Weights, constant_of, token_values, weights_of
from .functional import pyramid_pool
from .normalization import (
    FUSABLE_NORMS,
    FeatureMap,
    Skip,
    apply_tail,
    attend,
    channel_scale,
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
    scale: Tensor | None
    """(B, C_out): what dropout multiplies the output by, where that had to be drawn already."""


class Linear(Protocol):
    """The linear part of a block, as products that are made from pooled tokens and of the high-level map."""

    def values(self, tokens: Tensor) -> Tensor:
        """U, (B, C_out, T)."""

    def skip(self, high: Tensor) -> Skip:
        """X_h W_2ᵀ + c."""

    def finish(self, out: Tensor, cut: Cut, scale: Tensor | None) -> Tensor:
        """What follows the bottleneck."""


class Cut(Protocol):
    """How this process holds the maps of a block."""

    def read(self, parts: Parts, low: Tensor, high: Tensor) -> Read:
        """Tokens, keys and queries of the whole maps; statistics are updated here, once."""

    def attend(self, read: Read, values: Tensor, skip: Skip, parts: Parts) -> Tensor:
        """A U + X_h W_2ᵀ + c, (B, C_out, H, W)."""

    def with_norm(self, norm: Any, y: Tensor) -> FeatureMap:
        """``y`` with what ``norm`` does to the whole map."""


def block_forward(
    parts: Parts, linear: Linear, low: Tensor, high: Tensor, cut: Cut, *, recompute: bool = False
) -> Tensor:
    """The block's output (B, C_out, H, W) from low (B, C_l, H_l, W_l) and high (B, C_h, H, W).

    With ``recompute`` the map ahead of the tail is not kept for the backward pass but made again there.
    """
    read = cut.read(parts, low, high)
    make = partial(cut.attend, read, linear.values(read.tokens), linear.skip(high), parts)
    out = make()
    if recompute and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        with recomputed(out, make):
            return linear.finish(out, cut, read.scale)
    return linear.finish(out, cut, read.scale)


def collapsed_forward(parts: Parts, low: Tensor, high: Tensor, *, recompute: bool = False) -> Tensor:
    """:func:`block_forward` on whole maps, from the block's present weights."""
    return block_forward(parts, Collapsed.of(parts), low, high, WHOLE, recompute=recompute)


class Collapsed(NamedTuple):
    """The linear part of a block from its present weights."""

    parts: Parts
    weights: Weights

    @classmethod
    def of(cls, parts: Parts) -> Collapsed:
        """Reads every weight once."""
        return cls(parts, weights_of(parts))

    def values(self, tokens: Tensor) -> Tensor:
        """The collapse itself."""
        return token_values(self.weights, tokens)

    def skip(self, high: Tensor) -> Skip:
        """Without a bottleneck, c alone."""
        weight = self.weights.high
        return Skip(None if weight is None else high, weight, constant_of(self.parts, self.weights))

    def finish(self, out: Tensor, cut: Cut, scale: Tensor | None) -> Tensor:
        """Norm, activation and dropout."""
        return epilogue(self.parts.tail, out, cut, scale)


class _Whole:
    """One process holds the whole maps."""

    def read(self, parts: Parts, low: Tensor, high: Tensor) -> Read:
        sizes, shared = parts.pool_sizes(), parts.is_shared()
        tokens = pyramid_pool(low, sizes)
        query = project(parts.query, high, calls=2 if shared else 1)  # an APNB's published forward projects twice
        keys = None if shared else pool_map(project(parts.key, low, calls=1), sizes)
        return Read(tokens, keys, query, None)

    def attend(self, read: Read, values: Tensor, skip: Skip, parts: Parts) -> Tensor:
        return attend(read.query, read.keys, values, skip, parts.pool_sizes())

    def with_norm(self, norm: Any, y: Tensor) -> FeatureMap:
        return FeatureMap(y, norm_of(norm, y))


WHOLE = _Whole()


def project(projection: Projection, x: Tensor, calls: int) -> FeatureMap:
    """Queries or keys: the raw map with its norm where readers can apply that, else the finished map.

    ``calls`` is how often the published block calls the projection on this map.
    """
    norm = projection.norm
    if type(norm) not in FUSABLE_NORMS or type(projection.activation) is not nn.ReLU:
        return FeatureMap(_finished(projection, x, calls), None)
    y, conv_bias = convolve(projection, x)
    return FeatureMap(y, norm_of(norm, y, conv_bias=conv_bias, calls=calls))


def convolve(projection: Projection, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The raw map of a projection, and the bias that it leaves out, since batch statistics cancel it."""
    conv = projection.conv
    if uses_batch_statistics(projection.norm):
        return F.conv2d(x, conv.weight, None), conv.bias
    return F.conv2d(x, conv.weight, conv.bias), None


def _finished(projection: Projection, x: Tensor, calls: int) -> Tensor:
    """activation(norm(conv(x))) as a map; a norm with running statistics is called as often as published."""
    y = projection.conv(x)
    if projection.norm.training and any(True for _ in projection.norm.buffers()):
        with torch.no_grad():
            for _ in range(calls - 1):
                projection.norm(y)
    finished: Tensor = projection.activation(projection.norm(y))
    return finished


def epilogue(tail: Sequence[nn.Module], out: Tensor, cut: Cut = WHOLE, scale: Tensor | None = None) -> Tensor:
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
        map = cut.with_norm(norm, out)
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
