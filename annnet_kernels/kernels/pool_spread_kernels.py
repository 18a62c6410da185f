"""Triton kernels that spread the gradient of tokens over the map. B batch, C channels, T tokens.

A program walks down the rows of its part. Between two edges of row bins the gradient of a column is constant: at every
edge it is made anew as a sum over the levels, each of which holds its latest row bin as (channels, columns), so a token
is read once per part that it meets, and a pixel is written once.
"""

# mypy: disable-error-code="assignment"
# A tuple grows here by one tile per level.

from __future__ import annotations

import triton
import triton.language as tl

from .pool_walk import (
    bin_edges,
    bins_between,
    load_channels,
    load_row,
    own_part,
    part_mask,
    part_offsets,
    part_origin,
    run_time,
    store_row,
)


@triton.jit
def _row_bin_gradient(
    grad,
    token_stride,
    channel_stride,
    i,
    rows,
    channels,
    columns,
    n_channels,
    width,
    left,
    right,
    LEVELS: tl.constexpr,
    level: tl.constexpr,
    INNER: tl.constexpr,
    VECTOR: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,
):
    """(channels, columns): what every pixel of row bin ``i``, of ``rows`` rows, gets from the tokens of one level."""
    COLUMNS: tl.constexpr = LEVELS[level][1]
    spread = tl.zeros((channels.shape[0], columns.shape[0]), tl.float32)
    first, stop = bins_between(left, right, width, COLUMNS)
    for j in range(first, stop):
        start, end, _ = bin_edges(j, width, COLUMNS)
        token = grad + tl.cast(LEVELS[level][2] + i * COLUMNS + j, tl.int64) * token_stride
        values = load_channels(token, channels, channel_stride, n_channels, INNER, VECTOR, TOKEN_MAJOR)
        share = values * (1.0 / (rows * (end - start)).to(tl.float32))
        inside = (columns >= start) & (columns < end)
        spread += tl.where(inside[None, :], share[:, None], 0.0)
    return spread


@triton.jit
def start_walk(top, height, BLOCK_CHANNELS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, LEVELS: tl.constexpr):
    """Per level the row bin before ``top``, and no gradient of it."""
    held = ()
    bins = ()
    for level in tl.static_range(len(LEVELS)):
        held += (tl.zeros((BLOCK_CHANNELS, BLOCK_COLUMNS), tl.float32),)
        bins += (top * LEVELS[level][0] // height - 1,)
    return held, bins


@triton.jit
def pass_edge(
    held,
    bins,
    r,
    grad,
    token_stride,
    channel_stride,
    channels,
    columns,
    n_channels,
    height,
    width,
    left,
    right,
    LEVELS: tl.constexpr,
    INNER: tl.constexpr,
    VECTOR: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,
):
    """Gradient of the rows from ``r`` to the next edge, that edge, and the latest row bin of every level."""
    total = tl.zeros((channels.shape[0], columns.shape[0]), tl.float32)
    edge = height
    new_held = ()
    new_bins = ()
    for level in tl.static_range(len(LEVELS)):
        i = bins[level]
        latest = held[level]
        start, end, following = bin_edges(i, height, LEVELS[level][0])
        previous_end = r
        total += tl.where(end > r, latest, 0.0)
        while following <= r:
            previous_end = end
            i += 1
            start, end, following = bin_edges(i, height, LEVELS[level][0])
            latest = _row_bin_gradient(
                grad, token_stride, channel_stride, i, end - start, channels, columns, n_channels, width, left, right,
                LEVELS, level, INNER, VECTOR, TOKEN_MAJOR,
            )  # fmt: skip
            total += latest
        # The bin before the latest can share row r, but no more than that.
        edge = tl.minimum(edge, tl.where(previous_end > r, previous_end, following))
        new_held += (latest,)
        new_bins += (i,)
    return total, edge, new_held, new_bins


@triton.jit(do_not_specialize=run_time("grad", "dx"), do_not_specialize_on_alignment=["grad_ptr", "dx_ptr"])
def pyramid_pool_bwd_kernel(
    grad_ptr,
    dx_ptr,
    n_channels,
    height,
    width,
    tile_columns,
    split_rows,
    grad_batch_stride: tl.int64,
    grad_channel_stride: tl.int64,
    grad_token_stride: tl.int64,
    dx_batch_stride: tl.int64,
    dx_channel_stride: tl.int64,
    dx_row_stride: tl.int64,
    dx_column_stride: tl.int64,
    LEVELS: tl.constexpr,
    INNER: tl.constexpr,
    VECTOR: tl.constexpr,
    TOKEN_MAJOR: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    ADDS: tl.constexpr,
):
    """dx[pixel] = sum of grad[token] / area(token) over the tokens whose bins hold the pixel, added to it if ``ADDS``.

    Grid: (B · ⌈C / BLOCK_CHANNELS⌉ · splits · tiles,). grad (B, C, T) by strides, dx (B, C, H, W) by strides.
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

    grad = grad_ptr + batch * grad_batch_stride
    row = dx_ptr + part_origin(
        batch, first_channel, top, left, dx_batch_stride, dx_channel_stride, dx_row_stride, dx_column_stride, INNER
    )
    offsets = part_offsets(dx_channel_stride, dx_column_stride, INNER, BLOCK_CHANNELS, BLOCK_COLUMNS)
    mask = part_mask(channels, columns, n_channels, right, INNER, VECTOR)
    held, bins = start_walk(top, height, BLOCK_CHANNELS, BLOCK_COLUMNS, LEVELS)
    values = tl.zeros((BLOCK_CHANNELS, BLOCK_COLUMNS), dx_ptr.dtype.element_ty)
    edge = top
    for r in range(top, bottom):
        if r == edge:
            total, edge, held, bins = pass_edge(
                held, bins, r, grad, grad_token_stride, grad_channel_stride, channels, columns, n_channels, height,
                width, left, right, LEVELS, INNER, VECTOR, TOKEN_MAJOR,
            )  # fmt: skip
            values = total.to(dx_ptr.dtype.element_ty)
        if ADDS:
            held_before = load_row(row, offsets, mask, INNER, VECTOR).to(tl.float32)
            store_row(row, held_before + values.to(tl.float32), offsets, mask, INNER, VECTOR)
        else:
            store_row(row, values, offsets, mask, INNER, VECTOR)
        row += dx_row_stride
