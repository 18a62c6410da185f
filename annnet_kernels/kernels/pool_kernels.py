"""Triton kernels of the pyramid pooling. B batch, C channels, T tokens; R row splits, K column tiles of a map.

Forward: a program walks down the rows of its part with one accumulator (channels, columns) per level, the sum of the
level's current row bin. Where a row bin ends, its columns are summed bin by bin: a token that lies inside the part is
divided and written at once, any other goes to a float32 partial sum, and a second kernel adds those in fixed order. So
a map is read once, no sum ever holds a pixel of another bin, and only tokens on a cut cost more traffic.

A cut between two rows crosses at most one bin per level, since neighbouring bins share at most one row. Therefore
bin + split numbers the pairs of a bin and a split that meet, and a level of h × w bins has (h + R − 1) · (w + K − 1)
partial sums.

``levels`` holds per level h, w and the sums over the earlier levels of h · w, h and w.
"""

# mypy: disable-error-code="assignment"
# A tuple grows here by one tile per level.

from __future__ import annotations

import triton
import triton.language as tl

from .operands import load_norm, rectified
from .pool_walk import (
    SIZES,
    bin_edges,
    bins_between,
    first_rows,
    next_row,
    own_part,
    part_mask,
    part_offsets,
    part_origin,
    store_channels,
)

_POINTERS = ["x_ptr", "norm_ptr", "out_ptr", "partial_ptr"]


@triton.jit
def token_count(levels):
    """T."""
    last: tl.constexpr = len(levels) - 1
    return levels[last][2] + levels[last][0] * levels[last][1]


@triton.jit
def token_index(i, j, transposed, levels, level: tl.constexpr):
    """Number of the token of bin (i, j) of the walk, whose rows are the map's columns where it is ``transposed``."""
    return levels[level][2] + tl.where(transposed != 0, j * levels[level][0] + i, i * levels[level][1] + j)


@triton.jit
def partial_slot(i, split, j, tile, n_splits, n_tiles, levels, level: tl.constexpr):
    """Index of the partial sum of bin (i, j) in a split and a tile: those of earlier levels come first."""
    row_cuts, column_cuts = n_splits - 1, n_tiles - 1
    first = levels[level][2] + levels[level][3] * column_cuts + levels[level][4] * row_cuts
    first += level * row_cuts * column_cuts
    return first + (i + split) * (levels[level][1] + column_cuts) + j + tile


@triton.jit
def partial_count(n_splits, n_tiles, levels):
    """How many partial sums one image has per channel."""
    last: tl.constexpr = len(levels) - 1
    i, j = levels[last][0] - 1, levels[last][1] - 1
    return partial_slot(i, n_splits - 1, j, n_tiles - 1, n_splits, n_tiles, levels, last) + 1


@triton.jit
def _write_row_bin(
    sums, i, row_start, row_end, out, partial, channels, columns, n_channels, width, part, cuts, transposed,
    level: tl.constexpr, walk,
):  # fmt: skip
    """Sum row bin ``i`` over each column bin it meets; write finished tokens to ``out``, the others as partial sums."""
    own_rows, own_columns = part
    split, top, bottom = own_rows
    tile, left, right = own_columns
    n_splits, n_tiles = cuts
    COLUMNS: tl.constexpr = walk.levels[level][1]
    first, stop = bins_between(left, right, width, COLUMNS)
    for j in range(first, stop):
        start, end, _ = bin_edges(j, width, COLUMNS)
        inside = (columns >= start) & (columns < end)
        total = tl.sum(tl.where(inside[None, :], sums, 0.0), axis=1)
        if (row_start >= top) & (row_end <= bottom) & (start >= left) & (end <= right):
            mean = total * (1.0 / ((row_end - row_start) * (end - start)).to(tl.float32))
            token = token_index(i, j, transposed, walk.levels, level)
            store_channels(out + token * n_channels, mean, channels, n_channels, walk)
        else:
            slot = partial_slot(i, split, j, tile, n_splits, n_tiles, walk.levels, level)
            store_channels(partial + slot * n_channels, total, channels, n_channels, walk)


