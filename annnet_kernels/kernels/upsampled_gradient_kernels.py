"""Triton kernel of the gradient of upsampled logits; ``upsampled_kernels`` describes stripes and intervals."""

# mypy: disable-error-code="assignment"
# A tuple grows here by one tile per class.

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .operands import integer
from .upsampled_kernels import LOG2_E, TARGET, count, first_pixel, labels_of, own_stripe, row_weight

_IN_THE_LOOP = ["column_step", "column_start", "column_divisor", "target_column_stride", "grad_column_stride"]


class GradientTile(NamedTuple):
    """Constexpr: ``cells`` intervals side by side, and ``classes`` groups of ``lane_classes`` each."""

    lane_classes: Any
    classes: Any
    cells: Any


@triton.jit
def _load_corner(image, k, n_classes, exists, offset, logits_channel_stride):
    mask = exists & (k < n_classes)
    return tl.load(image + k * logits_channel_stride + offset, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _from_left_lane(x):
    """What the lane of the interval to the left holds."""
    lane = tl.maximum(tl.arange(0, x.shape[1]) - 1, 0)
    return tl.gather(x, tl.broadcast_to(lane[None, :], x.shape), 1)


@triton.jit(do_not_specialize=[*TARGET, *_IN_THE_LOOP])
def upsampled_gradient_kernel(
    logits,
    target,
    weights,
    grad,
    logsumexp_ptr,
    top,
    bottom_ptr,
    n_classes,
    rows,
    columns,
    column_step: tl.int64,
    column_start: tl.int64,
    column_divisor: tl.int64,
    logits_channel_stride: tl.int64,
    target_column_stride: tl.int64,
    grad_column_stride: tl.int64,
    ignore_index: tl.int64,
    smoothing: tl.float32,
    SMOOTHING: tl.constexpr,
    tile,
):
    """What a stripe adds to the gradient of the row of cells above it (``top``) and below it (``bottom``).

    Grid: (B · (h + 1) · ⌈K / (tile.lane_classes · tile.classes)⌉ · ⌈w / (tile.cells − 1)⌉,). A block has one lane more
    than cells: the first lane's interval ends at the first cell. top, bottom (B, K, h, w) float32 of the same strides,
    grad (B, H, W) by strides or None for 1, logsumexp (B, H, W).
    """
    index = tl.program_id(0)
    width, height = count(columns.cells), count(rows.cells)
    n_blocks = tl.cdiv(width, tile.cells - 1)
    n_groups = tl.cdiv(n_classes, tile.lane_classes * tile.classes)
    block, group = index % n_blocks, index // n_blocks % n_groups
    batch, stripe, first, last = own_stripe(index // (n_blocks * n_groups), rows)

    cells = block * (tile.cells - 1) - 1 + tl.arange(0, tile.cells)
    exists = (cells < width)[None, :]
    wide = tl.minimum(cells, width - 1).to(tl.int64)
    first_column = first_pixel(wide, columns)
    last_column = tl.where(cells < width, first_pixel(wide + 1, columns), first_column)
    most = tl.max(last_column - first_column)
    # Left of the first cell and right of the last, that cell alone counts.
    only_right, only_left = cells < 0, cells >= width - 1
    left_offset = tl.maximum(wide, 0) * integer(logits.strides.column)
    right_offset = tl.minimum(wide + 1, width - 1) * integer(logits.strides.column)
    above = tl.maximum(stripe, 0) * integer(logits.strides.row)
    below = tl.minimum(stripe + 1, height - 1) * integer(logits.strides.row)

    image = logits.pointer + batch * integer(logits.strides.batch)
    first_class = (group * tile.classes + tl.arange(0, tile.classes)) * tile.lane_classes
    zero = tl.zeros((tile.classes, tile.cells), tl.float32)
    top_left = ()
    top_right = ()
    bottom_left = ()
    bottom_right = ()
    d_top_left = ()
    d_top_right = ()
    d_bottom_left = ()
    d_bottom_right = ()
    for u in tl.static_range(tile.lane_classes):
        k = (first_class + u)[:, None]
        top_left += (_load_corner(image, k, n_classes, exists, above + left_offset[None, :], logits_channel_stride),)
        top_right += (_load_corner(image, k, n_classes, exists, above + right_offset[None, :], logits_channel_stride),)
        bottom_left += (_load_corner(image, k, n_classes, exists, below + left_offset[None, :], logits_channel_stride),)
        bottom_right += (
            _load_corner(image, k, n_classes, exists, below + right_offset[None, :], logits_channel_stride),
        )
        d_top_left += (zero,)
        d_top_right += (zero,)
        d_bottom_left += (zero,)
        d_bottom_right += (zero,)

    share = smoothing / n_classes
    total_weight = n_classes.to(tl.float32)
    if weights.total is not None:
        total_weight = tl.load(weights.total)
    for row in range(first, last):
        below_weight = row_weight(row, stripe, rows)
        first_of_row = (batch * count(rows.pixels) + row) * count(columns.pixels)
        left = ()
        difference = ()
        d_left = ()
        d_right = ()
        for u in tl.static_range(tile.lane_classes):
            at_left = top_left[u] + below_weight * (bottom_left[u] - top_left[u])
            left += (at_left,)
            difference += (top_right[u] + below_weight * (bottom_right[u] - top_right[u]) - at_left,)
            d_left += (zero,)
            d_right += (zero,)
        for step in range(most):
            x = first_column + step
            inside = x < last_column
            rest = x * column_step + column_start - cells * column_divisor
            column_weight = rest.to(tl.float32) / column_divisor.to(tl.float32)
            column_weight = tl.where(only_right, 1.0, tl.where(only_left, 0.0, column_weight))
            labels = target.pointer + batch * integer(target.strides.batch) + row * integer(target.strides.row)
            label, counts, _, of_label = labels_of(
                labels, x * target_column_stride, inside, ignore_index, n_classes, weights.of_class
            )
            logsumexp = tl.load(logsumexp_ptr + first_of_row + x, mask=inside, other=0.0)
            upstream = tl.where(counts, 1.0, 0.0)
            if grad.pointer is not None:
                of_row = grad.pointer + batch * integer(grad.strides.batch) + row * integer(grad.strides.row)
                upstream = tl.load(of_row + x * grad_column_stride, mask=counts, other=0.0)
            of_label = tl.where(counts, (1.0 - smoothing) * of_label * upstream, 0.0)
            factor = of_label
            even = upstream * share
            if SMOOTHING:
                factor += even * total_weight
            new_left = ()
            new_right = ()
            for u in tl.static_range(tile.lane_classes):
                k = (first_class + u)[:, None]
                value = left[u] + column_weight[None, :] * difference[u]
                d_value = factor[None, :] * tl.exp2((value - logsumexp[None, :]) * LOG2_E)
                d_value -= tl.where(k == label[None, :], of_label[None, :], 0.0)
                if SMOOTHING:
                    if weights.of_class is None:
                        d_value -= even[None, :]
                    else:
                        d_value -= even[None, :] * tl.load(weights.of_class + k, mask=k < n_classes, other=0.0)
                new_left += (d_left[u] + (1.0 - column_weight[None, :]) * d_value,)
                new_right += (d_right[u] + column_weight[None, :] * d_value,)
            d_left = new_left
            d_right = new_right
        # Above the first row of cells and below the last, that row alone counts.
        down = tl.where(stripe < 0, 1.0, tl.where(stripe >= height - 1, 0.0, below_weight))
        new_top_left = ()
        new_top_right = ()
        new_bottom_left = ()
        new_bottom_right = ()
        for u in tl.static_range(tile.lane_classes):
            new_top_left += (d_top_left[u] + (1.0 - down) * d_left[u],)
            new_top_right += (d_top_right[u] + (1.0 - down) * d_right[u],)
            new_bottom_left += (d_bottom_left[u] + down * d_left[u],)
            new_bottom_right += (d_bottom_right[u] + down * d_right[u],)
        d_top_left = new_top_left
        d_top_right = new_top_right
        d_bottom_left = new_bottom_left
        d_bottom_right = new_bottom_right

    own = (tl.arange(0, tile.cells) > 0) & (cells < width)
    for u in tl.static_range(tile.lane_classes):
        k = (first_class + u)[:, None]
        mask = own[None, :] & (k < n_classes)
        offsets = batch * integer(top.strides.batch) + k * integer(top.strides.channel)
        offsets += stripe * integer(top.strides.row) + cells[None, :] * integer(top.strides.column)
        upper = d_top_left[u] + _from_left_lane(d_top_right[u])
        lower = d_bottom_left[u] + _from_left_lane(d_bottom_right[u])
        tl.store(top.pointer + offsets, upper, mask=mask & (stripe >= 0))
        tl.store(bottom_ptr + offsets + integer(top.strides.row), lower, mask=mask & (stripe + 1 < height))
