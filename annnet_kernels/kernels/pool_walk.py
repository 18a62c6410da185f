"""How a pooling program walks its part of a map: which part, in which bins, and how a row is read and written.

A program owns a block of channels, a tile of columns and a split of rows, and goes down the rows one by one. Bins are
those of ``pyramid.bin_edges``, made by integer arithmetic in the kernel: no table is copied to the device.
"""

# mypy: disable-error-code="assignment"
# A tuple grows here by one tile per row.

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .operands import integer

SIZES = ("n_channels", "height", "width", "tile_columns", "split_rows")
"""Numbers of a call that are not in the key of a compiled variant; strides are made so by ``operands.run_time``."""


class Walk(NamedTuple):
    """How a part is walked, constexpr: with the dtype, all that a compiled variant depends on.

    ``inner`` is the dimension with stride 1, ``vector`` the elements of an aligned vector along it, ``channels`` and
    ``columns`` are the size of a tile, ``rows_ahead`` and ``stages`` say how rows are loaded ahead of their use.
    ``levels`` holds per level h, w and the sums over the earlier levels of h · w, h and w.
    """

    inner: Any
    vector: Any
    channels: Any
    columns: Any
    rows_ahead: Any
    stages: Any
    levels: Any


@triton.jit
def bin_edges(index, length, BINS: tl.constexpr):
    """Start and end of a bin, and the start of the next, which is the end or one before it."""
    reach = (index + 1) * length
    return index * length // BINS, (reach + BINS - 1) // BINS, reach // BINS


@triton.jit
def bins_between(left, right, length, BINS: tl.constexpr):
    """The first bin that holds ``left``, and how many bins start before ``right``."""
    return left * BINS // length, (right * BINS + length - 1) // length


@triton.jit
def own_part(n_channels, height, width, tile_columns, split_rows, walk):
    """Image, first channel, and of this program's split and tile: number, first row or column, and the end.

    Programs that follow each other read neighbouring memory: channel blocks of the same pixels in channels_last, the
    column tiles of the same rows otherwise.
    """
    n_blocks = tl.cdiv(n_channels, walk.channels)
    n_tiles = tl.cdiv(width, tile_columns)
    n_splits = tl.cdiv(height, split_rows)
    index = tl.program_id(0)
    if walk.inner == "channels":
        block = index % n_blocks
        index = index // n_blocks
        tile = index % n_tiles
        index = index // n_tiles
        split = index % n_splits
        batch = index // n_splits
    else:
        tile = index % n_tiles
        index = index // n_tiles
        split = index % n_splits
        index = index // n_splits
        block = index % n_blocks
        batch = index // n_blocks
    top = split * split_rows
    left = tile * tile_columns
    rows = (split, top, tl.minimum(top + split_rows, height))
    columns = (tile, left, tl.minimum(left + tile_columns, width))
    return batch.to(tl.int64), block * walk.channels, rows, columns


@triton.jit
def part_origin(batch, channel, row, column, strides, walk):
    """64-bit offset of the first element of a part."""
    origin = batch * integer(strides.batch) + row * integer(strides.row)
    if walk.inner == "channels":
        return origin + channel + column * integer(strides.column)
    elif walk.inner == "columns":
        return origin + channel * integer(strides.channel) + column
    else:
        return origin + channel * integer(strides.channel) + column * integer(strides.column)


@triton.jit
def part_offsets(strides, walk):
    """Offsets (channels, columns) of a row's elements from its origin: 32-bit where a stride is known to be 1.

    The launcher sees to it that they fit; they stay in registers throughout.
    """
    channels = tl.arange(0, walk.channels)
    columns = tl.arange(0, walk.columns)
    if walk.inner == "channels":
        return channels[:, None] + (columns * integer(strides.column).to(tl.int32))[None, :]
    elif walk.inner == "columns":
        return (channels * integer(strides.channel).to(tl.int32))[:, None] + columns[None, :]
    else:
        return (channels * integer(strides.channel))[:, None] + (columns * integer(strides.column))[None, :]


@triton.jit
def part_mask(channels, columns, n_channels, right, walk):
    """Which elements of a row exist, known to the compiler in groups of a vector."""
    mask = (channels < n_channels)[:, None] & (columns < right)[None, :]
    if walk.inner == "channels":
        mask = tl.max_constancy(mask, (walk.vector, 1))
    elif walk.inner == "columns":
        mask = tl.max_constancy(mask, (1, walk.vector))
    return mask


@triton.jit
def row_pointers(row, offsets, walk):
    """Pointers to one row of a part; ``row`` points to the row's origin. Aligned to 16 bytes if vectors are.

    The hint replaces Triton's specialisation on divisible arguments, which would compile one kernel per size.
    """
    pointers = row + offsets
    if walk.vector > 1:
        pointers = tl.multiple_of(pointers, (16, 1) if walk.inner == "channels" else (1, 16))
    return pointers


@triton.jit
def row_offset(k, row_stride):
    """64-bit, also in the interpreter, which types a stride by its value."""
    return k * tl.cast(row_stride, tl.int64)


@triton.jit
def load_row(row, offsets, mask, walk):
    """One row of a part, zero where there is none."""
    return tl.load(row_pointers(row, offsets, walk), mask=mask, other=0.0)


@triton.jit
def first_rows(origin, row_stride, offsets, mask, rows, walk):
    """The rows that are loaded before the walk begins; ``origin`` points to the first of ``rows``."""
    ahead = ()
    for k in tl.static_range(walk.rows_ahead):
        ahead += (load_row(origin + row_offset(k, row_stride), offsets, mask & (k < rows), walk),)
    return ahead


@triton.jit
def next_row(ahead, origin, row_stride, offsets, mask, k, rows, walk):
    """Row ``k`` of the walk in float32, and the rows loaded ahead of it.

    Nothing else keeps memory busy during a row's arithmetic, unless the loop is pipelined (no rows ahead).
    """
    if walk.rows_ahead == 0:
        return load_row(origin + row_offset(k, row_stride), offsets, mask, walk).to(tl.float32), ahead
    else:
        later = k + walk.rows_ahead
        new = load_row(origin + row_offset(later, row_stride), offsets, mask & (later < rows), walk)
        return ahead[0].to(tl.float32), ahead[1:] + (new,)  # noqa: RUF005 Triton has no unpacking


@triton.jit
def store_channels(row, values, channels, n_channels, walk):
    """Write (channels,) values of one token; ``row`` points to its first channel."""
    pointers = row + channels
    mask = channels < n_channels
    if walk.inner == "channels":
        mask = tl.max_constancy(mask, (walk.vector,))
        if walk.vector > 1:
            pointers = tl.multiple_of(pointers, (16,))
    tl.store(pointers, values.to(row.dtype.element_ty), mask=mask)


@triton.jit
def load_channels(row, channels, strides, n_channels, walk):
    """(channels,) values of one token in float32; ``row`` points to its channel 0."""
    mask = channels < n_channels
    if strides.token_major:
        pointers = row + channels
        if walk.inner == "channels":
            mask = tl.max_constancy(mask, (walk.vector,))
            if walk.vector > 1:
                pointers = tl.multiple_of(pointers, (16,))
    else:
        pointers = row + channels * integer(strides.channel)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_row(row, values, offsets, mask, walk):
    """Write one row of a part."""
    tl.store(row_pointers(row, offsets, walk), values.to(row.dtype.element_ty), mask=mask)
