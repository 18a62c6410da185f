"""What a block makes of the pixels of its maps before any statistics are known, and the gradients of these maps.

Forward, with X_l and X_h the two maps (one in an APNB, where keys and queries are one projection, too):

    tokens = Pᵀ X_l        Y_k = X_l W_kᵀ        Y_q = X_h W_qᵀ        skip = X_h W_2ᵀ

Backward: every contribution is added to the gradient of its map as it is made, so that no two of them lie in memory at
a time, and no pass over a map does nothing but add.

    dX_h = dY_q W_q + d(skip) W_2        dX_l = dY_k W_k + P d(tokens)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layouts import is_channels_last
from . import registration
from .functions import is_traced, once_differentiable
from .normalized import Gradients, Levels
from .registration import is_batch_of_gradients, steps


class Projections(torch.autograd.Function):
    """low (B, C_l, H_l, W_l), high (B, C_h, H, W) → tokens (B, C_l, T), raw keys, raw queries, skip.

    Weights are those of 1 × 1 convolutions, in the dtype of the maps. What has no weight is not made, nor are tokens
    without ``levels``. ``low`` is None where both maps are one.
    """

    @staticmethod
    def forward(
        low: Tensor | None,
        high: Tensor,
        key_weight: Tensor | None,
        key_bias: Tensor | None,
        query_weight: Tensor | None,
        query_bias: Tensor | None,
        skip_weight: Tensor | None,
        levels: Levels | None,
        backend: str | None,
    ) -> tuple[Tensor | None, ...]:
        read = high if low is None else low
        return (
            None if levels is None else steps.pyramid_pool(read, None, *levels),
            None if key_weight is None else F.conv2d(read, key_weight, key_bias),
            None if query_weight is None else F.conv2d(high, query_weight, query_bias),
            None if skip_weight is None else F.conv2d(high, skip_weight),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        low, high, key_weight, _, query_weight, _, skip_weight, ctx.levels, ctx.backend = inputs
        pooled = high if low is None else low
        ctx.pooled_size, ctx.channels_last = list(pooled.shape[2:]), is_channels_last(pooled)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(low, high, key_weight, query_weight, skip_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtokens: Tensor | None, dkey: Tensor | None, dquery: Tensor | None, dskip: Any) -> Gradients:
        low, high, key_weight, query_weight, skip_weight = ctx.saved_tensors
        of_low, of_high, *of_weights = ctx.needs_input_grad[:7]
        needs_key, needs_query, needs_skip = of_weights[:2], of_weights[2:4], [of_weights[4], False]
        query = _convolution_backward(dquery, high, query_weight, None, (of_high, *needs_query))
        skip = _convolution_backward(dskip, high, skip_weight, query.map, (of_high, *needs_skip))
        read, of_read, before = (high, of_high, skip.map) if low is None else (low, of_low, None)
        key = _convolution_backward(dkey, read, key_weight, before, (of_read, *needs_key))
        dread = _pooling_backward(ctx, dtokens, key.map) if of_read else None
        dlow, dhigh = (None, dread) if low is None else (dread, skip.map)
        return dlow, dhigh, key.weight, key.bias, query.weight, query.bias, skip.weight, None, None


class _Convolution(NamedTuple):
    """Gradients of a 1 × 1 convolution; that of the map includes what was there before."""

    map: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def _convolution_backward(
    grad: Tensor | None, x: Tensor, weight: Tensor | None, before: Tensor | None, needs: tuple[bool, bool, bool]
) -> _Convolution:
    """Gradients of x, weight and bias where ``needs`` says so; that of x is added to ``before``, in place."""
    if grad is None or weight is None:
        return _Convolution(before, None, None)
    needs_map, *needs_parameters = needs
    if needs_map and before is not None and _add_product(before, grad, weight):
        needs_map = False
    dx, dweight, dbias = None, None, None
    if needs_map or any(needs_parameters):
        geometry = [1, 1], [0, 0], [1, 1], False, [0, 0], 1  # stride, padding, dilation; not transposed; groups
        dx, dweight, dbias = torch.ops.aten.convolution_backward(
            grad, x, weight, [weight.shape[0]], *geometry, [needs_map, *needs_parameters]
        )
    if dx is not None and before is not None:
        dx = before.add_(dx)
    return _Convolution(before if dx is None else dx, dweight, dbias)


def _add_product(before: Tensor, grad: Tensor, weight: Tensor) -> bool:
    """before += grad W by one product, where both maps are matrices and a sum would be a launch of its own."""
    if not registration.launches(before) or _stands_for_many(grad) or not all(map(_is_matrix, (before, grad))):
        return False
    target, source = (x.permute(0, 2, 3, 1).view(-1, x.shape[1]) for x in (before, grad))
    target.addmm_(source, weight.view(weight.shape[:2]))
    return True


def _stands_for_many(grad: Tensor) -> bool:
    """Whether a tracer or ``torch.vmap`` looks on, which serve nothing that is written in place."""
    return is_traced() or is_batch_of_gradients(grad)


def _is_matrix(x: Tensor) -> bool:
    """Whether a map is a dense matrix of pixels and channels."""
    return x.is_contiguous(memory_format=torch.channels_last)


def _pooling_backward(ctx: Any, grad: Tensor | None, before: Tensor | None) -> Tensor | None:
    """The gradient of the pooled map, added to ``before``, in place."""
    if grad is None or ctx.levels is None:
        return before
    constants = ctx.pooled_size, *ctx.levels, ctx.channels_last, ctx.backend
    if before is None or _stands_for_many(grad):
        spread: Tensor = steps.pyramid_pool_bwd(grad, None, *constants)
        return spread if before is None else before + spread
    steps.pyramid_pool_bwd_(grad, before, *constants)
    return before
