"""annnet::pyramid_pool_bn_relu and the backward of what reads a rectified map, which is never written.

With ŷ = (y − mean) · invstd and z = relu(weight · ŷ + bias), the readers of z are the pooling (whose gradient comes as
``grad_tokens``) and the attention (``grad_map``); either may be absent:

    g = [z lets pass] · (grad_map + P · grad_tokens)    dy = weight · invstd · (g − Σg / n − ŷ · Σ(g·ŷ) / n)

They are steps of the blocks' own autograd Functions and have none themselves. All vectors are float32, float64 for
float64 maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..layouts import empty_map, empty_tokens, is_channels_last
from ..pyramid import num_tokens
from ..reference import prologue as reference
from .registration import register


def _allocate(
    y: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, bias: Tensor, heights: Sequence[int], widths: Sequence[int]
) -> Tensor:
    return empty_tokens(y, y.shape[0], y.shape[1], num_tokens(heights, widths))


def _allocate_sums(y: Tensor, *_: Any) -> Tensor:
    return y.new_empty((2, y.shape[1]), dtype=torch.promote_types(y.dtype, torch.float32))


def _allocate_input(y: Tensor, *_: Any) -> Tensor:
    batch, channels, height, width = y.shape
    return empty_map(y, (batch, channels, height, width), is_channels_last(y))


def _flops(y_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """As the pooling: a kernel sums each pixel once."""
    return prod(y_shape)


register(
    "pyramid_pool_bn_relu(Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, int[] heights,"
    " int[] widths) -> Tensor",
    allocate=_allocate,
    reference=reference.pyramid_pool_bn_relu_out,
    triton_module="bn_relu_pool",
    flops=_flops,
)
# (2, C): Σ g and Σ g·ŷ, the gradients of bias and weight.
register(
    "bn_relu_bwd_sums(Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, Tensor? grad_tokens,"
    " Tensor? grad_map, int[] heights, int[] widths, str? backend) -> Tensor",
    allocate=_allocate_sums,
    reference=reference.bn_relu_bwd_sums_out,
    triton_module="bn_relu_pool",
)
# mean_sums is the sums (2, C) divided by the number of pixels; None where the statistics are frozen.
register(
    "bn_relu_bwd_input(Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, Tensor? grad_tokens,"
    " Tensor? grad_map, Tensor? mean_sums, int[] heights, int[] widths, str? backend) -> Tensor",
    allocate=_allocate_input,
    reference=reference.bn_relu_bwd_input_out,
    triton_module="bn_relu_pool",
)
