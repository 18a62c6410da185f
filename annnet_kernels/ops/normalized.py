"""Readers of a normalised map that is never written: pooling, attention and the block's tail.

Each Function takes the raw map y and the vectors of z = (y − mean) · invstd · weight + bias, keeps y, and
differentiates through batch statistics: one pass over y for their sums, one that writes dy once. ``mean`` and
``invstd`` get no gradient of their own: what would flow through them is part of dy. ``shift`` is the bias of the
convolution ahead, which batch statistics cancel; its gradient is zero, not absent, so that optimizers and DDP see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..tracers import exporting

Gradients = tuple[Any, ...]


def _mean_sums(sums: Tensor, samples: int | Tensor | None, group: Any) -> Tensor | None:
    """What the backward of batch statistics subtracts; nothing where the statistics were running ones."""
    if samples is None:
        return None
    if group is not None:
        sums = sums.clone()
        dist.all_reduce(sums, group=group)
    return sums / samples


def _no_gradient(mean: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """The gradient of ``shift``, zero; None where there is no shift.

    A context keeps the dtype of it alone: compiled autograd loses a tensor that is kept as an attribute.
    """
    return None if dtype is None else mean.new_zeros(mean.shape, dtype=dtype)


def _dtype_of(shift: Tensor | None) -> torch.dtype | None:
    return None if shift is None else shift.dtype


class NormalizedPool(torch.autograd.Function):
    """pyramid_pool(relu(z)): y (B, C, H, W) → (B, C, T)."""

    @staticmethod
    def forward(
        y: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor | None,
        samples: int | Tensor | None,
        group: Any,
        heights: list[int],
        widths: list[int],
        backend: str | None,
    ) -> Tensor:
        tokens: Tensor = torch.ops.annnet.pyramid_pool_bn_relu(y, mean, invstd, weight, bias, heights, widths)
        return tokens

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, mean, invstd, weight, bias, shift, ctx.samples, ctx.group, *ctx.constants = inputs
        ctx.shift = _dtype_of(shift)
        ctx.save_for_backward(y, mean, invstd, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        saved = ctx.saved_tensors
        dy, dweight, dbias = _rectified_backward(saved, grad, None, ctx.samples, ctx.group, *ctx.constants)
        # mean, invstd; samples, group, heights, widths, backend
        return dy, None, None, dweight, dbias, _no_gradient(saved[1], ctx.shift), None, None, None, None, None


class NormalizedAttention(torch.autograd.Function):
    """softmax(scale · relu(z) Kᵀ) V + X W₂ᵀ + c: y (B, Ck, H, W), X (B, Ch, H, W) → (B, Cv, H, W).

    Keys are given, or, with ``key=None``, pooled from the same map, as in an APNB: then one raw map serves both and
    its gradient is written once with both contributions. The product with the weight W₂ (Cv, Ch, 1, 1) is made
    first, and the attention adds to it in place; without X and W₂ there is no such term, nor c (Cv) where it is
    None.
    """

    @staticmethod
    def forward(
        y: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor | None,
        key: Tensor | None,
        value: Tensor,
        x: Tensor | None,
        x_weight: Tensor | None,
        constant: Tensor | None,
        samples: int | Tensor | None,
        group: Any,
        scale: float,
        heights: list[int],
        widths: list[int],
        backend: str | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        vectors = mean, invstd, weight, bias
        pooled = None if key is not None else torch.ops.annnet.pyramid_pool_bn_relu(y, *vectors, heights, widths)
        tokens = pooled if key is None else key
        if x is None or x_weight is None:
            addend = None if constant is None else constant[:, None, None].expand(y.shape[0], -1, *y.shape[2:])
        else:
            addend = F.conv2d(x, x_weight, constant)
            if not exporting():  # what converts an exported program knows no writing in place
                logsumexp = torch.ops.annnet.asymmetric_attention_bn_relu_(y, *vectors, tokens, value, addend, scale)
                return addend, logsumexp, pooled
        out, logsumexp = torch.ops.annnet.asymmetric_attention_bn_relu(y, *vectors, tokens, value, addend, scale)
        return out, logsumexp, pooled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]) -> None:
        y, mean, invstd, weight, bias, shift, key, value, x, x_weight, _, *constants = inputs
        ctx.shift = _dtype_of(shift)
        ctx.samples, ctx.group, ctx.scale, *ctx.constants = constants
        ctx.shared = key is None
        _, logsumexp, pooled = output
        ctx.mark_non_differentiable(*(logsumexp,) if pooled is None else (logsumexp, pooled))
        ctx.set_materialize_grads(False)  # else zeros are made for both
        tokens = key if pooled is None else pooled
        ctx.save_for_backward(y, mean, invstd, weight, bias, tokens, value, logsumexp, x, x_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Gradients:
        y, mean, invstd, weight, bias, key, value, logsumexp, x, x_weight = ctx.saved_tensors
        grad = present(grad, y, value)
        vectors = mean, invstd, weight, bias
        needs_y = any(ctx.needs_input_grad[i] for i in (0, 3, 4))
        needs = [needs_y, (ctx.shared and needs_y) or ctx.needs_input_grad[6], ctx.needs_input_grad[7]]
        dz, dkey, dvalue = torch.ops.annnet.asymmetric_attention_bn_relu_bwd(
            grad, y, *vectors, key, value, logsumexp, ctx.scale, needs, ctx.constants[-1]
        )
        dy = dweight = dbias = None
        if needs_y:
            tokens = dkey if ctx.shared else None
            dy, dweight, dbias = _rectified_backward((y, *vectors), tokens, dz, ctx.samples, ctx.group, *ctx.constants)
        return (
            dy,
            None,  # mean
            None,  # invstd
            dweight,
            dbias,
            _no_gradient(mean, ctx.shift),
            None if ctx.shared or not needs[1] else dkey,
            dvalue if needs[2] else None,
            *product_backward(grad, x, x_weight, ctx.needs_input_grad[8:11]),
            *(None,) * 6,  # samples, group, scale, heights, widths, backend
        )


def present(grad: Tensor | None, y: Tensor, value: Tensor) -> Tensor:
    """The gradient of the output, zeros if none came: other processes may wait for what is made of it."""
    return y.new_zeros(y.shape[0], value.shape[1], *y.shape[2:]) if grad is None else grad


def product_backward(grad: Tensor, x: Tensor | None, weight: Tensor | None, needs: Sequence[bool]) -> Gradients:
    """Gradients of x, weight and constant in x weightᵀ + constant; None where ``needs`` says no."""
    if x is None or weight is None:
        return None, None, grad.sum((0, 2, 3)) if needs[2] else None
    geometry = [1, 1], [0, 0], [1, 1], False, [0, 0], 1  # stride, padding, dilation; not transposed; groups
    gradients: Gradients = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], *geometry, list(needs)
    )
    return gradients


def _rectified_backward(
    saved: Sequence[Tensor],
    grad_tokens: Tensor | None,
    grad_map: Tensor | None,
    samples: int | Tensor | None,
    group: Any,
    heights: list[int],
    widths: list[int],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dy, dweight and dbias of relu(z) whose gradient is ``grad_map`` plus the spread ``grad_tokens``."""
    bwd = torch.ops.annnet
    sums = bwd.bn_relu_bwd_sums(*saved, grad_tokens, grad_map, heights, widths, backend)
    mean_sums = _mean_sums(sums, samples, group)
    dy = bwd.bn_relu_bwd_input(*saved, grad_tokens, grad_map, mean_sums, heights, widths, backend)
    return dy, sums[1], sums[0]


