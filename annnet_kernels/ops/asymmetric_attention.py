"""annnet::asymmetric_attention: every pixel of a map asks T tokens, and what it asks with may come with a norm.

    out = softmax(scale · QKᵀ) V + skip + constant

The query Q is the map itself or, with ``norm``, relu((query − mean) · invstd · weight + bias), which is never written.
``skip`` is a map (B, Cv, H, W), ``constant`` a vector (Cv); the in-place operator writes the sum into ``skip``. With
``statistics`` the moments of ``out`` come back as ``batch_norm_moments`` makes them, else nothing does.

Only the attention of plain maps, without skip and constant, has a derivative here: everything else is a step of the
blocks' own autograd Functions. The backward operator then returns the gradient of Q, which ``bn_relu_bwd_sums`` and
``bn_relu_bwd_input`` carry on to the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..kernels.launch import product_precision
from ..layouts import empty_map, empty_tokens, is_channels_last
from ..runtime.backends import requested_backend
from .functions import apply
from .registration import register, shared_by_maps, steps


def _allocate(
    query: Tensor,
    norm: Tensor | None,
    key: Tensor,
    value: Tensor,
    skip: Tensor | None,
    constant: Tensor | None,
    scale: float,
    statistics: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, height, width = query.shape
    out = empty_map(query, (batch, value.shape[1], height, width), is_channels_last(query))
    return out, *_allocate_beside(query, norm, key, value, skip, constant, scale, statistics)


def _allocate_beside(
    query: Tensor,
    norm: Tensor | None,
    key: Tensor,
    value: Tensor,
    skip: Tensor | None,
    constant: Tensor | None,
    scale: float,
    statistics: bool,
) -> tuple[Tensor, Tensor]:
    """Logsumexp and moments."""
    accumulator = torch.promote_types(query.dtype, torch.float32)
    logsumexp = query.new_empty((query.shape[0], query.shape[2] * query.shape[3]), dtype=accumulator)
    return logsumexp, query.new_empty((3, value.shape[1]) if statistics else (0,), dtype=torch.float64)


def _allocate_bwd(
    grad_out: Tensor,
    query: Tensor,
    norm: Tensor | None,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    scale: float,
    needs: Sequence[bool],
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = query.shape
    nothing = (0,)
    dquery = empty_map(query, (batch, channels, height, width), is_channels_last(query)) if needs[0] else None
    dkey = empty_tokens(key, *key.shape) if needs[1] else None
    dvalue = empty_tokens(value, *value.shape) if needs[2] else None
    return tuple(grad if grad is not None else query.new_empty(nothing) for grad in (dquery, dkey, dvalue))  # type: ignore[return-value]


def _fold(info: Any, in_dims: Sequence[int | None], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Give every tensor the vmapped dimension, then fold it into the batch."""
    folded = []
    for tensor, dim in zip(tensors, in_dims, strict=True):
        batched = tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        folded.append(batched.flatten(0, 1))
    return folded


def _unfold(info: Any, outputs: Sequence[Tensor]) -> Any:
    size: int = info.batch_size
    unfolded = tuple(out.unflatten(0, (size, -1)) if out.dim() > 1 else out.expand(size, 0) for out in outputs)
    return unfolded, (0,) * len(unfolded)


def _vmap(
    info: Any, in_dims: Sequence[int | None], query: Tensor, norm: Any, key: Tensor, value: Tensor, *others: Any
) -> Any:
    skip, constant, scale, statistics = others
    shared_by_maps("asymmetric_attention", norm=in_dims[1], constant=in_dims[5])
    if statistics:
        raise NotImplementedError("torch.ops.annnet.asymmetric_attention: torch.vmap serves no statistics")
    query, key, value = _fold(info, (in_dims[0], *in_dims[2:4]), (query, key, value))
    (skip,) = (None,) if skip is None else _fold(info, in_dims[4:5], (skip,))
    folded = query, norm, key, value, skip, constant, scale, False
    return _unfold(info, torch.ops.annnet.asymmetric_attention(*folded))


def _vmap_bwd(
    info: Any,
    in_dims: Sequence[int | None],
    grad_out: Tensor,
    query: Tensor,
    norm: Tensor | None,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    *constants: Any,
) -> Any:
    shared_by_maps("asymmetric_attention_bwd", norm=in_dims[2])
    dims = *in_dims[:2], *in_dims[3:6]
    grad_out, query, *tokens = _fold(info, dims, (grad_out, query, key, value, logsumexp))
    return _unfold(info, torch.ops.annnet.asymmetric_attention_bwd(grad_out, query, norm, *tokens, *constants))


def _flops(
    query_shape: Sequence[int], norm: Any, key_shape: Sequence[int], value_shape: Sequence[int], *_: Any, **__: Any
) -> int:
    """QKᵀ and AV."""
    batch, height, width = query_shape[0], *query_shape[2:]
    return 2 * batch * height * width * key_shape[2] * (key_shape[1] + value_shape[1])


