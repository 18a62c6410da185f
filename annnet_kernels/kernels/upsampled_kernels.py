"""Triton kernels of upsampled logits. B batch, K classes, h × w cells (low-resolution logits), H × W pixels.

Between the rows of cells i and i + 1 lies stripe i of pixels, from −1 (above the first row) to h − 1; the intervals of
columns are the like. Loss and argmax: a program owns the pixels of a stripe in a block of columns, interpolates the
columns of a class once for all its rows, and walks the classes. Gradient: a lane owns an interval of a stripe and a few
classes, whose four corners it keeps in registers while it walks the pixels between them. What belongs to the rows of
cells above and below the stripe is written apart, and added by the host: no atomics, a fixed order.
"""

# mypy: disable-error-code="assignment"
# A tuple grows here by one tile per row or class.

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .operands import integer

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

TARGET = ["n_classes", "logits_channel_stride", "ignore_index", "smoothing"]


class Axis(NamedTuple):
    """Rows or columns: how many there are of cells and of pixels, and ``upsampling.ratio``, all by ``run_time``.

    Pixel i lies (i · step + start) / divisor cells behind the first cell.
    """

    cells: Any
    pixels: Any
    step: Any
    start: Any
    divisor: Any


class Weights(NamedTuple):
    """Pointers to the weight of every class and to their sum; the first is None for 1, the second for K."""

    of_class: Any
    total: Any


@triton.jit
def count(value):
    """A number of cells or pixels."""
    return integer(value).to(tl.int32)


@triton.jit
def first_pixel(cell, axis):
    """The first pixel at or behind a cell: all are behind cell −1, and none is behind the cell after the last."""
    pixels = count(axis.pixels)
    first = tl.cdiv(cell * integer(axis.divisor) - integer(axis.start), tl.maximum(integer(axis.step), 1))
    first = tl.minimum(tl.maximum(first, 0), pixels)
    return tl.where(cell < 0, 0, tl.where(cell >= count(axis.cells), pixels, first)).to(tl.int32)


