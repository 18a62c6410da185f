"""annnet::bn_relu_bwd_*: the gradient of a feature map with a norm, from what its readers hand back.

With ŷ = (y − mean) · invstd and z = relu(weight · ŷ + bias), the readers of z are the pooling (whose gradient comes as
``grad_tokens``) and the attention (``grad_map``); either may be absent:

    g = [z lets pass] · (grad_map + P · grad_tokens)    dy = weight · invstd · (g − Σg / n − ŷ · Σ(g·ŷ) / n)

They are steps of the blocks' own autograd Functions and have none themselves. Sums and the table (4, C) of mean,
invstd, weight and bias are float32, float64 for float64 maps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layouts import empty_map, is_channels_last
from ..reference import feature_map as reference
from .registration import register


def _allocate_sums(y: Tensor, *_: Any) -> Tensor:
    return y.new_empty((2, y.shape[1]), dtype=torch.promote_types(y.dtype, torch.float32))


def _allocate_input(y: Tensor, *_: Any) -> Tensor:
    batch, channels, height, width = y.shape
    return empty_map(y, (batch, channels, height, width), is_channels_last(y))


# (2, C): Σ g and Σ g·ŷ, the gradients of bias and weight.
register(
    "bn_relu_bwd_sums(Tensor y, Tensor norm, Tensor? grad_tokens, Tensor? grad_map, int[] heights, int[] widths,"
    " str? backend) -> Tensor",
    allocate=_allocate_sums,
    reference=reference.bn_relu_bwd_sums_out,
    triton_module="bn_relu_pool",
)
# sums (2, C) are those above, of all maps that share statistics; count is the number of their pixels. Without sums
# the statistics are frozen.
register(
    "bn_relu_bwd_input(Tensor y, Tensor norm, Tensor? grad_tokens, Tensor? grad_map, Tensor? sums, SymInt count,"
    " int[] heights, int[] widths, str? backend) -> Tensor",
    allocate=_allocate_input,
    reference=reference.bn_relu_bwd_input_out,
    triton_module="bn_relu_pool",
)
