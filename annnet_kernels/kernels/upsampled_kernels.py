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

import triton
import triton.language as tl

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)

GEOMETRY = [
    "n_classes", "height", "width", "rows", "columns", "row_step", "row_start", "row_divisor", "column_step",
    "column_start", "column_divisor", "logits_batch_stride", "logits_channel_stride", "logits_row_stride",
    "logits_column_stride",
]  # fmt: skip
TARGET = ["target_batch_stride", "target_row_stride", "target_column_stride", "ignore_index", "smoothing"]
GRAD = [
    "grad_batch_stride", "grad_row_stride", "grad_column_stride", "gradient_batch_stride", "gradient_channel_stride",
    "gradient_row_stride", "gradient_column_stride",
]  # fmt: skip


@triton.jit
def _first_pixel(cell, cells, pixels, step, start, divisor):
    """The first pixel at or behind a cell: all are behind cell −1, and none is behind cell ``cells``."""
    first = tl.cdiv(cell * divisor - start, tl.maximum(step, 1))
    first = tl.minimum(tl.maximum(first, 0), pixels)
    return tl.where(cell < 0, 0, tl.where(cell >= cells, pixels, first))


@triton.jit
def _own_pixels(height, rows, columns, row_step, row_start, row_divisor, BLOCK_COLUMNS: tl.constexpr):
    """Image, stripe, its first and last row of pixels, and a block of columns."""
    index = tl.program_id(0)
    n_blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    block, stripe = index % n_blocks, index // n_blocks % (height + 1) - 1
    batch = (index // (n_blocks * (height + 1))).to(tl.int64)
    first = _first_pixel(stripe.to(tl.int64), height, rows, row_step, row_start, row_divisor)
    last = _first_pixel(stripe.to(tl.int64) + 1, height, rows, row_step, row_start, row_divisor)
    return batch, stripe, first.to(tl.int32), last.to(tl.int32), block * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)


@triton.jit
def _corner_offsets(
    stripe, x, height, width, column_step, column_start, column_divisor, logits_row_stride, logits_column_stride
):
    """Offsets of both rows of cells and, per column, of both columns of cells, and the weight of the second."""
    position = tl.maximum(x.to(tl.int64) * column_step + column_start, 0)
    position = tl.minimum(position, (width - 1).to(tl.int64) * column_divisor)
    low = position // column_divisor
    weight = (position - low * column_divisor).to(tl.float32) / column_divisor.to(tl.float32)
    high = tl.minimum(low + 1, width - 1)
    above = tl.maximum(stripe, 0) * logits_row_stride
    below = tl.minimum(stripe + 1, height - 1) * logits_row_stride
    return above, below, low * logits_column_stride, high * logits_column_stride, weight


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
def _row_weight(row, stripe, row_step, row_start, row_divisor):
    """The weight of the lower row of cells; outside the first and the last both are the same one."""
    rest = row * row_step + row_start - stripe * row_divisor
    return rest.to(tl.float32) / row_divisor.to(tl.float32)


@triton.jit
def _weight_of(weight_ptr, labels, mask):
    if weight_ptr is None:
        return tl.where(mask, 1.0, 0.0)
    else:
        return tl.load(weight_ptr + labels, mask=mask, other=0.0)


@triton.jit
def _labels(target_ptr, offsets, exists, ignore_index, n_classes, weight_ptr):
    """Label, whether its pixel counts, whether it names a class, and its weight, NaN where it counts and names none."""
    label = tl.load(target_ptr + offsets, mask=exists, other=0).to(tl.int64)
    counts = exists & (label != ignore_index)
    known = counts & (label >= 0) & (label < n_classes)
    weight = tl.where(counts & (known == 0), float("nan"), _weight_of(weight_ptr, label, known))
    return label, counts, known, weight


