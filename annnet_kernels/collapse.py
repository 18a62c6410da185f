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

from collections.abc import Sequence
from functools import cache, reduce
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from .autocast import no_autocast
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
    known: Sequence[type[nn.Module]] = ()  # classes in the projections of a block that was compared with its collapse

    def is_shared(self) -> bool:
        """Whether queries and keys are one projection, as in an APNB."""
        return self.key.conv is self.query.conv

    def pool_sizes(self) -> list[tuple[int, int]]:
        sizes = [pool.output_size for pool in self.pools]
        return [cast("tuple[int, int]", size if isinstance(size, tuple) else (size, size)) for size in sizes]


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
