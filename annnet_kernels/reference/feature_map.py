"""The gradient of a feature map with a norm in plain PyTorch: it writes the gradient of the finished map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .batch_norm import batch_norm_bwd_input_out, batch_norm_bwd_sums_out
from .operators import pyramid_pool_bwd_out


def bn_relu_bwd_sums_out(
    y: Tensor,
    norm: Tensor,
    grad_tokens: Tensor | None,
    grad_map: Tensor | None,
    heights: Sequence[int],
    widths: Sequence[int],
    sums: Tensor,
) -> None:
    grad = _gradient_of_finished(y, norm, grad_tokens, grad_map, heights, widths)
    batch_norm_bwd_sums_out(grad, y, norm, None, True, sums)


def bn_relu_bwd_input_out(
    y: Tensor,
    norm: Tensor,
    grad_tokens: Tensor | None,
    grad_map: Tensor | None,
    sums: Tensor | None,
    count: int,
    heights: Sequence[int],
    widths: Sequence[int],
    dy: Tensor,
) -> None:
    grad = _gradient_of_finished(y, norm, grad_tokens, grad_map, heights, widths)
    batch_norm_bwd_input_out(grad, y, norm, None, True, sums, count, dy)


def _gradient_of_finished(
    y: Tensor,
    norm: Tensor,
    grad_tokens: Tensor | None,
    grad_map: Tensor | None,
    heights: Sequence[int],
    widths: Sequence[int],
) -> Tensor:
    """What the pooling and the other readers hand back."""
    total = torch.zeros_like(y, dtype=norm.dtype)
    if grad_tokens is not None:
        pyramid_pool_bwd_out(grad_tokens.to(norm.dtype), None, y.shape[2:], heights, widths, False, total)
    return total if grad_map is None else total + grad_map
