"""Triton kernels of the backward through z = relu(weight · ŷ + bias), ŷ = (y − mean) · invstd, without z in memory.

The gradient of z is what the tokens spread over the map, made on the way, and what other readers of z left in a map.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .operands import load_norm
from .pool_spread_kernels import pass_edge, start_walk
from .pool_walk import (
    first_rows,
    next_row,
    own_part,
    part_mask,
    part_offsets,
    part_origin,
    row_offset,
    run_time,
    store_row,
)

_POINTERS = ["y_ptr", "norm_ptr", "grad_ptr", "map_ptr", "sums_ptr", "dy_ptr", "partial_ptr"]


@triton.jit(do_not_specialize=run_time("y", "grad", "map", "dy"), do_not_specialize_on_alignment=_POINTERS)
def bn_relu_bwd_kernel(
    y_ptr,
    norm_ptr,
    grad_ptr,
    map_ptr,
    sums_ptr,
    per_value,
    dy_ptr,
    partial_ptr,
    n_channels,
    height,
    width,
    tile_columns,
    split_rows,
    y_batch_stride: tl.int64,
    y_channel_stride: tl.int64,
    y_row_stride: tl.int64,
    y_column_stride: tl.int64,
    grad_batch_stride: tl.int64,
    grad_channel_stride: tl.int64,
    grad_token_stride: tl.int64,
    map_batch_stride: tl.int64,
    map_channel_stride: tl.int64,
    map_row_stride: tl.int64,
    map_column_stride: tl.int64,
    dy_batch_stride: tl.int64,
    dy_channel_stride: tl.int64,
    dy_row_stride: tl.int64,
    dy_column_stride: tl.int64,
    LEVELS: tl.constexpr,
    INNER: tl.constexpr,
    VECTOR: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ROWS_AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    """With g = [z lets pass] · (map + spread tokens): Σ g and Σ g·ŷ of a part, or dy = weight · invstd · (g − …).

    Grid: (B · ⌈C / BLOCK_CHANNELS⌉ · splits · tiles,). norm is a table (4, C). ``dy_ptr`` is None: a part's sums go to
    partial (parts, 2, C). Otherwise dy (B, C, H, W) = weight · invstd · (g − (sums[0] + ŷ · sums[1]) · per_value), with
    sums (2, C) if given.
    """
    batch, first_channel, tile, split = own_part(
        n_channels, height, width, tile_columns, split_rows, INNER, BLOCK_CHANNELS
    )
    left = tile * tile_columns
    right = tl.minimum(left + tile_columns, width)
    top = split * split_rows
    bottom = tl.minimum(top + split_rows, height)
    channels = first_channel + tl.arange(0, BLOCK_CHANNELS)
    columns = left + tl.arange(0, BLOCK_COLUMNS)
    exists = channels < n_channels

    y_offsets = part_offsets(y_channel_stride, y_column_stride, INNER, BLOCK_CHANNELS, BLOCK_COLUMNS)
    mask = part_mask(channels, columns, n_channels, right, INNER, VECTOR)
    mean, invstd, weight, bias = load_norm(norm_ptr, n_channels, channels, 1)
    rows = bottom - top
    y_origin = y_ptr + part_origin(
        batch, first_channel, top, left, y_batch_stride, y_channel_stride, y_row_stride, y_column_stride, INNER
    )
    y_ahead = first_rows(y_origin, y_row_stride, y_offsets, mask, rows, INNER, VECTOR, ROWS_AHEAD)
    if map_ptr is not None:
        map_offsets = part_offsets(map_channel_stride, map_column_stride, INNER, BLOCK_CHANNELS, BLOCK_COLUMNS)
        map_origin = map_ptr + part_origin(
            batch, first_channel, top, left, map_batch_stride, map_channel_stride, map_row_stride, map_column_stride,
            INNER,
        )  # fmt: skip
        map_ahead = first_rows(map_origin, map_row_stride, map_offsets, mask, rows, INNER, VECTOR, ROWS_AHEAD)
    spread = tl.zeros((BLOCK_CHANNELS, BLOCK_COLUMNS), tl.float32)
    if grad_ptr is not None:
        grad = grad_ptr + batch * grad_batch_stride
        held, bins = start_walk(top, height, BLOCK_CHANNELS, BLOCK_COLUMNS, LEVELS)
        edge = top
    if dy_ptr is not None:
        dy_offsets = part_offsets(dy_channel_stride, dy_column_stride, INNER, BLOCK_CHANNELS, BLOCK_COLUMNS)
        dy_origin = dy_ptr + part_origin(
            batch, first_channel, top, left, dy_batch_stride, dy_channel_stride, dy_row_stride, dy_column_stride, INNER
        )
        scale = weight * invstd
        if sums_ptr is not None:
            mean_g = tl.load(sums_ptr + channels, mask=exists, other=0.0)[:, None] * per_value
            mean_gy = tl.load(sums_ptr + n_channels + channels, mask=exists, other=0.0)[:, None] * per_value
    else:
        sum_g = tl.zeros((BLOCK_CHANNELS, BLOCK_COLUMNS), tl.float32)
        sum_gy = tl.zeros((BLOCK_CHANNELS, BLOCK_COLUMNS), tl.float32)

    for r in tl.range(top, bottom, num_stages=STAGES):
        k = r - top
        values, y_ahead = next_row(y_ahead, y_origin, y_row_stride, y_offsets, mask, k, rows, INNER, VECTOR, ROWS_AHEAD)
        if grad_ptr is not None:  # noqa: SIM102 Triton compiles both operands of "and"
            if r == edge:
                spread, edge, held, bins = pass_edge(
                    held, bins, r, grad, grad_token_stride, grad_channel_stride, channels, columns, n_channels, height,
                    width, left, right, LEVELS, INNER, VECTOR, TOKEN_MAJOR,
                )  # fmt: skip
        gradient = spread
        if map_ptr is not None:
            others, map_ahead = next_row(
                map_ahead, map_origin, map_row_stride, map_offsets, mask, k, rows, INNER, VECTOR, ROWS_AHEAD
            )
            gradient += others
        normal = (values - mean) * invstd
        gradient = tl.where(normal * weight + bias <= 0.0, 0.0, gradient)
        if dy_ptr is not None:
            if sums_ptr is not None:
                gradient = gradient - mean_g - normal * mean_gy
            store_row(dy_origin + row_offset(k, dy_row_stride), scale * gradient, dy_offsets, mask, INNER, VECTOR)
        else:
            sum_g += tl.where(mask, gradient, 0.0)
            sum_gy += tl.where(mask, gradient * normal, 0.0)

    if dy_ptr is None:
        n_splits, n_tiles = tl.cdiv(height, split_rows), tl.cdiv(width, tile_columns)
        partial = partial_ptr + ((batch * n_splits + split) * n_tiles + tile) * 2 * n_channels + channels
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