def _flops_bwd(
    grad_shape: Sequence[int],
    query_shape: Sequence[int],
    norm: Any,
    key_shape: Sequence[int],
    value_shape: Sequence[int],
    logsumexp_shape: Sequence[int],
    scale: float,
    needs: Sequence[bool],
    *_: Any,
    **__: Any,
) -> int:
    """QKᵀ again; dA = G Vᵀ for the query and the key; then one product per gradient that is asked for."""
    batch, height, width = query_shape[0], *query_shape[2:]
    pairs = 2 * batch * height * width * key_shape[2]
    key_width, value_width = key_shape[1], value_shape[1]
    logits_gradient = value_width if needs[0] or needs[1] else 0
    products: int = needs[0] * key_width + needs[1] * key_width + needs[2] * value_width
    return pairs * (key_width + logits_gradient + products)


_route = register(
    "asymmetric_attention(Tensor query, Tensor? norm, Tensor key, Tensor value, Tensor? skip, Tensor? constant,"
    " float scale, bool statistics) -> (Tensor out, Tensor logsumexp, Tensor moments)",
    allocate=_allocate,
    reference=reference.asymmetric_attention_out,
    triton_module="asymmetric_attention",
    vmap=_vmap,
    flops=_flops,
    setting=product_precision,
)
# skip is dense, NCHW or channels_last.
register(
    "asymmetric_attention_(Tensor query, Tensor? norm, Tensor key, Tensor value, Tensor(a!) skip, Tensor? constant,"
    " float scale, bool statistics) -> (Tensor logsumexp, Tensor moments)",
    allocate=_allocate_beside,
    reference=reference.asymmetric_attention_out,
    triton_module="asymmetric_attention",
    flops=_flops,
    setting=product_precision,
    written=4,
)
# needs: which of the three gradients are wanted; the others come back empty.
_route_bwd = register(
    "asymmetric_attention_bwd(Tensor grad_out, Tensor query, Tensor? norm, Tensor key, Tensor value,"
    " Tensor logsumexp, float scale, bool[] needs, str? backend) -> (Tensor dquery, Tensor dkey, Tensor dvalue)",
    allocate=_allocate_bwd,
    reference=reference.asymmetric_attention_bwd_out,
    triton_module="asymmetric_attention",
    vmap=_vmap_bwd,
    flops=_flops_bwd,
    setting=product_precision,
)


class AsymmetricAttention(torch.autograd.Function):
    """Returns (out, logsumexp); saves query, key, value and logsumexp. Reverse mode only, and only once."""

    generate_vmap_rule = True

    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor, scale: float, backend: str | None) -> tuple[Tensor, Tensor]:
        operands = query, None, key, value, None, None, scale, False
        out, logsumexp, _ = steps.asymmetric_attention(*operands)
        return out, logsumexp

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, ctx.scale, ctx.backend = inputs
        _, logsumexp = output
        ctx.mark_non_differentiable(logsumexp)
        ctx.set_materialize_grads(False)  # else zeros are made for logsumexp
        ctx.save_for_backward(query, key, value, logsumexp)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, _: None) -> Any:
        if grad_out is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = list(ctx.needs_input_grad[:3])
        gradients = apply(AsymmetricAttentionBackward, grad_out, *ctx.saved_tensors, ctx.scale, needs, ctx.backend)
        dquery, dkey, dvalue = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
        return dquery, dkey, dvalue, None, None  # scale, backend


class AsymmetricAttentionBackward(torch.autograd.Function):
    """Gradients of :class:`AsymmetricAttention`; differentiating them once more is refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        logsumexp: Tensor,
        scale: float,
        needs: list[bool],
        backend: str | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dquery, dkey, dvalue = steps.asymmetric_attention_bwd(
            grad_out, query, None, key, value, logsumexp, scale, needs, backend
        )
        return dquery, dkey, dvalue

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("asymmetric_attention: second derivatives are not implemented")


@_route
def _differentiable(
    query: Tensor,
    norm: Tensor | None,
    key: Tensor,
    value: Tensor,
    skip: Tensor | None,
    constant: Tensor | None,
    scale: float,
    statistics: bool,
) -> Any:
    if statistics or any(operand is not None for operand in (norm, skip, constant)):
        return NotImplemented
    out, logsumexp = AsymmetricAttention.apply(query, key, value, scale, requested_backend())
    return out, logsumexp, query.new_empty(0, dtype=torch.float64)


@_route_bwd
def _differentiable_bwd(
    grad_out: Tensor,
    query: Tensor,
    norm: Tensor | None,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    scale: float,
    needs: list[bool],
    backend: str | None,
) -> Any:
    if norm is not None:
        return NotImplemented
    dquery, dkey, dvalue = AsymmetricAttentionBackward.apply(
        grad_out, query, key, value, logsumexp, scale, needs, backend
    )
    return dquery, dkey, dvalue