@triton.jit
def own_stripe(index, rows):
    """Image, stripe, and its first and last row of pixels."""
    height = count(rows.cells)
    stripe = index % (height + 1) - 1
    first = first_pixel(stripe.to(tl.int64), rows)
    return (index // (height + 1)).to(tl.int64), stripe, first, first_pixel(stripe.to(tl.int64) + 1, rows)


@triton.jit
def _own_pixels(logits, rows, columns, BLOCK_COLUMNS: tl.constexpr):
    """Image, stripe, its first and last row of pixels, a block of columns, the image's logits, and the corners there.

    Corners are offsets of both rows of cells and, per column, of both columns of cells, and the weight of the second.
    """
    index = tl.program_id(0)
    n_blocks = tl.cdiv(count(columns.pixels), BLOCK_COLUMNS)
    batch, stripe, first, last = own_stripe(index // n_blocks, rows)
    x = index % n_blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)

    width, divisor, column_stride = integer(columns.cells), integer(columns.divisor), integer(logits.strides.column)
    position = tl.maximum(x * integer(columns.step) + integer(columns.start), 0)
    position = tl.minimum(position, (width - 1) * divisor)
    low = position // divisor
    weight = (position - low * divisor).to(tl.float32) / divisor.to(tl.float32)
    high = tl.minimum(low + 1, width - 1)
    above = tl.maximum(stripe, 0) * integer(logits.strides.row)
    below = tl.minimum(stripe + 1, count(rows.cells) - 1) * integer(logits.strides.row)
    corners = (above, below, low * column_stride, high * column_stride, weight)
    return batch, stripe, first, last, x, logits.pointer + batch * integer(logits.strides.batch), corners


@triton.jit
def _spread(pointer, corners, exists):
    """A class in both rows of cells, its columns interpolated: the upper one, and the difference of the lower."""
    above, below, left, right, weight = corners
    top_left = tl.load(pointer + above + left, mask=exists, other=0.0).to(tl.float32)
    top_right = tl.load(pointer + above + right, mask=exists, other=0.0).to(tl.float32)
    bottom_left = tl.load(pointer + below + left, mask=exists, other=0.0).to(tl.float32)
    bottom_right = tl.load(pointer + below + right, mask=exists, other=0.0).to(tl.float32)
    top = top_left + weight * (top_right - top_left)
    return top, bottom_left + weight * (bottom_right - bottom_left) - top


@triton.jit
def row_weight(row, stripe, rows):
    """The weight of the lower row of cells; outside the first and the last both are the same one."""
    divisor = integer(rows.divisor)
    rest = row * integer(rows.step) + integer(rows.start) - stripe * divisor
    return rest.to(tl.float32) / divisor.to(tl.float32)


@triton.jit
def _weight_of(weight_ptr, labels, mask):
    if weight_ptr is None:
        return tl.where(mask, 1.0, 0.0)
    else:
        return tl.load(weight_ptr + labels, mask=mask, other=0.0)


@triton.jit
def labels_of(target_ptr, offsets, exists, ignore_index, n_classes, weight_ptr):
    """Label, whether its pixel counts, whether it names a class, and its weight, NaN where it counts and names none."""
    label = tl.load(target_ptr + offsets, mask=exists, other=0).to(tl.int64)
    counts = exists & (label != ignore_index)
    known = counts & (label >= 0) & (label < n_classes)
    weight = tl.where(counts & (known == 0), float("nan"), _weight_of(weight_ptr, label, known))
    return label, counts, known, weight


@triton.jit(do_not_specialize=TARGET, do_not_specialize_on_alignment=["partial_ptr", "losses_ptr"])
def upsampled_loss_kernel(
    logits,
    target,
    weights,
    losses_ptr,
    logsumexp_ptr,
    partial_ptr,
    n_classes,
    rows,
    columns,
    logits_channel_stride: tl.int64,
    ignore_index: tl.int64,
    smoothing: tl.float32,
    SMOOTHING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Loss and logsumexp of each pixel, and the sums of losses and of label weights over the program's pixels.

    Grid: (B · (h + 1) · ⌈W / BLOCK_COLUMNS⌉,). losses, logsumexp (B, H, W) or None, partial (programs, 2).
    """
    batch, stripe, first, last, x, image, corners = _own_pixels(logits, rows, columns, BLOCK_COLUMNS)
    width = count(columns.pixels)
    inside = x < width
    labels = target.pointer + batch * integer(target.strides.batch) + x * integer(target.strides.column)
    out = batch * count(rows.pixels) * width + x
    share = smoothing / n_classes
    total_weight = n_classes.to(tl.float32)
    if weights.total is not None:
        total_weight = tl.load(weights.total)
    loss_sum = tl.zeros((BLOCK_COLUMNS,), tl.float32)
    weight_sum = tl.zeros((BLOCK_COLUMNS,), tl.float32)

    for row in range(first, last, ROWS):
        largest = ()
        sums = ()
        smooth = ()
        for _ in tl.static_range(ROWS):
            largest += (tl.full((BLOCK_COLUMNS,), float("-inf"), tl.float32),)
            sums += (tl.zeros((BLOCK_COLUMNS,), tl.float32),)
            smooth += (tl.zeros((BLOCK_COLUMNS,), tl.float32),)
        for k in range(n_classes):
            top, difference = _spread(image + k * logits_channel_stride, corners, inside)
            new = ()
            for r in tl.static_range(ROWS):
                value = top + row_weight(row + r, stripe, rows) * difference
                new += (tl.maximum(largest[r], value),)
            largest = new
        for k in range(n_classes):
            top, difference = _spread(image + k * logits_channel_stride, corners, inside)
            new_sums = ()
            new_smooth = ()
            for r in tl.static_range(ROWS):
                value = top + row_weight(row + r, stripe, rows) * difference
                below = value - largest[r]
                new_sums += (sums[r] + tl.exp2(below * LOG2_E),)
                if SMOOTHING:
                    class_weight = 1.0
                    if weights.of_class is not None:
                        class_weight = tl.load(weights.of_class + k)
                    new_smooth += (smooth[r] - class_weight * below,)
                else:
                    new_smooth += (smooth[r],)
            sums = new_sums
            smooth = new_smooth
        for r in tl.static_range(ROWS):
            y = row + r
            exists = inside & (y < last)
            label, counts, known, of_label = labels_of(
                labels + y * integer(target.strides.row), 0, exists, ignore_index, n_classes, weights.of_class
            )
            safe = tl.where(known, label, 0)
            top, difference = _spread(image + safe * logits_channel_stride, corners, exists)
            at_label = top + row_weight(y, stripe, rows) * difference
            log_sum = tl.log(sums[r])
            loss = (1.0 - smoothing) * of_label * ((largest[r] - at_label) + log_sum)
            if SMOOTHING:
                loss += share * (total_weight * log_sum + smooth[r])
            loss = tl.where(counts, loss, 0.0)
            loss_sum += loss
            weight_sum += tl.where(counts, of_label, 0.0)
            if losses_ptr is not None:
                tl.store(losses_ptr + out + y * width, loss, mask=exists)
            if logsumexp_ptr is not None:
                tl.store(logsumexp_ptr + out + y * width, largest[r] + log_sum, mask=exists)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * 2, tl.sum(loss_sum))
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * 2 + 1, tl.sum(weight_sum))


@triton.jit(do_not_specialize=["n_classes", "logits_channel_stride"])
def upsampled_argmax_kernel(
    logits,
    out_ptr,
    n_classes,
    rows,
    columns,
    logits_channel_stride: tl.int64,
    ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The class with the largest logit, the first of several; NaN counts as the largest, as in PyTorch.

    Grid: (B · (h + 1) · ⌈W / BLOCK_COLUMNS⌉,). out (B, H, W).
    """
    batch, stripe, first, last, x, image, corners = _own_pixels(logits, rows, columns, BLOCK_COLUMNS)
    width = count(columns.pixels)
    inside = x < width
    for row in range(first, last, ROWS):
        largest = ()
        index = ()
        top, difference = _spread(image, corners, inside)
        for r in tl.static_range(ROWS):
            largest += (top + row_weight(row + r, stripe, rows) * difference,)
            index += (tl.zeros((BLOCK_COLUMNS,), tl.int32),)
        for k in range(1, n_classes):
            top, difference = _spread(image + k * logits_channel_stride, corners, inside)
            new_largest = ()
            new_index = ()
            for r in tl.static_range(ROWS):
                value = top + row_weight(row + r, stripe, rows) * difference
                wins = (value > largest[r]) | ((value != value) & (largest[r] == largest[r]))
                new_largest += (tl.where(wins, value, largest[r]),)
                new_index += (tl.where(wins, k, index[r]),)
            largest = new_largest
            index = new_index
        for r in tl.static_range(ROWS):
            y = row + r
            out = out_ptr + (batch * count(rows.pixels) + y) * width + x
            tl.store(out, index[r].to(tl.int64), mask=inside & (y < last))
