"""annnet::batch_norm_*: the normalising tail of the blocks (BatchNorm, optional ReLU, Dropout2d) in four steps.

With ŷ = (y − mean) · invstd over batch and pixels, z = weight · ŷ + bias and a factor s[b, c] of the dropout:

    out = s · act(z)    g = s · [act lets z pass] · grad_out    dy = weight · invstd · (g − Σg / n − ŷ · Σ(g·ŷ) / n)

They are steps of the blocks' own autograd Functions and have none themselves. What is kept for the backward pass is y
and s: the output and the mask of the ReLU are made again. All vectors are float32, float64 for float64 maps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layouts import empty_map, is_channels_last
from ..reference import batch_norm as reference
from .registration import register


def _allocate_sums(y: Tensor, *_: Any) -> Tensor:
    return y.new_empty((2, y.shape[1]), dtype=torch.promote_types(y.dtype, torch.float32))


def _allocate_map(y: Tensor, *_: Any) -> Tensor:
    batch, channels, height, width = y.shape
    return empty_map(y, (batch, channels, height, width), is_channels_last(y))


def _allocate_bwd_sums(grad_out: Tensor, y: Tensor, *_: Any) -> Tensor:
    return _allocate_sums(y)


def _allocate_bwd_input(grad_out: Tensor, y: Tensor, *_: Any) -> Tensor:
    return _allocate_map(y)


# (2, C): mean and biased variance over batch and pixels; NaN where there are none.
register(
    "batch_norm_statistics(Tensor y) -> Tensor",
    allocate=_allocate_sums,
    reference=reference.batch_norm_statistics_out,
    triton_module="batch_norm",
)
# channel_scale is (B, C). The output has the layout of y.
register(
    "batch_norm_apply(Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, Tensor? channel_scale,"
    " bool relu) -> Tensor",
    allocate=_allocate_map,
    reference=reference.batch_norm_apply_out,
    triton_module="batch_norm",
)
# y is dense, NCHW or channels_last.
register(
    "batch_norm_apply_(Tensor(a!) y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, Tensor? channel_scale,"
    " bool relu) -> ()",
    allocate=lambda *_: None,
    reference=reference.batch_norm_apply_out,
    triton_module="batch_norm",
    written=0,
)
# (2, C): Σ g and Σ g·ŷ, the gradients of bias and weight.
register(
    "batch_norm_bwd_sums(Tensor grad_out, Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias,"
    " Tensor? channel_scale, bool relu, str? backend) -> Tensor",
    allocate=_allocate_bwd_sums,
    reference=reference.batch_norm_bwd_sums_out,
    triton_module="batch_norm",
)
# mean_sums is the sums (2, C) divided by the number of pixels; None where the statistics are frozen.
register(
    "batch_norm_bwd_input(Tensor grad_out, Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias,"
    " Tensor? channel_scale, bool relu, Tensor? mean_sums, str? backend) -> Tensor",
    allocate=_allocate_bwd_input,
    reference=reference.batch_norm_bwd_input_out,
    triton_module="batch_norm",
)
