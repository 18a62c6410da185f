"""The prologue operators in plain PyTorch: they write the rectified map z that the kernels never write."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch_norm import batch_norm_apply_out, batch_norm_bwd_input_out, batch_norm_bwd_sums_out
from .operators import asymmetric_attention_bwd_out, asymmetric_attention_out, pyramid_pool_bwd_out, pyramid_pool_out


def rectified(y: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """z = relu((y − mean) · invstd · weight + bias), in the dtype of the vectors."""
    z = torch.empty_like(y, dtype=mean.dtype)
    batch_norm_apply_out(y, mean, invstd, weight, bias, None, True, z)
    return z


def pyramid_pool_bn_relu_out(
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    tokens: Tensor,
) -> None:
    pyramid_pool_out(rectified(y, mean, invstd, weight, bias), heights, widths, tokens)


def _gradient_of_rectified(
    grad_tokens: Tensor | None,
    grad_map: Tensor | None,
    like: Tensor,
    dtype: torch.dtype,
    heights: Sequence[int],
    widths: Sequence[int],
) -> Tensor:
    """What the pooling and the other readers of z hand back to it."""
    total = torch.zeros_like(like, dtype=dtype)
    if grad_tokens is not None:
        pyramid_pool_bwd_out(grad_tokens.to(dtype), like.shape[2:], heights, widths, False, total)
    return total if grad_map is None else total + grad_map


def bn_relu_bwd_sums_out(
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    grad_tokens: Tensor | None,
    grad_map: Tensor | None,
    heights: Sequence[int],
    widths: Sequence[int],
    sums: Tensor,
) -> None:
    grad = _gradient_of_rectified(grad_tokens, grad_map, y, mean.dtype, heights, widths)
    batch_norm_bwd_sums_out(grad, y, mean, invstd, weight, bias, None, True, sums)


def bn_relu_bwd_input_out(
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    grad_tokens: Tensor | None,
    grad_map: Tensor | None,
    mean_sums: Tensor | None,
    heights: Sequence[int],
    widths: Sequence[int],
    dy: Tensor,
) -> None:
    grad = _gradient_of_rectified(grad_tokens, grad_map, y, mean.dtype, heights, widths)
    batch_norm_bwd_input_out(grad, y, mean, invstd, weight, bias, None, True, mean_sums, dy)


def asymmetric_attention_bn_relu_out(
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    key: Tensor,
    value: Tensor,
    addend: Tensor | None,
    scale: float,
    out: Tensor,
    logsumexp: Tensor,
) -> None:
    query = rectified(y, mean, invstd, weight, bias)
    context = torch.empty_like(out, dtype=query.dtype)
    asymmetric_attention_out(query, key.to(query.dtype), value.to(query.dtype), scale, context, logsumexp)
    out.copy_(context if addend is None else context + addend)


def asymmetric_attention_bn_relu_bwd_out(
    grad_out: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    scale: float,
    needs: Sequence[bool],
    dz: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
) -> None:
    query = rectified(y, mean, invstd, weight, bias)
    tokens = (key.to(query.dtype), value.to(query.dtype))
    asymmetric_attention_bwd_out(grad_out, query, *tokens, logsumexp, scale, needs, dz, dkey, dvalue)
