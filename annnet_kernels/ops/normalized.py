"""Readers of a feature map with a norm, which is never finished in memory: pooling, attention and the block's tail.

Each Function takes the raw map y and the table of z = (y − mean) · invstd · weight + bias, keeps y, and differentiates
through batch statistics: one pass over y for their sums, one that writes dy once. The table gets no gradient: what
would flow through mean and invstd is part of dy, and weight and bias, the parameters in it, get theirs directly.
``conv_bias`` is the bias of the convolution ahead, which batch statistics cancel; its gradient is zero, not absent, so
that optimizers and DDP see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..tracers import exporting

Gradients = tuple[Any, ...]


class Share(NamedTuple):
    """How many values are behind batch statistics, None where they are frozen, and which processes share them."""

    samples: int | Tensor | None
    group: Any

    def mean(self, sums: Tensor) -> Tensor | None:
        """What the backward of batch statistics subtracts; nothing where they are frozen."""
        if self.samples is None:
            return None
        if self.group is not None:
            sums = sums.clone()
            dist.all_reduce(sums, group=self.group)
        return sums / self.samples


class Levels(NamedTuple):
    """The pyramid of a pooling."""

    heights: list[int]
    widths: list[int]


class ParameterDtypes(NamedTuple):
    """Dtypes of what gets a gradient from a norm's reader: weight, bias, and the bias of the convolution ahead.

    A context keeps no more of them: compiled autograd loses a tensor that is kept as an attribute.
    """

    weight: torch.dtype | None
    bias: torch.dtype | None
    conv_bias: torch.dtype | None

    @classmethod
    def of(cls, *parameters: Tensor | None) -> ParameterDtypes:
        """None stays None."""
        return cls(*(None if parameter is None else parameter.dtype for parameter in parameters))

    def gradients(self, sums: Tensor) -> Gradients:
        """Of all three, from Σ g and Σ g·ŷ."""
        return (
            None if self.weight is None else sums[1].to(self.weight),
            None if self.bias is None else sums[0].to(self.bias),
            None if self.conv_bias is None else sums.new_zeros(sums.shape[1], dtype=self.conv_bias),
        )


class NormalizedPool(torch.autograd.Function):
    """pyramid_pool(relu(z)): y (B, C, H, W) → (B, C, T)."""

    @staticmethod
    def forward(
        y: Tensor,
        table: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        conv_bias: Tensor | None,
        share: Share,
        levels: Levels,
        backend: str | None,
    ) -> Tensor:
        tokens: Tensor = torch.ops.annnet.pyramid_pool(y, table, *levels)
        return tokens

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, table, weight, bias, conv_bias, *ctx.constants = inputs
        ctx.dtypes = ParameterDtypes.of(weight, bias, conv_bias)
        ctx.save_for_backward(y, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        y, table = ctx.saved_tensors
        dy, sums = _map_backward(y, table, grad, None, *ctx.constants)
        return dy, None, *ctx.dtypes.gradients(sums), None, None, None  # table; share, levels, backend


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
        table: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        conv_bias: Tensor | None,
        key: Tensor | None,
        value: Tensor,
        x: Tensor | None,
        x_weight: Tensor | None,
        constant: Tensor | None,
        share: Share,
        levels: Levels,
        backend: str | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        pooled = None if key is not None else torch.ops.annnet.pyramid_pool(y, table, *levels)
        operands = y, table, pooled if key is None else key, value
        scale = y.shape[1] ** -0.5
        skip = None
        if x is not None and x_weight is not None:
            skip = F.conv2d(x, x_weight)
            if not exporting():  # what converts an exported program knows no writing in place
                logsumexp, _ = torch.ops.annnet.asymmetric_attention_(*operands, skip, constant, scale, False)
                return skip, logsumexp, pooled
        out, logsumexp, _ = torch.ops.annnet.asymmetric_attention(*operands, skip, constant, scale, False)
        return out, logsumexp, pooled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]) -> None:
        y, table, weight, bias, conv_bias, key, value, x, x_weight, _, *ctx.constants = inputs
        ctx.dtypes = ParameterDtypes.of(weight, bias, conv_bias)
        ctx.shared = key is None
        _, logsumexp, pooled = output
        ctx.mark_non_differentiable(*(logsumexp,) if pooled is None else (logsumexp, pooled))
        ctx.set_materialize_grads(False)  # else zeros are made for both
        tokens = key if pooled is None else pooled
        ctx.save_for_backward(y, table, tokens, value, logsumexp, x, x_weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Gradients:
        y, table, key, value, logsumexp, x, x_weight = ctx.saved_tensors
        grad = present(grad, y, value)
        needs_y = any(ctx.needs_input_grad[i] for i in (0, 2, 3))
        needs = [needs_y, (ctx.shared and needs_y) or ctx.needs_input_grad[5], ctx.needs_input_grad[6]]
        dz, dkey, dvalue = torch.ops.annnet.asymmetric_attention_bwd(
            grad, y, table, key, value, logsumexp, y.shape[1] ** -0.5, needs, ctx.constants[-1]
        )
        dy, of_parameters = None, (None, None, None)
        if needs_y:
            dy, sums = _map_backward(y, table, dkey if ctx.shared else None, dz, *ctx.constants)
            of_parameters = ctx.dtypes.gradients(sums)
        return (
            dy,
            None,  # table
            *of_parameters,
            None if ctx.shared or not needs[1] else dkey,
            dvalue if needs[2] else None,
            *product_backward(grad, x, x_weight, ctx.needs_input_grad[7:10]),
            *(None,) * 3,  # share, levels, backend
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


def _map_backward(
    y: Tensor,
    table: Tensor,
    grad_tokens: Tensor | None,
    grad_map: Tensor | None,
    share: Share,
    levels: Levels,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """dy, and Σ g and Σ g·ŷ, where the gradient of relu(z) is ``grad_map`` plus the spread ``grad_tokens``."""
    bwd = torch.ops.annnet
    sums = bwd.bn_relu_bwd_sums(y, table, grad_tokens, grad_map, *levels, backend)
    dy = bwd.bn_relu_bwd_input(y, table, grad_tokens, grad_map, share.mean(sums), *levels, backend)
    return dy, sums


class NormalizedTail(torch.autograd.Function):
    """channel_scale · relu(z), or without ReLU; ``channel_scale`` (B, C) is what Dropout2d multiplies by."""

    @staticmethod
    def forward(
        y: Tensor,
        table: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        conv_bias: Tensor | None,
        channel_scale: Tensor | None,
        relu: bool,
        share: Share,
        backend: str | None,
    ) -> Tensor:
        out: Tensor = torch.ops.annnet.batch_norm_apply(y, table, channel_scale, relu)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, table, weight, bias, conv_bias, channel_scale, ctx.relu, ctx.share, ctx.backend = inputs
        ctx.dtypes = ParameterDtypes.of(weight, bias, conv_bias)
        ctx.save_for_backward(y, table, channel_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        saved = ctx.saved_tensors
        sums = torch.ops.annnet.batch_norm_bwd_sums(grad, *saved, ctx.relu, ctx.backend)
        means = ctx.share.mean(sums)
        dy = torch.ops.annnet.batch_norm_bwd_input(grad, *saved, ctx.relu, means, ctx.backend)
        # table; channel_scale, relu, share, backend
        return dy, None, *ctx.dtypes.gradients(sums), None, None, None, None
