"""Readers of a feature map with a norm, which is never finished in memory: pooling, attention and the block's tail.

Each Function takes the raw map y and the table of z = (y − mean) · invstd · weight + bias, keeps y, and differentiates
through batch statistics: one pass over y for their sums, one that writes dy once. The table gets no gradient: what
would flow through mean and invstd is part of dy, and weight and bias, the parameters in it, get theirs directly.
``cancelled`` are biases ahead of the norm, which batch statistics cancel; their gradient is zero, not absent, so that
optimizers and DDP see it. (Each is a parameter of its own, since torch.compile traces no ``*args`` here.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..runtime.tracers import exporting
from .functions import is_traced, once_differentiable
from .registration import steps

Gradients = tuple[Any, ...]


class Share(NamedTuple):
    """How many values are behind batch statistics, None where they are frozen, and which processes share them."""

    samples: int | Tensor | None
    group: Any

    def of_batch(self, sums: Tensor) -> tuple[Tensor | None, int]:
        """The sums whose means the backward of batch statistics subtracts, and their count; None: it is frozen."""
        if self.samples is None:
            return None, 1
        if self.group is not None:
            sums = sums.clone()
            dist.all_reduce(sums, group=self.group)
        if isinstance(self.samples, Tensor):
            return sums / self.samples, 1
        return sums, self.samples


class Levels(NamedTuple):
    """The pyramid of a pooling."""

    heights: list[int]
    widths: list[int]


class Parameters(NamedTuple):
    """Dtypes of a norm's weight and bias, and of the biases that it cancels, with their shapes.

    A context keeps no more of them: compiled autograd loses a tensor that is kept as an attribute.
    """

    weight: torch.dtype | None
    bias: torch.dtype | None
    cancelled: tuple[tuple[torch.Size, torch.dtype] | None, ...]

    @classmethod
    def of(cls, weight: Tensor | None, bias: Tensor | None, cancelled: Sequence[Tensor | None]) -> Parameters:
        """None stays None."""
        return cls(
            None if weight is None else weight.dtype,
            None if bias is None else bias.dtype,
            tuple([None if x is None else (x.shape, x.dtype) for x in cancelled]),
        )

    def gradients(self, sums: Tensor) -> Gradients:
        """Of weight and bias, from Σ g and Σ g·ŷ."""
        dbias, dweight = sums.unbind()
        return _in_dtype(dweight, self.weight), _in_dtype(dbias, self.bias)

    def zeros(self, like: Tensor) -> Gradients:
        """Of the cancelled biases: parts of one tensor of zeros, where they have one dtype."""
        present = [entry for entry in self.cancelled if entry is not None]
        if not present:
            return self.cancelled
        dtype = present[0][1]
        if any(other != dtype for _, other in present):
            return tuple(
                None if entry is None else like.new_zeros(entry[0], dtype=entry[1]) for entry in self.cancelled
            )
        counts = [shape.numel() for shape, _ in present]
        parts = iter(like.new_zeros(sum(counts), dtype=dtype).split(counts))
        return tuple([None if entry is None else next(parts) for entry in self.cancelled])


def _in_dtype(gradient: Tensor, dtype: torch.dtype | None) -> Tensor | None:
    """A gradient in the dtype of its parameter; None where there is no parameter."""
    return gradient if gradient.dtype == dtype else None if dtype is None else gradient.to(dtype)


class NormalizedPool(torch.autograd.Function):
    """pyramid_pool(relu(z)): y (B, C, H, W) → (B, C, T)."""

    @staticmethod
    def forward(
        y: Tensor,
        table: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        share: Share,
        levels: Levels,
        backend: str | None,
        cancelled: Tensor | None,
    ) -> Tensor:
        tokens: Tensor = steps.pyramid_pool(y, table, *levels)
        return tokens

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, table, weight, bias, *ctx.constants, cancelled = inputs
        ctx.parameters = Parameters.of(weight, bias, (cancelled,))
        ctx.save_for_backward(y, table)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        y, table = ctx.saved_tensors
        dy, sums = map_backward(y, table, grad, None, *ctx.constants)
        parameters = ctx.parameters
        return dy, None, *parameters.gradients(sums), None, None, None, *parameters.zeros(sums)


class NormalizedAttention(torch.autograd.Function):
    """softmax(scale · relu(z) Kᵀ) V + skip + c: y (B, Ck, H, W), skip (B, Cv, H, W), c (Cv) → (B, Cv, H, W).

    Keys are given, or, with ``key=None``, pooled from the same map, as in an APNB: then one raw map serves both and
    its gradient is written once with both contributions. The sum is written into ``skip``, except in traced code.
    """

    @staticmethod
    def forward(
        y: Tensor,
        table: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        key: Tensor | None,
        value: Tensor,
        skip: Tensor | None,
        constant: Tensor | None,
        share: Share,
        levels: Levels,
        backend: str | None,
        cancelled: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        pooled = None if key is not None else steps.pyramid_pool(y, table, *levels)
        operands = y, table, pooled if key is None else key, value
        scale = y.shape[1] ** -0.5
        if skip is not None and not (exporting() or is_traced() or skip._is_view()):  # a batch of 0 is a view
            logsumexp, _ = steps.asymmetric_attention_(*operands, skip, constant, scale, False)
            return skip, logsumexp, pooled
        out, logsumexp, _ = steps.asymmetric_attention(*operands, skip, constant, scale, False)
        return out, logsumexp, pooled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor | None]) -> None:
        y, table, weight, bias, key, value, skip, _, *ctx.constants, cancelled = inputs
        ctx.parameters = Parameters.of(weight, bias, (cancelled,))
        ctx.shared = key is None
        out, logsumexp, pooled = output
        if out is skip:
            ctx.mark_dirty(out)
        ctx.mark_non_differentiable(*(logsumexp,) if pooled is None else (logsumexp, pooled))
        ctx.set_materialize_grads(False)  # else zeros are made for both
        tokens = key if pooled is None else pooled
        ctx.save_for_backward(y, table, tokens, value, logsumexp)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Gradients:
        y, table, key, value, logsumexp = ctx.saved_tensors
        grad = present(grad, y, value)
        needs_y = any(ctx.needs_input_grad[i] for i in (0, 2, 3))
        needs = [needs_y, (ctx.shared and needs_y) or ctx.needs_input_grad[4], ctx.needs_input_grad[5]]
        dz, dkey, dvalue = steps.asymmetric_attention_bwd(
            grad, y, table, key, value, logsumexp, y.shape[1] ** -0.5, needs, ctx.constants[-1]
        )
        dy, of_norm = None, (None, None)
        if needs_y:
            dy, sums = map_backward(y, table, dkey if ctx.shared else None, dz, *ctx.constants)
            of_norm = ctx.parameters.gradients(sums)
        return (
            dy,
            None,  # table
            *of_norm,
            None if ctx.shared or not needs[1] else dkey,
            dvalue if needs[2] else None,
            *skip_gradients(grad, ctx.needs_input_grad[6:8]),
            *(None,) * 3,  # share, levels, backend
            *ctx.parameters.zeros(table),
        )


def present(grad: Tensor | None, y: Tensor, value: Tensor) -> Tensor:
    """The gradient of the output, zeros if none came: other processes may wait for what is made of it."""
    return y.new_zeros(y.shape[0], value.shape[1], *y.shape[2:]) if grad is None else grad


def skip_gradients(grad: Tensor, needs: Sequence[bool]) -> Gradients:
    """Gradients of what is added to the attention: a map, and a constant in every pixel."""
    accumulator = torch.promote_types(grad.dtype, torch.float32)
    return grad if needs[0] else None, grad.sum((0, 2, 3), dtype=accumulator) if needs[1] else None


def map_backward(
    y: Tensor,
    table: Tensor,
    grad_tokens: Tensor | None,
    grad_map: Tensor | None,
    share: Share,
    levels: Levels,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """dy, and Σ g and Σ g·ŷ, where the gradient of relu(z) is ``grad_map`` plus the spread ``grad_tokens``."""
    sums = steps.bn_relu_bwd_sums(y, table, grad_tokens, grad_map, *levels, backend)
    dy = steps.bn_relu_bwd_input(y, table, grad_tokens, grad_map, *share.of_batch(sums), *levels, backend)
    return dy, sums


class NormalizedTail(torch.autograd.Function):
    """channel_scale · relu(z), or without ReLU; ``channel_scale`` (B, C) is what Dropout2d multiplies by.

    The biases of a block whose tail uses batch statistics are cancelled here, all of them.
    """

    @staticmethod
    def forward(
        y: Tensor,
        table: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        channel_scale: Tensor | None,
        relu: bool,
        share: Share,
        backend: str | None,
        key_bias: Tensor | None,
        query_bias: Tensor | None,
        value_bias: Tensor | None,
        out_bias: Tensor | None,
        join_bias: Tensor | None,
    ) -> Tensor:
        out: Tensor = steps.batch_norm_apply(y, table, channel_scale, relu)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        y, table, weight, bias, channel_scale, ctx.relu, ctx.share, ctx.backend, *cancelled = inputs
        ctx.parameters = Parameters.of(weight, bias, cancelled)
        ctx.save_for_backward(y, table, channel_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Gradients:
        saved, parameters = ctx.saved_tensors, ctx.parameters
        sums = steps.batch_norm_bwd_sums(grad, *saved, ctx.relu, ctx.backend)
        of_batch = ctx.share.of_batch(sums)
        dy = steps.batch_norm_bwd_input(grad, *saved, ctx.relu, *of_batch, ctx.backend)
        # table; channel_scale, relu, share, backend
        return dy, None, *parameters.gradients(sums), None, None, None, None, *parameters.zeros(sums)
