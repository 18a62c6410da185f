"""annnet::upsampled_cross_entropy and upsampled_argmax: what is made of logits (B, K, h, w) at full resolution.

With z the upsampled logits of a pixel, t its label, w the class weights and ε the label smoothing,

    loss = (1 − ε) w_t (logsumexp z − z_t) + ε / K · Σ_k w_k (logsumexp z − z_k)

The exponentials that make a loss make its gradient, too. So where all pixels have the same upstream gradient, which a
sum or a mean over them gives, the forward pass makes the gradient of the sum, at low resolution, and the backward pass
multiplies it by one number per image. Where each pixel has its own, the backward pass starts from the logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..layouts import empty_map, is_channels_last
from ..reference import upsampled as reference
from ..runtime.backends import requested_backend
from .functions import apply
from .registration import register, steps


def _accumulator(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _empty_like(logits: Tensor, dtype: torch.dtype) -> Tensor:
    batch, classes, height, width = logits.shape
    like = logits.new_empty(0, dtype=dtype)
    return empty_map(like, (batch, classes, height, width), is_channels_last(logits))


def _allocate(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    per_pixel: bool,
    gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _accumulator(logits)
    losses = logits.new_empty(target.shape if per_pixel else (0,), dtype=dtype)
    unit_gradient = _empty_like(logits, dtype) if gradient else logits.new_empty((0,), dtype=dtype)
    return losses, logits.new_empty((logits.shape[0], 2), dtype=dtype), unit_gradient


def _allocate_bwd(logits: Tensor, *_: Any) -> Tensor:
    return _empty_like(logits, logits.dtype)


def _allocate_argmax(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    return logits.new_empty((logits.shape[0], *size), dtype=torch.int64)


def _fold(info: Any, tensor: Tensor, dim: int | None) -> Tensor:
    """The vmapped dimension, which a tensor may lack, folded into the batch."""
    batched = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
    return batched.flatten(0, 1)


def _same_weight(dim: int | None) -> None:
    if dim is not None:
        raise NotImplementedError("weight: vmap over class weights is not implemented; expected the same for all")


def _vmap(
    info: Any,
    in_dims: Sequence[int | None],
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *options: Any,
) -> Any:
    _same_weight(in_dims[2])
    folded = (_fold(info, logits, in_dims[0]), _fold(info, target, in_dims[1]))
    outputs = torch.ops.annnet.upsampled_cross_entropy(*folded, weight, *options)
    size: int = info.batch_size
    unfolded = tuple(x.unflatten(0, (size, -1)) if x.dim() > 1 else x.expand(size, 0) for x in outputs)
    return unfolded, (0, 0, 0)


def _vmap_bwd(
    info: Any,
    in_dims: Sequence[int | None],
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad: Tensor,
    *options: Any,
) -> Any:
    _same_weight(in_dims[2])
    logits, target, grad = (_fold(info, x, in_dims[i]) for x, i in ((logits, 0), (target, 1), (grad, 3)))
    dlogits = torch.ops.annnet.upsampled_cross_entropy_bwd(logits, target, weight, grad, *options)
    return dlogits.unflatten(0, (info.batch_size, -1)), 0


def _vmap_argmax(info: Any, in_dims: Sequence[int | None], logits: Tensor, *options: Any) -> Any:
    indices = torch.ops.annnet.upsampled_argmax(_fold(info, logits, in_dims[0]), *options)
    return indices.unflatten(0, (info.batch_size, -1)), 0


_PER_VALUE = 8
"""FLOP of one upsampled logit, or of its gradient on the way back: a multiply-add for each of the four corners."""


def _flops(
    logits_shape: Sequence[int],
    target_shape: Sequence[int],
    weight_shape: Sequence[int] | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    per_pixel: bool,
    gradient: bool,
    *_: Any,
    **__: Any,
) -> int:
    return (2 if gradient else 1) * _PER_VALUE * logits_shape[1] * prod(target_shape)


def _flops_bwd(logits_shape: Sequence[int], target_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * _PER_VALUE * logits_shape[1] * prod(target_shape)


def _flops_argmax(logits_shape: Sequence[int], size: Sequence[int], *_: Any, **__: Any) -> int:
    return _PER_VALUE * prod(logits_shape[:2]) * prod(size)


# losses (B, H, W) if per_pixel, else (0,); sums (B, 2): of the losses and of the labels' weights; unit_gradient
# (B, K, h, w) if gradient, else (0,): that of the sum of the losses. All float32, float64 for float64 logits.
_route = register(
    "upsampled_cross_entropy(Tensor logits, Tensor target, Tensor? weight, int ignore_index, float label_smoothing,"
    " bool align_corners, bool per_pixel, bool gradient) -> (Tensor losses, Tensor sums, Tensor unit_gradient)",
    allocate=_allocate,
    reference=reference.upsampled_cross_entropy_out,
    triton_module="upsampled_cross_entropy",
    vmap=_vmap,
    flops=_flops,
)
# grad (B, H, W) is that of the losses.
_route_bwd = register(
    "upsampled_cross_entropy_bwd(Tensor logits, Tensor target, Tensor? weight, Tensor grad, int ignore_index,"
    " float label_smoothing, bool align_corners, str? backend) -> Tensor",
    allocate=_allocate_bwd,
    reference=reference.upsampled_cross_entropy_bwd_out,
    triton_module="upsampled_cross_entropy",
    vmap=_vmap_bwd,
    flops=_flops_bwd,
)
_route_argmax = register(
    "upsampled_argmax(Tensor logits, SymInt[] size, bool align_corners) -> Tensor",
    allocate=_allocate_argmax,
    reference=reference.upsampled_argmax_out,
    triton_module="upsampled_cross_entropy",
    vmap=_vmap_argmax,
    flops=_flops_argmax,
)


class UpsampledCrossEntropy(torch.autograd.Function):
    """Returns (losses, sums, unit_gradient), as the operator; reverse mode only, and only once.

    ``losses`` are differentiable if ``per_pixel``, else the first column of ``sums`` is.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        align_corners: bool,
        per_pixel: bool,
        gradient: bool,
        backend: str | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        losses, sums, unit_gradient = steps.upsampled_cross_entropy(
            logits, target, weight, ignore_index, label_smoothing, align_corners, per_pixel, gradient
        )
        return losses, sums, unit_gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        logits, target, weight, *ctx.options, ctx.per_pixel, ctx.gradient, ctx.backend = inputs
        losses, sums, unit_gradient = output
        ctx.mark_non_differentiable(unit_gradient, sums if ctx.per_pixel else losses)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, weight, unit_gradient)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor | None, grad_sums: Tensor | None, _: None) -> Any:
        nothing = (None,) * 8  # target, weight, options, backend
        upstream = grad_losses if ctx.per_pixel else grad_sums
        if upstream is None or not ctx.needs_input_grad[0]:
            return None, *nothing
        logits, target, weight, unit_gradient = ctx.saved_tensors
        made = unit_gradient if ctx.gradient and not ctx.per_pixel else None
        dlogits = apply(
            UpsampledCrossEntropyBackward, upstream, made, logits, target, weight, *ctx.options, ctx.backend
        )
        return dlogits, *nothing


