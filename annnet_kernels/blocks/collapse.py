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
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ..ops.functions import apply
from ..ops.matrix_products import WIDE, matrix_products
from ..ops.token_values import TokenValues, cheapest_order, program_of
from ..runtime.autocast import no_autocast


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
    skipped: Sequence[tuple[type | None, nn.Module]] = ()  # what the collapse may not call; the class it must have

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
    """U, (B, C_out, T) in the dtype of the tokens: pooled features (B, C_l, T) carried through every later projection.

    The rows are few (110 per image), so the products are small; they are made in float32 at least, whatever the
    autocast, and in the order that takes the fewest operations at the actual batch.
    """
    values: Tensor = apply(TokenValues, pooled, *weights[:3])[0]
    return values


def token_matrix(weights: Weights) -> Tensor:
    """(C_l, C_out): what maps a pooled row to its token; float32 at least."""
    first, *others = (weight for weight in weights[:3] if weight is not None)
    factors = [first.view(first.shape[:2]).t(), *others]
    order = cheapest_order((first.shape[1], first.shape[0], *(weight.shape[0] for weight in others)))
    return matrix_products(factors, program_of(order, len(factors), like=WIDE))[-1]


class Biases(NamedTuple):
    """Of the same convolutions, (C); None where there is none."""

    value: Tensor | None
    out: Tensor | None
    join: Tensor | None


def biases_of(parts: Parts) -> Biases:
    """The biases of the linear maps behind the attention, each read once, too."""
    return Biases(parts.value.bias, parts.out.bias, None if parts.join is None else parts.join.bias)


def constant_of(weights: Weights, biases: Biases) -> Tensor | None:
    """c, (C_out): what the biases amount to once they have passed through A unchanged; None where there are none.

    float32 at least.
    """
    with no_autocast(weights.out.device.type):
        constant = _affine(weights.value, None, biases.value)
        constant = _affine(weights.out, constant, biases.out)
        return constant if weights.context is None else _affine(weights.context, constant, biases.join)


def _affine(weight: Tensor, x: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """W x + b in float32 at least, where None is zero."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    if x is None:
        return bias
    matrix = weight.view(weight.shape[:2]).to(wide)
    return torch.mv(matrix, x) if bias is None else torch.addmv(bias, matrix, x)
