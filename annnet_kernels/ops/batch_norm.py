"""annnet::batch_norm_*: the norm of a feature map as a table, and the tail of the blocks, which applies one.

A table (4, C) holds mean, invstd, weight and bias. With ŷ = (y − mean) · invstd over batch and pixels,
z = weight · ŷ + bias and a factor s[b, c] of the dropout, the tail (BatchNorm, optional ReLU, Dropout2d) is

    out = s · act(z)    g = s · [act lets z pass] · grad_out    dy = weight · invstd · (g − Σg / n − ŷ · Σ(g·ŷ) / n)

They are steps of the blocks' own autograd Functions and have none themselves. What is kept for the backward pass is y
and s: the output and the mask of the ReLU are made again. Tables, sums and factors are float32, float64 for float64
maps; moments are float64 always, since several processes add them up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..layouts import empty_map, is_channels_last
from ..reference import batch_norm as reference
from .registration import register


def _allocate_moments(y: Tensor) -> Tensor:
    return y.new_empty((3, y.shape[1]), dtype=torch.float64)


def _allocate_table(y: Tensor, *_: Any) -> Tensor:
    return y.new_empty((4, y.shape[1]), dtype=torch.promote_types(y.dtype, torch.float32))


def _allocate_map(y: Tensor, *_: Any) -> Tensor:
    batch, channels, height, width = y.shape
    return empty_map(y, (batch, channels, height, width), is_channels_last(y))


def _allocate_bwd_sums(grad_out: Tensor, y: Tensor, *_: Any) -> Tensor:
    return y.new_empty((2, y.shape[1]), dtype=torch.promote_types(y.dtype, torch.float32))


def _allocate_bwd_input(grad_out: Tensor, y: Tensor, *_: Any) -> Tensor:
    return _allocate_map(y)


# (3, C) over batch and pixels: how many values there are, their mean, and Σ (y − mean)²; zeros where there are none.
register(
    "batch_norm_moments(Tensor y) -> Tensor",
    allocate=_allocate_moments,
    reference=reference.batch_norm_moments_out,
    triton_module="batch_norm",
)
# The table of given statistics (C); y gives shape and dtype and is not read. ``conv_bias`` (C) is what the convolution
# ahead left out of y.
register(
    "batch_norm_table(Tensor y, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, Tensor? conv_bias, float eps)"
    " -> Tensor",
    allocate=_allocate_table,
    reference=reference.batch_norm_table_out,
    triton_module="batch_norm",
)
# The table of batch statistics: of y, or of the moments (3, C) of all the maps that share them. Running statistics and
# count, where they are given, become those of ``calls`` calls of a norm; without a momentum they average over the
# count. ``conv_bias`` (C) is what the convolution ahead left out of y: it enters the running mean alone.
register(
    "batch_norm_update(Tensor y, Tensor? moments, Tensor? weight, Tensor? bias, Tensor? conv_bias,"
    " Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? count, float eps, float? momentum, int calls)"
    " -> Tensor",
    allocate=_allocate_table,
    reference=reference.batch_norm_update_out,
    triton_module="batch_norm",
)
# channel_scale is (B, C). The output has the layout of y.
register(
    "batch_norm_apply(Tensor y, Tensor norm, Tensor? channel_scale, bool relu) -> Tensor",
    allocate=_allocate_map,
    reference=reference.batch_norm_apply_out,
    triton_module="batch_norm",
)
# y is dense, NCHW or channels_last.
register(
    "batch_norm_apply_(Tensor(a!) y, Tensor norm, Tensor? channel_scale, bool relu) -> ()",
    allocate=lambda *_: None,
    reference=reference.batch_norm_apply_out,
    triton_module="batch_norm",
    written=0,
)
# (2, C): Σ g and Σ g·ŷ, the gradients of bias and weight.
register(
    "batch_norm_bwd_sums(Tensor grad_out, Tensor y, Tensor norm, Tensor? channel_scale, bool relu, str? backend)"
    " -> Tensor",
    allocate=_allocate_bwd_sums,
    reference=reference.batch_norm_bwd_sums_out,
    triton_module="batch_norm",
)
# sums (2, C) are those above, of all maps that share statistics; count is the number of their pixels. Without sums
# the statistics are frozen.
register(
    "batch_norm_bwd_input(Tensor grad_out, Tensor y, Tensor norm, Tensor? channel_scale, bool relu,"
    " Tensor? sums, SymInt count, str? backend) -> Tensor",
    allocate=_allocate_bwd_input,
    reference=reference.batch_norm_bwd_input_out,
    triton_module="batch_norm",
)
