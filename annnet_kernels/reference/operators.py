"""The two operators in plain PyTorch: the implementation of last resort, on any device and in any precision.

Each ``*_out`` fills outputs allocated by the operator and has its signature; the gradients are written out. Where a map
comes with a norm, they write the finished map that the kernels never write.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pyramid import bin_edges
from .batch_norm import batch_norm_moments_out, finished


def pyramid_pool(x: Tensor, heights: Sequence[int], widths: Sequence[int]) -> Tensor:
    """(B, C, H, W) → (B, C, T): one adaptive average pooling per level, concatenated."""
    levels = zip(heights, widths, strict=True)
    return torch.cat([F.adaptive_avg_pool2d(x, size).flatten(2) for size in levels], dim=2)


def asymmetric_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(B, Ck, H, W), (B, Ck, T), (B, Cv, T) → output (B, Cv, H, W), logsumexp (B, N), attention (B, N, T).

    Logits and softmax are float32 (float64 for float64); the products are made in the dtype of the inputs.
    """
    attention, logsumexp = _probabilities(query, key, scale)
    context = torch.bmm(value, attention.to(value.dtype).transpose(1, 2))
    return context.unflatten(2, query.shape[2:]), logsumexp, attention


def _probabilities(query: Tensor, key: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    statistics = torch.float64 if query.dtype == torch.float64 else torch.float32
    logits = torch.bmm(query.flatten(2).transpose(1, 2).to(statistics), key.to(statistics)) * scale
    return logits.softmax(dim=2), logits.logsumexp(dim=2)


def pyramid_pool_out(
    x: Tensor, norm: Tensor | None, heights: Sequence[int], widths: Sequence[int], pooled: Tensor
) -> None:
    pooled.copy_(pyramid_pool(finished(x, norm), heights, widths))


def pyramid_pool_bwd_out(
    grad: Tensor,
    addend: Tensor | None,
    map_size: Sequence[int],
    heights: Sequence[int],
    widths: Sequence[int],
    channels_last: bool,
    dx: Tensor,
) -> None:
    """Adds every bin's share to the pixels it holds, columns first, then rows; PyTorch's own is not deterministic."""
    height, width = map_size
    accumulator = torch.promote_types(grad.dtype, torch.float32)
    total = torch.zeros_like(dx, dtype=accumulator)
    first = 0
    for rows, columns in zip(heights, widths, strict=True):
        level = grad[:, :, first : first + rows * columns].to(accumulator).unflatten(2, (rows, columns))
        first += rows * columns
        spread = level.new_zeros((*level.shape[:3], width))
        for j, (left, right) in enumerate(bin_edges(width, columns)):
            spread[:, :, :, left:right] += level[:, :, :, j : j + 1] / (right - left)
        for i, (top, bottom) in enumerate(bin_edges(height, rows)):
            total[:, :, top:bottom] += spread[:, :, i : i + 1] / (bottom - top)
    dx.copy_(total if addend is None else total + addend)


def accumulator_of(*dtypes: torch.dtype) -> torch.dtype:
    """float32, or float64 where one of the operands is."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def matrix_of(factors: Sequence[Tensor], number: int) -> Tensor:
    """A factor by its number as a matrix, or the transpose of the one whose number is ``~number``."""
    return as_matrix(factors[number]) if number >= 0 else as_matrix(factors[~number]).t()


def as_matrix(x: Tensor) -> Tensor:
    """A row per token of tokens (B, C, T), the two channel dimensions of a weight (C_out, C_in, 1, 1), or a matrix."""
    if x.dim() == 3:
        return x.transpose(1, 2).reshape(-1, x.shape[1])
    return x.view(x.shape[:2]) if x.dim() == 4 else x


def matrix_products_out(
    factors: Sequence[Tensor],
    left: Sequence[int],
    right: Sequence[int],
    like: Sequence[int],
    *products: Tensor,
) -> None:
    known = [*factors, *products]
    for i, j, product in zip(left, right, products, strict=True):
        a, b = matrix_of(known, i), matrix_of(known, j)
        wide = accumulator_of(a.dtype, b.dtype)
        result = torch.mm(a.to(wide), b.to(wide))
        if product.dim() == 3:  # the rows of tokens may lie in any order
            result = result.view(product.shape[0], product.shape[2], product.shape[1]).transpose(1, 2)
        product.copy_(result.view(product.shape) if product.dim() == 4 else result)


def asymmetric_attention_out(
    query: Tensor,
    norm: Tensor | None,
    key: Tensor,
    value: Tensor,
    skip: Tensor | None,
    constant: Tensor | None,
    scale: float,
    statistics: bool,
    out: Tensor,
    logsumexp: Tensor,
    moments: Tensor,
) -> None:
    query = finished(query, norm)
    context, row_statistics, _ = asymmetric_attention(query, key.to(query.dtype), value.to(query.dtype), scale)
    if skip is not None:
        context = context + skip
    if constant is not None:
        context = context + constant[:, None, None]
    out.copy_(context)
    logsumexp.copy_(row_statistics)
    if statistics:
        batch_norm_moments_out(out, moments)


def asymmetric_attention_bwd_out(
    grad_out: Tensor,
    query: Tensor,
    norm: Tensor | None,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    scale: float,
    needs: Sequence[bool],
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
) -> None:
    """dV = Gᵀ A; dS = A ∘ (dA − rowsum(A ∘ dA)) with dA = G V; dQ = scale · dS K; dK = scale · Qᵀ dS."""
    query = finished(query, norm)
    attention, _ = _probabilities(query, key, scale)
    gradient = grad_out.flatten(2).to(attention.dtype)
    if needs[2]:
        dvalue.copy_(torch.bmm(gradient, attention))
    if needs[0] or needs[1]:
        dattention = torch.bmm(gradient.transpose(1, 2), value.to(attention.dtype))
        dlogits = attention * (dattention - (attention * dattention).sum(dim=2, keepdim=True)) * scale
        if needs[0]:
            dquery.copy_(torch.bmm(key.to(dlogits.dtype), dlogits.transpose(1, 2)).unflatten(2, query.shape[2:]))
        if needs[1]:
            dkey.copy_(torch.bmm(query.flatten(2).to(dlogits.dtype), dlogits))