@triton.jit(do_not_specialize=[*SIZES, "transposed", "x_row_stride"], do_not_specialize_on_alignment=_POINTERS)
def pyramid_pool_fwd_kernel(
    x_ptr,
    norm_ptr,
    out_ptr,
    partial_ptr,
    n_channels,
    height,
    width,
    tile_columns,
    split_rows,
    transposed,
    x_strides,
    x_row_stride: tl.int64,
    walk,
):
    """Every token of x, or of relu((x − mean) · invstd · weight + bias) where their table, norm (4, C), is given.

    Grid: (B · ⌈C / walk.channels⌉ · R · K,). x (B, C, H, W) by strides, out (B, T, C), partial (B, slots, C) float32.
    ``transposed``: x comes with rows and columns exchanged, the levels too, but tokens are numbered as ever.
    """
    batch, first_channel, own_rows, own_columns = own_part(n_channels, height, width, tile_columns, split_rows, walk)
    _, top, bottom = own_rows
    _, left, right = own_columns
    part = (own_rows, own_columns)
    n_tiles = tl.cdiv(width, tile_columns)
    n_splits = tl.cdiv(height, split_rows)
    channels = first_channel + tl.arange(0, walk.channels)
    columns = left + tl.arange(0, walk.columns)

    out = out_ptr + batch * token_count(walk.levels) * n_channels
    partial = partial_ptr + batch * partial_count(n_splits, n_tiles, walk.levels) * n_channels

    segment = tl.zeros((walk.channels, walk.columns), tl.float32)
    sums = ()
    bins = ()
    cut = bottom
    for level in tl.static_range(len(walk.levels)):
        i = top * walk.levels[level][0] // height
        _, end, following = bin_edges(i, height, walk.levels[level][0])
        cut = tl.minimum(cut, tl.where(following > top, following, end))
        sums += (segment,)
        bins += (i,)

    offsets = part_offsets(x_strides, walk)
    mask = part_mask(channels, columns, n_channels, right, walk)
    if norm_ptr is not None:
        mean, invstd, weight, bias = load_norm(norm_ptr, n_channels, channels, 1)
    origin = x_ptr + part_origin(batch, first_channel, top, left, x_strides, walk)
    ahead = first_rows(origin, x_row_stride, offsets, mask, bottom - top, walk)
    for r in tl.range(top, bottom, num_stages=walk.stages):
        values, ahead = next_row(ahead, origin, x_row_stride, offsets, mask, r - top, bottom - top, walk)
        if norm_ptr is not None:
            values = tl.where(mask, rectified(values, mean, invstd, weight, bias), 0.0)

        segment += values

        if r + 1 == cut:
            new_sums = ()
            new_bins = ()
            cut = bottom
            for level in tl.static_range(len(walk.levels)):
                total = sums[level] + segment
                i = bins[level]
                start, end, following = bin_edges(i, height, walk.levels[level][0])
                # Also where a split ends. More than one bin can end only where there are more bins than rows.
                while (start <= r) & (tl.minimum(end, bottom) == r + 1):
                    _write_row_bin(
                        total, i, start, end, out, partial, channels, columns, n_channels, width, part,
                        (n_splits, n_tiles), transposed, level, walk,
                    )  # fmt: skip
                    i += 1
                    start, end, following = bin_edges(i, height, walk.levels[level][0])
                    total = tl.where(start <= r, segment, 0.0)
                cut = tl.minimum(cut, tl.where(following > r + 1, following, end))
                new_sums += (total,)
                new_bins += (i,)
            sums = new_sums
            bins = new_bins
            segment = tl.zeros((walk.channels, walk.columns), tl.float32)


@triton.jit
def _combine_token(
    i,
    j,
    out,
    partial,
    n_channels,
    exists,
    height,
    width,
    tile_columns,
    split_rows,
    levels,
    level: tl.constexpr,
):
    top, bottom, _ = bin_edges(i, height, levels[level][0])
    left, right, _ = bin_edges(j, width, levels[level][1])
    first_split, last_split = top // split_rows, (bottom - 1) // split_rows
    first_tile, last_tile = left // tile_columns, (right - 1) // tile_columns
    if (first_split < last_split) | (first_tile < last_tile):
        n_splits, n_tiles = tl.cdiv(height, split_rows), tl.cdiv(width, tile_columns)
        total = tl.zeros(exists.shape, tl.float32)
        for split in range(first_split, last_split + 1):
            for tile in range(first_tile, last_tile + 1):
                slot = partial_slot(i, split, j, tile, n_splits, n_tiles, levels, level)
                total += tl.load(partial + slot * n_channels, mask=exists, other=0.0)
        mean = total * (1.0 / ((bottom - top) * (right - left)).to(tl.float32))
        tl.store(out, mean.to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=[*SIZES, "transposed"], do_not_specialize_on_alignment=_POINTERS)
def pyramid_pool_combine_kernel(
    partial_ptr,
    out_ptr,
    n_channels,
    height,
    width,
    tile_columns,
    split_rows,
    transposed,
    levels,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Tokens on a cut: the sum of their parts, split by split and tile by tile, over the area.

    Grid: (T, ⌈C / BLOCK_CHANNELS⌉, B). partial (B, slots, C) float32, out (B, T, C).
    """
    token = tl.program_id(0)
    channels = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    batch = tl.program_id(2).to(tl.int64)
    exists = channels < n_channels
    n_tiles = tl.cdiv(width, tile_columns)
    n_splits = tl.cdiv(height, split_rows)

    out = out_ptr + (batch * token_count(levels) + token) * n_channels + channels
    partial = partial_ptr + batch * partial_count(n_splits, n_tiles, levels) * n_channels + channels

    for level in tl.static_range(len(levels)):
        index = token - levels[level][2]
        if (index >= 0) & (index < levels[level][0] * levels[level][1]):
            # The bins side by side in the order of tokens are those of one row, or of one column.
            per_line = tl.where(transposed != 0, levels[level][0], levels[level][1])
            line, place = index // per_line, index % per_line
            _combine_token(
                tl.where(transposed != 0, place, line), tl.where(transposed != 0, line, place), out, partial,
                n_channels, exists, height, width, tile_columns, split_rows, levels, level,
            )  # fmt: skip
