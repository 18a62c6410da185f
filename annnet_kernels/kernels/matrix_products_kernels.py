"""Triton kernel of the products of weights and tokens: every dtype in, every dtype out, as accurate as float32."""

from __future__ import annotations

import triton
import triton.language as tl

from .operands import integer


@triton.jit
def _strides(matrix, ALIGNED: tl.constexpr):
    """Rows' and columns'. Only where vectors can be loaded does a compiled variant depend on them."""
    if ALIGNED:
        return matrix.row_stride, matrix.column_stride
    else:
        return integer(matrix.row_stride), integer(matrix.column_stride)


@triton.jit(do_not_specialize=["rows", "columns", "depth"])
def matrix_product_kernel(
    a,
    b,
    out_ptr,
    rows,
    columns,
    depth,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out (rows, columns), dense, = a (rows, depth) b (depth, columns), both by strides.

    Grid: (⌈rows / BLOCK_ROWS⌉ · ⌈columns / BLOCK_COLUMNS⌉,). Each program adds up its tile in one order.
    """
    tiles = tl.cdiv(columns, BLOCK_COLUMNS)
    row = tl.program_id(0) // tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(0) % tiles * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    step = tl.arange(0, BLOCK_DEPTH)
    a_row_stride, a_column_stride = _strides(a, ALIGNED)
    b_row_stride, b_column_stride = _strides(b, ALIGNED)
    a_rows = a.pointer + row.to(tl.int64)[:, None] * a_row_stride
    b_columns = b.pointer + column.to(tl.int64)[None, :] * b_column_stride
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for first in range(0, depth, BLOCK_DEPTH):
        k = (first + step).to(tl.int64)
        a_tile = tl.load(
            a_rows + k[None, :] * a_column_stride, mask=(row < rows)[:, None] & (k < depth)[None, :], other=0.0
        )
        b_tile = tl.load(
            b_columns + k[:, None] * b_row_stride, mask=(k < depth)[:, None] & (column < columns)[None, :], other=0.0
        )
        total += tl.dot(a_tile.to(tl.float32), b_tile.to(tl.float32), input_precision=PRECISION)
    target = out_ptr + row.to(tl.int64)[:, None] * columns + column[None, :]
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(target, total.to(out_ptr.dtype.element_ty), mask=mask)
