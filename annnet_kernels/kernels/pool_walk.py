"""How a pooling program walks its part of a map: which part, in which bins, and how a row is read and written.

A program owns a block of channels, a tile of columns and a split of rows, and goes down the rows one by one. Bins are
those of ``pyramid.bin_edges``, made by integer arithmetic in the kernel: no table is copied to the device.
"""

# mypy: disable-error-code="assignment"
# A tuple grows here by one tile per row.

from __future__ import annotations

import triton
import triton.language as tl

SIZES = ("n_channels", "height", "width", "tile_columns", "split_rows")


def run_time(*names: str) -> list[str]:
    """Sizes, and the strides of these operands: none is in the key of a compiled variant."""
    dimensions = ("batch", "channel", "row", "column", "token")
    return [*SIZES, *(f"{name}_{dimension}_stride" for name in names for dimension in dimensions)]


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
def own_part(n_channels, height, width, tile_columns, split_rows, INNER: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """Image, first channel, column tile and row split of this program.

    Programs that follow each other read neighbouring memory: channel blocks of the same pixels in channels_last, the
    column tiles of the same rows otherwise.
    """
    n_blocks = tl.cdiv(n_channels, BLOCK_CHANNELS)
    n_tiles = tl.cdiv(width, tile_columns)
    n_splits = tl.cdiv(height, split_rows)
    index = tl.program_id(0)
    if INNER == "channels":
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
    return batch.to(tl.int64), block * BLOCK_CHANNELS, tile, split


@triton.jit
def part_origin(
    batch, channel, row, column, batch_stride, channel_stride, row_stride, column_stride, INNER: tl.constexpr
):
    """64-bit offset of the first element of a part."""
    origin = batch * batch_stride + tl.cast(row, tl.int64) * row_stride
    if INNER == "channels":
        return origin + channel + tl.cast(column, tl.int64) * column_stride
    elif INNER == "columns":
        return origin + tl.cast(channel, tl.int64) * channel_stride + column
    else:
        return origin + tl.cast(channel, tl.int64) * channel_stride + tl.cast(column, tl.int64) * column_stride


@triton.jit
def part_offsets(
    channel_stride, column_stride, INNER: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr
):
    """Offsets (channels, columns) of a row's elements from its origin: 32-bit where a stride is known to be 1.

    The launcher sees to it that they fit; they stay in registers throughout.
    """
    channels = tl.arange(0, BLOCK_CHANNELS)
    columns = tl.arange(0, BLOCK_COLUMNS)
    if INNER == "channels":
        return channels[:, None] + (columns * tl.cast(column_stride, tl.int32))[None, :]
    elif INNER == "columns":
        return (channels * tl.cast(channel_stride, tl.int32))[:, None] + columns[None, :]
    else:
        return (channels.to(tl.int64) * channel_stride)[:, None] + (columns.to(tl.int64) * column_stride)[None, :]


@triton.jit
def part_mask(channels, columns, n_channels, right, INNER: tl.constexpr, VECTOR: tl.constexpr):
    """Which elements of a row exist, known to the compiler in groups of ``VECTOR``."""
    mask = (channels < n_channels)[:, None] & (columns < right)[None, :]
    if INNER == "channels":
        mask = tl.max_constancy(mask, (VECTOR, 1))
    elif INNER == "columns":
        mask = tl.max_constancy(mask, (1, VECTOR))
    return mask


@triton.jit
def row_pointers(row, offsets, INNER: tl.constexpr, VECTOR: tl.constexpr):
    """Pointers to one row of a part; ``row`` points to the row's origin. Aligned to 16 bytes if ``VECTOR`` is not 1.

    The hint replaces Triton's specialisation on divisible arguments, which would compile one kernel per size.
    """
    pointers = row + offsets
    if VECTOR > 1:
        pointers = tl.multiple_of(pointers, (16, 1) if INNER == "channels" else (1, 16))
    return pointers


@triton.jit
def rectified(values, mean, invstd, weight, bias):
    """relu((y − mean) · invstd · weight + bias) in float32; a NaN stays NaN (maximum(z, 0) would drop it)."""
    normal = (values - mean) * invstd * weight + bias
    return tl.where(normal <= 0.0, 0.0, normal)


@triton.jit
def row_offset(k, row_stride):
    """64-bit, also in the interpreter, which types a stride by its value."""
    return k * tl.cast(row_stride, tl.int64)


@triton.jit
def load_row(row, offsets, mask, INNER: tl.constexpr, VECTOR: tl.constexpr):
    """One row of a part, zero where there is none."""
    return tl.load(row_pointers(row, offsets, INNER, VECTOR), mask=mask, other=0.0)


@triton.jit
def first_rows(
    origin, row_stride, offsets, mask, rows, INNER: tl.constexpr, VECTOR: tl.constexpr, ROWS_AHEAD: tl.constexpr
):
    """The rows that are loaded before the walk begins; ``origin`` points to the first of ``rows``."""
    ahead = ()
    for k in tl.static_range(ROWS_AHEAD):
        ahead += (load_row(origin + row_offset(k, row_stride), offsets, mask & (k < rows), INNER, VECTOR),)
    return ahead


@triton.jit
def next_row(
    ahead, origin, row_stride, offsets, mask, k, rows, INNER: tl.constexpr, VECTOR: tl.constexpr,
    ROWS_AHEAD: tl.constexpr,
):  # fmt: skip
    """Row ``k`` of the walk in float32, and the rows loaded ahead of it.

    Nothing else keeps memory busy during a row's arithmetic, unless the loop is pipelined (``ROWS_AHEAD`` 0).
    """
    if ROWS_AHEAD == 0:
        return load_row(origin + row_offset(k, row_stride), offsets, mask, INNER, VECTOR).to(tl.float32), ahead
    else:
        later = k + ROWS_AHEAD
        new = load_row(origin + row_offset(later, row_stride), offsets, mask & (later < rows), INNER, VECTOR)
        return ahead[0].to(tl.float32), ahead[1:] + (new,)  # noqa: RUF005 Triton has no unpacking


@triton.jit
def store_channels(row, values, channels, n_channels, INNER: tl.constexpr, VECTOR: tl.constexpr):
    """Write (channels,) values of one token; ``row`` points to its first channel."""
    pointers = row + channels
    mask = channels < n_channels
    if INNER == "channels":
        mask = tl.max_constancy(mask, (VECTOR,))
        if VECTOR > 1:
            pointers = tl.multiple_of(pointers, (16,))
    tl.store(pointers, values.to(row.dtype.element_ty), mask=mask)


@triton.jit
def load_channels(
    row, channels, channel_stride, n_channels, INNER: tl.constexpr, VECTOR: tl.constexpr, TOKEN_MAJOR: tl.constexpr
):
    """(channels,) values of one token in float32; ``row`` points to its channel 0."""
    mask = channels < n_channels
    if TOKEN_MAJOR:
        pointers = row + channels
        if INNER == "channels":
            mask = tl.max_constancy(mask, (VECTOR,))
            if VECTOR > 1:
                pointers = tl.multiple_of(pointers, (16,))
    else:
        pointers = row + channels.to(tl.int64) * channel_stride
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_row(row, values, offsets, mask, INNER: tl.constexpr, VECTOR: tl.constexpr):
    """Write one row of a part."""
    tl.store(row_pointers(row, offsets, INNER, VECTOR), values.to(row.dtype.element_ty), mask=mask)
