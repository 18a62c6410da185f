"""Triton kernel of the gradient of upsampled logits; ``upsampled_kernels`` describes stripes and intervals."""

# mypy: disable-error-code="assignment"
# A tuple grows here by one tile per class.

from __future__ import annotations

import triton
import triton.language as tl

from .upsampled_kernels import _LOG2_E, GEOMETRY, GRAD, TARGET, _first_pixel, _labels, _row_weight


@triton.jit
def _load_corner(logits, k, n_classes, exists, offset, logits_channel_stride):
    mask = exists & (k < n_classes)
    return tl.load(logits + k * logits_channel_stride + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _from_left_lane(x, BLOCK_CLASSES: tl.constexpr, BLOCK_CELLS: tl.constexpr):
    """What the lane of the interval to the left holds."""
    lane = tl.maximum(tl.arange(0, BLOCK_CELLS) - 1, 0)
    return tl.gather(x, tl.broadcast_to(lane[None, :], (BLOCK_CLASSES, BLOCK_CELLS)), 1)


@triton.jit(do_not_specialize=[*GEOMETRY, *TARGET, *GRAD])
def upsampled_gradient_kernel(
    logits_ptr,
    target_ptr,
    weight_ptr,
    total_weight_ptr,
    grad_ptr,
    logsumexp_ptr,
    top_ptr,
    bottom_ptr,
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
    grad_batch_stride: tl.int64,
    grad_row_stride: tl.int64,
    grad_column_stride: tl.int64,
    gradient_batch_stride: tl.int64,
    gradient_channel_stride: tl.int64,
    gradient_row_stride: tl.int64,
    gradient_column_stride: tl.int64,
    ignore_index: tl.int64,
    smoothing: tl.float32,
    SMOOTHING: tl.constexpr,
    LANE_CLASSES: tl.constexpr,
    BLOCK_CLASSES: tl.constexpr,
    BLOCK_CELLS: tl.constexpr,
):
    """What a stripe adds to the gradient of the row of cells above it (``top``) and below it (``bottom``).

    Grid: (B · (h + 1) · ⌈K / (LANE_CLASSES · BLOCK_CLASSES)⌉ · ⌈w / (BLOCK_CELLS − 1)⌉,). A block has one lane more
    than cells: the first lane's interval ends at the first cell. top, bottom (B, K, h, w) float32 of the same strides,
    grad (B, H, W) by strides or None for 1, logsumexp (B, H, W).
    """
    index = tl.program_id(0)
    n_blocks = tl.cdiv(width, BLOCK_CELLS - 1)
    n_groups = tl.cdiv(n_classes, LANE_CLASSES * BLOCK_CLASSES)
    block, group = index % n_blocks, index // n_blocks % n_groups
    stripe = index // (n_blocks * n_groups) % (height + 1) - 1
    batch = (index // (n_blocks * n_groups * (height + 1))).to(tl.int64)
    first = _first_pixel(stripe.to(tl.int64), height, rows, row_step, row_start, row_divisor).to(tl.int32)
    last = _first_pixel(stripe.to(tl.int64) + 1, height, rows, row_step, row_start, row_divisor).to(tl.int32)

    cells = block * (BLOCK_CELLS - 1) - 1 + tl.arange(0, BLOCK_CELLS)
    exists = (cells < width)[None, :]
    wide = tl.minimum(cells, width - 1).to(tl.int64)
    first_column = _first_pixel(wide, width, columns, column_step, column_start, column_divisor).to(tl.int32)
    last_column = _first_pixel(wide + 1, width, columns, column_step, column_start, column_divisor).to(tl.int32)
    last_column = tl.where(cells < width, last_column, first_column)
    most = tl.max(last_column - first_column)
    # Left of the first cell and right of the last, that cell alone counts.
    only_right, only_left = cells < 0, cells >= width - 1
    left_offset = tl.maximum(wide, 0) * logits_column_stride
    right_offset = tl.minimum(wide + 1, width - 1) * logits_column_stride
    above = tl.maximum(stripe, 0) * logits_row_stride
    below = tl.minimum(stripe + 1, height - 1) * logits_row_stride

    logits = logits_ptr + batch * logits_batch_stride
    first_class = (group * BLOCK_CLASSES + tl.arange(0, BLOCK_CLASSES)) * LANE_CLASSES
    zero = tl.zeros((BLOCK_CLASSES, BLOCK_CELLS), tl.float32)
    top_left = ()
    top_right = ()
    bottom_left = ()
    bottom_right = ()
    d_top_left = ()
    d_top_right = ()
    d_bottom_left = ()
    d_bottom_right = ()
    for u in tl.static_range(LANE_CLASSES):
        k = (first_class + u)[:, None]
        top_left += (_load_corner(logits, k, n_classes, exists, above + left_offset[None, :], logits_channel_stride),)
        top_right += (_load_corner(logits, k, n_classes, exists, above + right_offset[None, :], logits_channel_stride),)
        bottom_left += (
            _load_corner(logits, k, n_classes, exists, below + left_offset[None, :], logits_channel_stride),
        )
        bottom_right += (
            _load_corner(logits, k, n_classes, exists, below + right_offset[None, :], logits_channel_stride),
        )
        d_top_left += (zero,)
        d_top_right += (zero,)
        d_bottom_left += (zero,)
        d_bottom_right += (zero,)

    share = smoothing / n_classes
    total_weight = n_classes.to(tl.float32)
    if total_weight_ptr is not None:
        total_weight = tl.load(total_weight_ptr)
    for row in range(first, last):
        row_weight = _row_weight(row, stripe, row_step, row_start, row_divisor)
        left = ()
        difference = ()
        d_left = ()
        d_right = ()
        for u in tl.static_range(LANE_CLASSES):
            at_left = top_left[u] + row_weight * (bottom_left[u] - top_left[u])
            left += (at_left,)
            difference += (top_right[u] + row_weight * (bottom_right[u] - top_right[u]) - at_left,)
            d_left += (zero,)
            d_right += (zero,)
        for step in range(most):
            x = first_column + step
            inside = x < last_column
            rest = x.to(tl.int64) * column_step + column_start - cells.to(tl.int64) * column_divisor
            column_weight = rest.to(tl.float32) / column_divisor.to(tl.float32)
            column_weight = tl.where(only_right, 1.0, tl.where(only_left, 0.0, column_weight))
            target = target_ptr + batch * target_batch_stride + row * target_row_stride
            label, counts, _, of_label = _labels(
                target, x.to(tl.int64) * target_column_stride, inside, ignore_index, n_classes, weight_ptr
            )
            logsumexp = tl.load(logsumexp_ptr + (batch * rows + row) * columns + x, mask=inside, other=0.0)
            upstream = tl.where(counts, 1.0, 0.0)
            if grad_ptr is not None:
                grad = grad_ptr + batch * grad_batch_stride + row * grad_row_stride
                upstream = tl.load(grad + x.to(tl.int64) * grad_column_stride, mask=counts, other=0.0)
            of_label = tl.where(counts, (1.0 - smoothing) * of_label * upstream, 0.0)
            factor = of_label
            even = upstream * share
            if SMOOTHING:
                factor += even * total_weight
            new_left = ()
            new_right = ()
            for u in tl.static_range(LANE_CLASSES):
                k = (first_class + u)[:, None]
                value = left[u] + column_weight[None, :] * difference[u]
                d_value = factor[None, :] * tl.exp2((value - logsumexp[None, :]) * _LOG2_E)
                d_value -= tl.where(k == label[None, :], of_label[None, :], 0.0)
                if SMOOTHING:
                    if weight_ptr is None:
                        d_value -= even[None, :]
                    else:
                        d_value -= even[None, :] * tl.load(weight_ptr + k, mask=k < n_classes, other=0.0)
                new_left += (d_left[u] + (1.0 - column_weight[None, :]) * d_value,)
                new_right += (d_right[u] + column_weight[None, :] * d_value,)
            d_left = new_left
            d_right = new_right
        # Above the first row of cells and below the last, that row alone counts.
        down = tl.where(stripe < 0, 1.0, tl.where(stripe >= height - 1, 0.0, row_weight))
        new_top_left = ()
        new_top_right = ()
        new_bottom_left = ()
        new_bottom_right = ()
        for u in tl.static_range(LANE_CLASSES):
            new_top_left += (d_top_left[u] + (1.0 - down) * d_left[u],)
            new_top_right += (d_top_right[u] + (1.0 - down) * d_right[u],)
            new_bottom_left += (d_bottom_left[u] + down * d_left[u],)
            new_bottom_right += (d_bottom_right[u] + down * d_right[u],)
        d_top_left = new_top_left
        d_top_right = new_top_right
        d_bottom_left = new_bottom_left
        d_bottom_right = new_bottom_right

    own = (tl.arange(0, BLOCK_CELLS) > 0) & (cells < width)
    for u in tl.static_range(LANE_CLASSES):
        k = (first_class + u)[:, None]
        mask = own[None, :] & (k < n_classes)
        offsets = batch * gradient_batch_stride + k * gradient_channel_stride
        offsets += stripe * gradient_row_stride + cells.to(tl.int64)[None, :] * gradient_column_stride
        top = d_top_left[u] + _from_left_lane(d_top_right[u], BLOCK_CLASSES, BLOCK_CELLS)
        bottom = d_bottom_left[u] + _from_left_lane(d_bottom_right[u], BLOCK_CLASSES, BLOCK_CELLS)
        tl.store(top_ptr + offsets, top, mask=mask & (stripe >= 0))
        tl.store(bottom_ptr + offsets + gradient_row_stride, bottom, mask=mask & (stripe + 1 < height))