class UpsampledCrossEntropyBackward(torch.autograd.Function):
    """The gradient of the logits; differentiating it once more is refused.

    ``upstream`` is the gradient of ``losses`` (B, H, W) or of ``sums`` (B, 2); for the latter there may be a
    ``unit_gradient`` already.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        upstream: Tensor,
        unit_gradient: Tensor | None,
        logits: Tensor,
        target: Tensor,
        weight: Tensor | None,
        ignore_index: int,
        label_smoothing: float,
        align_corners: bool,
        backend: str | None,
    ) -> Tensor:
        if upstream.dim() == 2:
            upstream = upstream[:, 0, None, None]
        if unit_gradient is not None:
            return (unit_gradient * upstream[:, None]).to(logits.dtype)
        dlogits: Tensor = steps.upsampled_cross_entropy_bwd(
            logits, target, weight, upstream.expand(target.shape), ignore_index, label_smoothing, align_corners, backend
        )
        return dlogits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise NotImplementedError("upsampled_cross_entropy: second derivatives are not implemented")


@_route
def _differentiable(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    losses, sums, unit_gradient = UpsampledCrossEntropy.apply(*arguments, requested_backend())
    return losses, sums, unit_gradient


@_route_bwd
def _differentiable_bwd(logits: Tensor, target: Tensor, weight: Tensor | None, grad: Tensor, *options: Any) -> Tensor:
    dlogits: Tensor = UpsampledCrossEntropyBackward.apply(grad, None, logits, target, weight, *options)
    return dlogits
