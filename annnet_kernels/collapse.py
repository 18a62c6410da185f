"""The collapse: everything that is linear behind the attention moves onto the pooled tokens, exactly.

With A the N × T attention (its rows sum to 1), P the pooling (its columns sum to 1) and W_1, W_2 the two halves of the
bottleneck, the published chain

    value map → pooling → A V → W → concatenation with X_h → bottleneck

equals

    A U + X_h W_2ᵀ + c,    U = (Pᵀ X_l) W_vᵀ Wᵀ W_1ᵀ    (T rows),    c = W_1 (W b_v + b) + b_1.

The value map, the context map, its projection, the concatenation and half of the bottleneck are never made. The biases
stay out of U: a constant common to all tokens would cost the gradients of query and key accuracy, since the softmax's
backward has to cancel it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial, reduce
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .autocast import no_autocast
from .backends import requested_backend, use_backend
from .functional import asymmetric_attention, pyramid_pool
from .normalization import (
    FUSABLE_NORMS,
    FeatureMap,
    Product,
    apply_tail,
    attend,
    channel_scale,
    norm_of,
    pool_map,
    uses_batch_statistics,
)
from .tracers import jit_tracing


class Projection(NamedTuple):
    """1 × 1 convolution, norm, ReLU: makes queries or keys."""

    conv: nn.Conv2d
    norm: nn.Module
    activation: nn.Module


class Weights(NamedTuple):
    """W_v, W, and the halves W_1 and W_2 of the bottleneck's weight, all as of 1 × 1 convolutions."""

    value: Tensor
    out: Tensor
    context: Tensor | None
    high: Tensor | None


class Parts(NamedTuple):
    """The modules of an AFNB or APNB, whatever their names. No properties: torch 2.10 cannot trace those of a tuple."""

    key: Projection
    query: Projection
    value: nn.Conv2d
    out: nn.Conv2d
    join: nn.Conv2d | None
    tail: Sequence[nn.Module]
    pools: Sequence[nn.AdaptiveAvgPool2d]
    containers: Sequence[nn.Module]
    widths: Sequence[tuple[str, object, nn.Module]] = ()  # attributes that say how many channels a convolution puts out

    def is_shared(self) -> bool:
        """Whether queries and keys are one projection, as in an APNB."""
        return self.key.conv is self.query.conv

    def pool_sizes(self) -> list[tuple[int, int]]:
        sizes = [pool.output_size for pool in self.pools]
        return [cast("tuple[int, int]", size if isinstance(size, tuple) else (size, size)) for size in sizes]


def collapsed_forward(parts: Parts, low: Tensor, high: Tensor, *, recompute: bool = False) -> Tensor:
    """The block's output (B, C_out, H, W) from low (B, C_l, H_l, W_l) and high (B, C_h, H, W).

    With ``recompute`` the map ahead of the tail is not kept for the backward pass but made again there.
    """
    weights = weights_of(parts)
    value = token_values(weights, pyramid_pool(low, parts.pool_sizes()))
    product = Product(None if weights.high is None else high, weights.high, constant_of(parts, weights))
    attend = _attention(parts, low, high, value, product)
    out = attend()
    if recompute and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        with made_again(out, attend):
            return epilogue(parts.tail, out)
    return epilogue(parts.tail, out)


def _attention(parts: Parts, low: Tensor, high: Tensor, value: Tensor, product: Product) -> Callable[[], Tensor]:
    """Makes A U + product, with queries from ``high`` and keys from ``low``; statistics are updated here, once."""
    shared = parts.is_shared()
    calls = 2 if shared else 1  # in an APNB the published block projects twice
    if not _is_fusable(parts.query):
        query = _rectified(parts.query, high, calls)
        tokens = pyramid_pool(query, parts.pool_sizes()) if shared else _pooled_key(parts, low)
        return lambda: asymmetric_attention(query, tokens, value.to(query.dtype)) + _sum_of(product, query)
    query_map = _raw(parts.query, high, calls)
    key = None if shared else _pooled_key(parts, low)
    return partial(attend, query_map, key, value, product, parts.pool_sizes())


def _sum_of(product: Product, query: Tensor) -> Tensor:
    """X Wᵀ + c in the dtype of ``query``; c alone, (C, 1, 1), without a bottleneck."""
    x, weight, constant = (None if operand is None else operand.to(query.dtype) for operand in product)
    assert constant is not None
    return constant[:, None, None] if x is None or weight is None else F.conv2d(x, weight, constant)


@contextmanager
def made_again(out: Tensor, make: Callable[[], Tensor]) -> Iterator[None]:
    """Within, whoever keeps ``out`` for its backward pass keeps nothing, and gets what ``make`` makes then."""
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


def _pooled_key(parts: Parts, low: Tensor) -> Tensor:
    """Keys of an AFNB, (B, C_k, T)."""
    if not _is_fusable(parts.key):
        return pyramid_pool(_rectified(parts.key, low, calls=1), parts.pool_sizes())
    return pool_map(_raw(parts.key, low, calls=1), parts.pool_sizes())


