"""The public operators: check the arguments, resolve the defaults, call the operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from . import checks, onnx, pyramid
from .ops import AsymmetricAttention, PyramidPool
from .ops.functions import apply
from .runtime.autocast import autocast_dtype, no_autocast
from .runtime.backends import requested_backend

PoolSizes = Sequence[int | tuple[int, int]]

_default_sizes = checks.output_sizes("output_sizes", pyramid.POOL_SIZES)


def pyramid_pool(x: Tensor, output_sizes: PoolSizes = pyramid.POOL_SIZES) -> Tensor:
    """Average-pool a feature map to every level of a pyramid in one pass.

    Level ``s`` is ``AdaptiveAvgPool2d(s)``, its bins in row-major order; the levels follow each other, T = Σ s².
    Sums are float32 (float64 for float64) and rounded once. Bitwise deterministic; twice differentiable.
    Under autocast the map keeps its dtype.

    Args:
        x: feature map (B, C, H, W), float32, float64, bfloat16 or float16, in any strides (nothing is copied).
        output_sizes: pool sizes, integers or (h, w) pairs.

    Returns:
        Tokens (B, C, T) of the dtype of ``x``, token-major in memory: strides (T·C, 1, C).

    Raises:
        TypeError: ``x`` is no floating-point tensor, or a pool size no integer.
        ValueError: ``x`` is not 4-D or has no pixel or channel; ``output_sizes`` is empty or has a size below 1.
        RuntimeError: a requested backend cannot run.

    Source: pyramid pooling of the asymmetric blocks, Zhu et al. 2019, arXiv 1908.07678, section 3.2.

    Example:
        >>> import torch, annnet_kernels as ak
        >>> ak.pyramid_pool(torch.randn(2, 64, 97, 97)).shape
        torch.Size([2, 64, 110])
    """
    checks.feature_map("x", x)
    default = output_sizes is pyramid.POOL_SIZES  # needs no check, which costs 40 µs where nothing is in a cache
    heights, widths = _default_sizes if default else checks.output_sizes("output_sizes", output_sizes)
    if onnx.exporting():
        return onnx.pyramid_pool(x, heights, widths)
    tokens: Tensor = apply(PyramidPool, x, list(heights), list(widths), requested_backend())
    return tokens


def token_regions(output_sizes: PoolSizes, map_size: tuple[int, int]) -> list[pyramid.TokenRegion]:
    """Which rectangle of the map each token of :func:`pyramid_pool` stands for.

    Args:
        output_sizes: pool sizes, integers or (h, w) pairs.
        map_size: (H, W) of the pooled map, in pixels.

    Returns:
        One ``TokenRegion(top, bottom, left, right)`` per token, half-open, in token order.

    Raises:
        TypeError, ValueError: a size is no integer of at least 1.
    """
    heights, widths = checks.output_sizes("output_sizes", output_sizes)
    return pyramid.regions(heights, widths, *checks.map_size("map_size", map_size))


@overload
def asymmetric_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, *, return_attention: Literal[False] = False
) -> Tensor: ...


@overload
def asymmetric_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, *, return_attention: Literal[True]
) -> tuple[Tensor, Tensor]: ...


def asymmetric_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, *, return_attention: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every pixel of a map over T pooled tokens: softmax(scale · QKᵀ) V, fused.

    No N × T matrix is written, and the map is neither permuted nor copied. Logits and softmax are float32 (float64
    for float64). Bitwise deterministic; differentiable once. Under autocast the three operands are cast to the
    autocast dtype, as matrix products are.

    Args:
        query: (B, Ck, H, W), float32, float64, bfloat16 or float16, in any strides.
        key: (B, Ck, T), same dtype and device, T ≥ 1.
        value: (B, Cv, T), same dtype and device.
        scale: factor of the logits; None means Ck^-0.5.
        return_attention: whether to return the attention as well, for inspection; that writes the N × T matrix.

    Returns:
        (B, Cv, H, W) of the dtype of ``query``, channels_last if ``query`` is, else contiguous. With
        ``return_attention`` a pair of it and the attention (B, N, T), N = H·W in row-major order, not differentiable,
        float32 (float64 for float64); :func:`token_regions` tells which rectangle each token stands for.

    Raises:
        TypeError: an operand is no floating-point tensor, dtypes differ, or ``scale`` is no number.
        ValueError: a rank, channel count, batch, token count or device does not fit; ``scale`` is not finite.
        RuntimeError: a requested backend cannot run.

    Source: asymmetric non-local attention, Zhu et al. 2019, arXiv 1908.07678, equations 5 to 7.

    Example:
        >>> import torch, annnet_kernels as ak
        >>> query, tokens = torch.randn(2, 64, 33, 40), torch.randn(2, 64, 110)
        >>> ak.asymmetric_attention(query, tokens, tokens).shape
        torch.Size([2, 64, 33, 40])
    """
    checks.feature_map("query", query)
    checks.tokens("key", key, batch=query.shape[0], channels=query.shape[1], count=None)
    checks.tokens("value", value, batch=query.shape[0], channels=None, count=key.shape[2])
    query, key, value = _autocast(query, key, value)
    checks.same_kind("key", key, "query", query)
    checks.same_kind("value", value, "query", query)
    factor = query.shape[1] ** -0.5 if scale is None else checks.scale("scale", scale)
    if not isinstance(return_attention, bool):
        raise TypeError(f"return_attention: expected a bool, got {return_attention!r}")
    out: Tensor
    if onnx.exporting():
        out, attention = onnx.asymmetric_attention(query, key, value, factor)
        return (out, attention.transpose(1, 2)) if return_attention else out
    if value is key:  # torch.compile traces no Function that gets one tensor twice
        value = value.view_as(value)
    out, logsumexp = apply(AsymmetricAttention, query, key, value, factor, requested_backend())
    return (out, _attention(query, key, factor, logsumexp)) if return_attention else out


@torch.no_grad()
def _attention(query: Tensor, key: Tensor, scale: float, logsumexp: Tensor) -> Tensor:
    """The attention (B, N, T) that the operator used and did not write."""
    with no_autocast(query.device.type):
        logits = torch.bmm(query.flatten(2).transpose(1, 2).to(logsumexp.dtype), key.to(logsumexp.dtype)) * scale
    return (logits - logsumexp[:, :, None]).exp_()


def _autocast(*operands: Tensor) -> tuple[Tensor, ...]:
    """The operands in the autocast dtype where autocast is on; float64 stays, as in PyTorch's own operators."""
    dtype = autocast_dtype(operands[0])
    if dtype is None:
        return operands
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in operands)