class NormalizedTail(torch.autograd.Function):
    """channel_scale · relu(z), or without ReLU; ``channel_scale`` (B, C) is what Dropout2d multiplies by."""

    @staticmethod
    def forward(
        y: Tensor,
        mean: Tensor,
        invstd: Tensor,
        weight: Tensor,
        bias: Tensor,
        shift: Tensor | None,
        channel_scale: Tensor | None,
        relu: bool,
        samples: int | Tensor | None,
        group: Any,
        backend: str | None,
    ) -> Tensor:
        out: Tensor = torch.ops.annnet.batch_norm_apply(y, mean, invstd, weight, bias, channel_scale, relu)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, mean, invstd, weight, bias, shift, channel_scale, ctx.relu, ctx.samples, ctx.group, ctx.backend = inputs
        ctx.shift = _dtype_of(shift)
        ctx.save_for_backward(y, mean, invstd, weight, bias, channel_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        saved = ctx.saved_tensors
        sums = torch.ops.annnet.batch_norm_bwd_sums(grad, *saved, ctx.relu, ctx.backend)
        mean_sums = _mean_sums(sums, ctx.samples, ctx.group)
        dy = torch.ops.annnet.batch_norm_bwd_input(grad, *saved, ctx.relu, mean_sums, ctx.backend)
        # mean, invstd; channel_scale, relu, samples, group, backend
        return dy, None, None, sums[1], sums[0], _no_gradient(saved[1], ctx.shift), None, None, None, None, None
