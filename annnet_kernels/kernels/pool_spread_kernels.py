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

from .operands import integer
from .pool_walk import (
    SIZES,
    bin_edges,
    bins_between,
    load_channels,
    load_row,
    own_part,
    part_mask,
    part_offsets,
    part_origin,
    store_row,
)


@triton.jit
def _row_bin_gradient(
    grad, strides, i, rows, channels, columns, n_channels, width, left, right, level: tl.constexpr, walk,
):  # fmt: skip
    """(channels, columns): what every pixel of row bin ``i``, of ``rows`` rows, gets from the tokens of one level."""
    COLUMNS: tl.constexpr = walk.levels[level][1]
    spread = tl.zeros((channels.shape[0], columns.shape[0]), tl.float32)
    first, stop = bins_between(left, right, width, COLUMNS)
    for j in range(first, stop):
        start, end, _ = bin_edges(j, width, COLUMNS)
        token = grad + (walk.levels[level][2] + i * COLUMNS + j) * integer(strides.token)
        values = load_channels(token, channels, strides, n_channels, walk)
        share = values * (1.0 / (rows * (end - start)).to(tl.float32))
        inside = (columns >= start) & (columns < end)
        spread += tl.where(inside[None, :], share[:, None], 0.0)
    return spread


@triton.jit
def start_walk(top, height, walk):
    """Per level the row bin before ``top``, and no gradient of it."""
    held = ()
    bins = ()
    for level in tl.static_range(len(walk.levels)):
        held += (tl.zeros((walk.channels, walk.columns), tl.float32),)
        bins += (top * walk.levels[level][0] // height - 1,)
    return held, bins


@triton.jit
def pass_edge(
    held, bins, r, grad, strides, channels, columns, n_channels, height, width, left, right, walk,
):  # fmt: skip
    """Gradient of the rows from ``r`` to the next edge, that edge, and the latest row bin of every level."""
    total = tl.zeros((channels.shape[0], columns.shape[0]), tl.float32)
    edge = height
    new_held = ()
    new_bins = ()
    for level in tl.static_range(len(walk.levels)):
        i = bins[level]
        latest = held[level]
        start, end, following = bin_edges(i, height, walk.levels[level][0])
        previous_end = r
        total += tl.where(end > r, latest, 0.0)
        while following <= r:
            previous_end = end
            i += 1
            start, end, following = bin_edges(i, height, walk.levels[level][0])
            latest = _row_bin_gradient(
                grad, strides, i, end - start, channels, columns, n_channels, width, left, right, level, walk,
            )  # fmt: skip
            total += latest
        # The bin before the latest can share row r, but no more than that.
        edge = tl.minimum(edge, tl.where(previous_end > r, previous_end, following))
        new_held += (latest,)
        new_bins += (i,)
    return total, edge, new_held, new_bins


@triton.jit(do_not_specialize=[*SIZES, "dx_row_stride"], do_not_specialize_on_alignment=["grad_ptr", "dx_ptr"])
def pyramid_pool_bwd_kernel(
    grad_ptr,
    dx_ptr,
    n_channels,
    height,
    width,
    tile_columns,
    split_rows,
    grad_strides,
    dx_strides,
    dx_row_stride: tl.int64,
    walk,
    ADDS: tl.constexpr,
):
    """dx[pixel] = sum of grad[token] / area(token) over the tokens whose bins hold the pixel, added to it if ``ADDS``.

    Grid: (B · ⌈C / walk.channels⌉ · splits · tiles,). grad (B, C, T) by strides, dx (B, C, H, W) by strides.
    """
    batch, first_channel, own_rows, own_columns = own_part(n_channels, height, width, tile_columns, split_rows, walk)
    _, top, bottom = own_rows
    _, left, right = own_columns
    channels = first_channel + tl.arange(0, walk.channels)
    columns = left + tl.arange(0, walk.columns)

    grad = grad_ptr + batch * integer(grad_strides.batch)
    row = dx_ptr + part_origin(batch, first_channel, top, left, dx_strides, walk)
    offsets = part_offsets(dx_strides, walk)
    mask = part_mask(channels, columns, n_channels, right, walk)
    held, bins = start_walk(top, height, walk)
    values = tl.zeros((walk.channels, walk.columns), dx_ptr.dtype.element_ty)
    edge = top
    for r in range(top, bottom):
        if r == edge:
            total, edge, held, bins = pass_edge(
                held, bins, r, grad, grad_strides, channels, columns, n_channels, height, width, left, right, walk,
            )  # fmt: skip
            values = total.to(dx_ptr.dtype.element_ty)
        if ADDS:
            before = load_row(row, offsets, mask, walk).to(tl.float32)
            store_row(row, before + values.to(tl.float32), offsets, mask, walk)
        else:
            store_row(row, values, offsets, mask, walk)
        row += dx_row_stride