@triton.jit(do_not_specialize=[*GEOMETRY, *TARGET], do_not_specialize_on_alignment=["partial_ptr", "losses_ptr"])
def upsampled_loss_kernel(
    logits_ptr,
    target_ptr,
    weight_ptr,
    total_weight_ptr,
    losses_ptr,
    logsumexp_ptr,
    partial_ptr,
    n_classes,
    height,
    width,
    rows,
    columns,
    row_step: tl.int64,
    row_start: tl.int64,
    row_divisor: tl.int64,
    column_step: tl.int64,
    column_start: tl.int64,
    column_divisor: tl.int64,
    logits_batch_stride: tl.int64,
    logits_channel_stride: tl.int64,
    logits_row_stride: tl.int64,
    logits_column_stride: tl.int64,
    target_batch_stride: tl.int64,
    target_row_stride: tl.int64,
    target_column_stride: tl.int64,
    ignore_index: tl.int64,
    smoothing: tl.float32,
    SMOOTHING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Loss and logsumexp of each pixel, and the sums of losses and of label weights over the program's pixels.

    Grid: (B · (h + 1) · ⌈W / BLOCK_COLUMNS⌉,). losses, logsumexp (B, H, W) or None, partial (programs, 2), weight (K)
    or None, total_weight (1) or None for K.
    """
    batch, stripe, first, last, x = _own_pixels(height, rows, columns, row_step, row_start, row_divisor, BLOCK_COLUMNS)
    inside = x < columns
    corners = _corner_offsets(
        stripe, x, height, width, column_step, column_start, column_divisor, logits_row_stride, logits_column_stride
    )
    logits = logits_ptr + batch * logits_batch_stride
    target = target_ptr + batch * target_batch_stride + x.to(tl.int64) * target_column_stride
    out = (batch * rows) * columns + x
    share = smoothing / n_classes
    total_weight = n_classes.to(tl.float32)
    if total_weight_ptr is not None:
        total_weight = tl.load(total_weight_ptr)
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
            top, difference = _spread(logits + k * logits_channel_stride, corners, inside)
            new = ()
            for r in tl.static_range(ROWS):
                value = top + _row_weight(row + r, stripe, row_step, row_start, row_divisor) * difference
                new += (tl.maximum(largest[r], value),)
            largest = new
        for k in range(n_classes):
            top, difference = _spread(logits + k * logits_channel_stride, corners, inside)
            new_sums = ()
            new_smooth = ()
            for r in tl.static_range(ROWS):
                value = top + _row_weight(row + r, stripe, row_step, row_start, row_divisor) * difference
                below = value - largest[r]
                new_sums += (sums[r] + tl.exp2(below * _LOG2_E),)
                if SMOOTHING:
                    class_weight = 1.0
                    if weight_ptr is not None:
                        class_weight = tl.load(weight_ptr + k)
                    new_smooth += (smooth[r] - class_weight * below,)
                else:
                    new_smooth += (smooth[r],)
            sums = new_sums
            smooth = new_smooth
        for r in tl.static_range(ROWS):
            y = row + r
            exists = inside & (y < last)
            label, counts, known, of_label = _labels(
                target + y * target_row_stride, 0, exists, ignore_index, n_classes, weight_ptr
            )
            safe = tl.where(known, label, 0)
            top, difference = _spread(logits + safe * logits_channel_stride, corners, exists)
            at_label = top + _row_weight(y, stripe, row_step, row_start, row_divisor) * difference
            log_sum = tl.log(sums[r])
            loss = (1.0 - smoothing) * of_label * ((largest[r] - at_label) + log_sum)
            if SMOOTHING:
                loss += share * (total_weight * log_sum + smooth[r])
            loss = tl.where(counts, loss, 0.0)
            loss_sum += loss
            weight_sum += tl.where(counts, of_label, 0.0)
            if losses_ptr is not None:
                tl.store(losses_ptr + out + y * columns, loss, mask=exists)
            if logsumexp_ptr is not None:
                tl.store(logsumexp_ptr + out + y * columns, largest[r] + log_sum, mask=exists)
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * 2, tl.sum(loss_sum))
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * 2 + 1, tl.sum(weight_sum))


@triton.jit(do_not_specialize=GEOMETRY)
def upsampled_argmax_kernel(
    logits_ptr,
    out_ptr,
    n_classes,
    height,
    width,
    rows,
    columns,
    row_step: tl.int64,
    row_start: tl.int64,
    row_divisor: tl.int64,
    column_step: tl.int64,
    column_start: tl.int64,
    column_divisor: tl.int64,
    logits_batch_stride: tl.int64,
    logits_channel_stride: tl.int64,
    logits_row_stride: tl.int64,
    logits_column_stride: tl.int64,
    ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """The class with the largest logit, the first of several; NaN counts as the largest, as in PyTorch.

    Grid: (B · (h + 1) · ⌈W / BLOCK_COLUMNS⌉,). out (B, H, W).
    """
    batch, stripe, first, last, x = _own_pixels(height, rows, columns, row_step, row_start, row_divisor, BLOCK_COLUMNS)
    inside = x < columns
    corners = _corner_offsets(
        stripe, x, height, width, column_step, column_start, column_divisor, logits_row_stride, logits_column_stride
    )
    logits = logits_ptr + batch * logits_batch_stride
    for row in range(first, last, ROWS):
        largest = ()
        index = ()
        top, difference = _spread(logits, corners, inside)
        for r in tl.static_range(ROWS):
            largest += (top + _row_weight(row + r, stripe, row_step, row_start, row_divisor) * difference,)
            index += (tl.zeros((BLOCK_COLUMNS,), tl.int32),)
        for k in range(1, n_classes):
            top, difference = _spread(logits + k * logits_channel_stride, corners, inside)
            new_largest = ()
            new_index = ()
            for r in tl.static_range(ROWS):
                value = top + _row_weight(row + r, stripe, row_step, row_start, row_divisor) * difference
                wins = (value > largest[r]) | ((value != value) & (largest[r] == largest[r]))
                new_largest += (tl.where(wins, value, largest[r]),)
                new_index += (tl.where(wins, k, index[r]),)
            largest = new_largest
            index = new_index
        for r in tl.static_range(ROWS):
            y = row + r
            out = out_ptr + (batch * rows + y) * columns + x
            tl.store(out, index[r].to(tl.int64), mask=inside & (y < last))
