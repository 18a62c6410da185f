"""Triton kernels of the backward through z = relu(weight · ŷ + bias), ŷ = (y − mean) · invstd, without z in memory.

The gradient of z is what the tokens spread over the map, made on the way, and what other readers of z left in a map.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .operands import integer, load_norm
from .pool_spread_kernels import pass_edge, start_walk
from .pool_walk import (
    SIZES,
    first_rows,
    next_row,
    own_part,
    part_mask,
    part_offsets,
    part_origin,
    row_offset,
    store_row,
)

_POINTERS = ["y_ptr", "norm_ptr", "grad_ptr", "map_ptr", "sums_ptr", "out_ptr"]
_ROW_STRIDES = ["y_row_stride", "map_row_stride", "dy_row_stride"]


@triton.jit(do_not_specialize=[*SIZES, *_ROW_STRIDES], do_not_specialize_on_alignment=_POINTERS)
def bn_relu_bwd_kernel(
    y_ptr,
    norm_ptr,
    grad_ptr,
    map_ptr,
    sums_ptr,
    per_value,
    out_ptr,
    n_channels,
    height,
    width,
    tile_columns,
    split_rows,
    y_strides,
    y_row_stride: tl.int64,
    grad_strides,
    map_strides,
    map_row_stride: tl.int64,
    dy_strides,
    dy_row_stride: tl.int64,
    walk,
):
    """With g = [z lets pass] · (map + spread tokens): Σ g and Σ g·ŷ of a part, or dy = weight · invstd · (g − …).

    Grid: (B · ⌈C / walk.channels⌉ · splits · tiles,). norm is a table (4, C). Without ``dy_strides``
    out gets the sums of every part, (parts, 2, C). Otherwise it gets dy (B, C, H, W) =
    weight · invstd · (g − (sums[0] + ŷ · sums[1]) · per_value), with sums (2, C) if given.
    """
    batch, first_channel, own_rows, own_columns = own_part(n_channels, height, width, tile_columns, split_rows, walk)
    split, top, bottom = own_rows
    tile, left, right = own_columns
    channels = first_channel + tl.arange(0, walk.channels)
    columns = left + tl.arange(0, walk.columns)
    exists = channels < n_channels

    y_offsets = part_offsets(y_strides, walk)
    mask = part_mask(channels, columns, n_channels, right, walk)
    mean, invstd, weight, bias = load_norm(norm_ptr, n_channels, channels, 1)
    rows = bottom - top
    y_origin = y_ptr + part_origin(batch, first_channel, top, left, y_strides, walk)
    y_ahead = first_rows(y_origin, y_row_stride, y_offsets, mask, rows, walk)
    if map_ptr is not None:
        map_offsets = part_offsets(map_strides, walk)
        map_origin = map_ptr + part_origin(batch, first_channel, top, left, map_strides, walk)
        map_ahead = first_rows(map_origin, map_row_stride, map_offsets, mask, rows, walk)
    spread = tl.zeros((walk.channels, walk.columns), tl.float32)
    if grad_ptr is not None:
        grad = grad_ptr + batch * integer(grad_strides.batch)
        held, bins = start_walk(top, height, walk)
        edge = top
    if dy_strides is not None:
        dy_offsets = part_offsets(dy_strides, walk)
        dy_origin = out_ptr + part_origin(batch, first_channel, top, left, dy_strides, walk)
        scale = weight * invstd
        if sums_ptr is not None:
            mean_g = tl.load(sums_ptr + channels, mask=exists, other=0.0)[:, None] * per_value
            mean_gy = tl.load(sums_ptr + n_channels + channels, mask=exists, other=0.0)[:, None] * per_value
    else:
        sum_g = tl.zeros((walk.channels, walk.columns), tl.float32)
        sum_gy = tl.zeros((walk.channels, walk.columns), tl.float32)

    for r in tl.range(top, bottom, num_stages=walk.stages):
        k = r - top
        values, y_ahead = next_row(y_ahead, y_origin, y_row_stride, y_offsets, mask, k, rows, walk)
        if grad_ptr is not None:  # noqa: SIM102 Triton compiles both operands of "and"
            if r == edge:
                spread, edge, held, bins = pass_edge(
                    held, bins, r, grad, grad_strides, channels, columns, n_channels, height, width, left, right, walk,
                )  # fmt: skip
        gradient = spread
        if map_ptr is not None:
            others, map_ahead = next_row(map_ahead, map_origin, map_row_stride, map_offsets, mask, k, rows, walk)
            gradient += others
        normal = (values - mean) * invstd
        gradient = tl.where(normal * weight + bias <= 0.0, 0.0, gradient)
        if dy_strides is not None:
            if sums_ptr is not None:
                gradient = gradient - mean_g - normal * mean_gy
            store_row(dy_origin + row_offset(k, dy_row_stride), scale * gradient, dy_offsets, mask, walk)
        else:
            sum_g += tl.where(mask, gradient, 0.0)
            sum_gy += tl.where(mask, gradient * normal, 0.0)

    if dy_strides is None:
        n_splits, n_tiles = tl.cdiv(height, split_rows), tl.cdiv(width, tile_columns)
        partial = out_ptr + ((batch * n_splits + split) * n_tiles + tile) * 2 * n_channels + channels
        tl.store(partial, tl.sum(sum_g, axis=1), mask=exists)
        tl.store(partial + n_channels, tl.sum(sum_gy, axis=1), mask=exists)


@triton.jit(do_not_specialize=["parts", "size"], do_not_specialize_on_alignment=["partial_ptr", "sums_ptr"])
def bn_relu_sum_parts_kernel(partial_ptr, sums_ptr, parts, size, BLOCK_PARTS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """sums = the parts' sums added up in a fixed order. Grid: (⌈size / BLOCK_SIZE⌉,). partial (parts, size)."""
    elements = tl.program_id(0) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
    exists = elements < size
    total = tl.zeros((BLOCK_PARTS, BLOCK_SIZE), tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        pointers = partial_ptr + part.to(tl.int64)[:, None] * size + elements[None, :]
        total += tl.load(pointers, mask=(part < parts)[:, None] & exists[None, :], other=0.0)
    tl.store(sums_ptr + elements, tl.sum(total, axis=0), mask=exists)