def epilogue(tail: Sequence[nn.Module], out: Tensor) -> Tensor:
    """Norm, activation and dropout behind the bottleneck; a batch norm and what follows it as one reader of ``out``."""
    modules = list(tail)
    if modules and type(modules[0]) in FUSABLE_NORMS:
        norm = modules.pop(0)
        relu = len(modules) > 0 and type(modules[0]) is nn.ReLU  # torch 2.11 traces no bool() of a list
        if relu:
            modules.pop(0)
        dropout = cast(nn.Dropout2d, modules.pop(0)) if modules and type(modules[0]) is nn.Dropout2d else None
        scale = channel_scale(dropout, out, out.shape[1])
        out = apply_tail(FeatureMap(out, norm_of(norm, out)), relu, scale)
    for module in modules:
        out = module(out)
    return out


def _is_fusable(projection: Projection) -> bool:
    """Whether readers can normalise and rectify; any other norm or activation is called as the module it is."""
    return type(projection.norm) in FUSABLE_NORMS and type(projection.activation) is nn.ReLU


def _raw(projection: Projection, x: Tensor, calls: int) -> FeatureMap:
    """The projection ahead of its batch norm, with what that norm does to it."""
    conv, norm = projection.conv, projection.norm
    if uses_batch_statistics(norm):  # they cancel the convolution's bias
        y = F.conv2d(x, conv.weight, None)
        return FeatureMap(y, norm_of(norm, y, conv_bias=conv.bias, calls=calls))
    y = F.conv2d(x, conv.weight, conv.bias)
    return FeatureMap(y, norm_of(norm, y))


def _rectified(projection: Projection, x: Tensor, calls: int) -> Tensor:
    """activation(norm(conv(x))) as a map; a norm with running statistics is called as often as published."""
    y = projection.conv(x)
    if projection.norm.training and any(True for _ in projection.norm.buffers()):
        with torch.no_grad():
            for _ in range(calls - 1):
                projection.norm(y)
    rectified: Tensor = projection.activation(projection.norm(y))
    return rectified


def weights_of(parts: Parts) -> Weights:
    """The weights of the linear maps behind the attention. Each is read once: reading can run a parametrization."""
    context = high = None
    if parts.join is not None:  # split once: each slice of its own would pad its gradient to the whole weight
        context, high = parts.join.weight.split([parts.out.out_channels, parts.query.conv.in_channels], dim=1)
    return Weights(parts.value.weight, parts.out.weight, context, high)


def token_values(weights: Weights, pooled: Tensor) -> Tensor:
    """U, (B, C_out, T): pooled features (B, C_l, T) carried through every later projection, in float32 at least.

    The rows are few (110 per image), so the products are small; they are made in the cheapest order by counted
    operations at the actual batch. Traced code multiplies the weights behind W_v first: comparing sizes would tie it to
    the batch that it was traced with.
    """
    batch, _, tokens = pooled.shape
    with no_autocast(pooled.device.type):
        matrices = matrices_of(weights)
        rows = pooled.transpose(1, 2).flatten(0, 1).to(matrices[0].dtype)
        if torch.compiler.is_compiling() or jit_tracing():
            values = torch.mm(torch.mm(rows, matrices[0]), reduce(torch.mm, matrices[1:]))
        else:
            values = chain_product([rows, *matrices])
        return values.view(batch, tokens, values.shape[1]).transpose(1, 2)


def matrices_of(weights: Weights) -> list[Tensor]:
    """W_vᵀ, Wᵀ and, with a bottleneck, W_1ᵀ: their product maps a pooled row to its token; float32 at least."""
    chain = [weight for weight in weights[:3] if weight is not None]
    return [weight.flatten(1).t().to(torch.promote_types(weight.dtype, torch.float32)) for weight in chain]


def chain_product(matrices: Sequence[Tensor]) -> Tensor:
    """The product of all matrices, multiplied in the order that takes the fewest operations."""
    if len(matrices) == 1:
        return matrices[0]
    split = _cheapest_chain((matrices[0].shape[0], *(matrix.shape[1] for matrix in matrices)))[1]
    return torch.mm(chain_product(matrices[:split]), chain_product(matrices[split:]))


@cache
def _cheapest_chain(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Multiplications of the product of matrices (sizes[0], sizes[1]), (sizes[1], sizes[2]), …, and its last split."""
    if len(sizes) <= 2:
        return 0, 0

    def cost(split: int) -> int:
        own = sizes[0] * sizes[split] * sizes[-1]
        return own + _cheapest_chain(sizes[: split + 1])[0] + _cheapest_chain(sizes[split:])[0]

    return min((cost(split), split) for split in range(1, len(sizes) - 1))


def constant_of(parts: Parts, weights: Weights) -> Tensor:
    """c, (C_out): what the biases amount to once they have passed through A unchanged; float32 at least."""
    with no_autocast(weights.out.device.type):
        constant = _affine(weights.out, _bias(parts.value, weights.value), _bias(parts.out, weights.out))
        if weights.context is not None and parts.join is not None:
            constant = _affine(weights.context, constant, _bias(parts.join, weights.context))
        return constant


def _affine(weight: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    return torch.mv(weight.flatten(1).to(x.dtype), x) + bias


def _bias(conv: nn.Conv2d, weight: Tensor) -> Tensor:
    accumulator = torch.promote_types(weight.dtype, torch.float32)
    bias = conv.bias
    return weight.new_zeros(conv.out_channels, dtype=accumulator) if bias is None else bias.to(accumulator)
