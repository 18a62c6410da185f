"""Cross-entropy and argmax of upsampled logits in plain PyTorch, stripe by stripe.

The rows of pixels that lie between the same two rows of logits are a stripe. A stripe is upsampled, used and dropped,
so that no more of the full resolution exists than one stripe of one image, and its exponentials serve the loss and the
gradient. Every sum has a fixed order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..upsampling import Line, lines

_STRIPE_ROWS = 16
"""More rows than this between two rows of logits are several stripes."""


class _Stripe(NamedTuple):
    """Rows ``first`` to ``last - 1`` of pixels, between two rows of logits; ``weights`` (rows, 1) are of the second."""

    first: int
    last: int
    low: int
    high: int
    weights: Tensor


class _Columns:
    """Interpolation along a row: (…, w) → (…, W), and its transpose."""

    def __init__(self, cells: int, columns: Sequence[Line], like: Tensor) -> None:
        def integers(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, device=like.device, dtype=torch.int64)

        self.low, self.high = (integers([getattr(c, side) for c in columns]) for side in ("low", "high"))
        self.weight = torch.tensor([c.weight for c in columns], dtype=like.dtype, device=like.device)
        pairs: list[list[tuple[int, float]]] = [[] for _ in range(cells)]
        for pixel, column in enumerate(columns):
            pairs[column.low].append((pixel, 1 - column.weight))
            pairs[column.high].append((pixel, column.weight))
        # All rows as long as the longest: what fills them up reads a pixel of the same cell with the weight 0.
        longest = max(map(len, pairs))
        filled = [cell + [(cell[0][0] if cell else 0, 0.0)] * (longest - len(cell)) for cell in pairs]
        self.pixels = integers([pixel for cell in filled for pixel, _ in cell])
        self.shares = like.new_tensor([[share for _, share in cell] for cell in filled])

    def spread(self, x: Tensor) -> Tensor:
        return torch.lerp(x[..., self.low], x[..., self.high], self.weight)

    def gather(self, x: Tensor) -> Tensor:
        parts = x.index_select(-1, self.pixels).unflatten(-1, self.shares.shape)
        return torch.where(self.shares == 0, 0, parts * self.shares).sum(-1)


def _stripes(rows: Sequence[Line], like: Tensor) -> Iterator[_Stripe]:
    first = 0
    while first < len(rows):
        last = first + 1
        while last < len(rows) and rows[last].low == rows[first].low and last - first < _STRIPE_ROWS:
            last += 1
        weights = like.new_tensor([[line.weight] for line in rows[first:last]])
        yield _Stripe(first, last, rows[first].low, rows[first].high, weights)
        first = last


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _upsampled(image: Tensor, stripe: _Stripe, columns: _Columns) -> Tensor:
    """(K, rows, W) of one image (K, h, w)."""
    low, high = (columns.spread(image[:, row])[:, None] for row in (stripe.low, stripe.high))
    return torch.lerp(low, high, stripe.weights)


def upsampled_argmax_out(logits: Tensor, size: Sequence[int], align_corners: bool, out: Tensor) -> None:
    if out.numel() == 0:
        return
    like = logits.new_empty(0, dtype=_accumulator(logits))
    rows, widths = (lines(a, b, align_corners) for a, b in zip(logits.shape[2:], size, strict=True))
    columns = _Columns(logits.shape[3], widths, like)
    for image, target in zip(logits, out, strict=True):
        for stripe in _stripes(rows, like):
            upsampled = _upsampled(image.to(like.dtype), stripe, columns)
            target[stripe.first : stripe.last] = upsampled.argmax(0)


def check_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise IndexError for a label that names no class; on a GPU, where that would wait for it, do nothing."""
    if target.device.type != "cpu":
        return
    wrong = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    if wrong.numel():
        raise IndexError(
            f"target: expected labels from 0 to {classes - 1} or ignore_index, {ignore_index}, got {int(wrong[0])}"
        )


def upsampled_cross_entropy_out(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    per_pixel: bool,
    gradient: bool,
    losses: Tensor,
    sums: Tensor,
    unit_gradient: Tensor,
) -> None:
    _walk(
        (logits, target, weight),
        (ignore_index, label_smoothing, align_corners),
        None,
        losses if per_pixel else None,
        sums,
        unit_gradient if gradient else None,
    )


def upsampled_cross_entropy_bwd_out(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad: Tensor,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    dlogits: Tensor,
) -> None:
    options = (ignore_index, label_smoothing, align_corners)
    _walk((logits, target, weight), options, grad, None, None, dlogits)


def _walk(
    operands: tuple[Tensor, Tensor, Tensor | None],
    options: tuple[int, float, bool],
    grad: Tensor | None,
    losses: Tensor | None,
    sums: Tensor | None,
    gradient: Tensor | None,
) -> None:
    """Fill those of losses (B, H, W), sums (B, 2) and gradient (B, K, h, w) that are given.

    The gradient is that of the sum of the losses, each times its pixel's ``grad`` (B, H, W), 1 if that is None.
    """
    logits, target, weight = operands
    ignore_index, smoothing, align_corners = options
    classes = logits.shape[1]
    check_labels(target, classes, ignore_index)
    if target.numel() == 0:
        for output in (sums, gradient):
            if output is not None:
                output.zero_()
        return
    like = logits.new_empty(0, dtype=_accumulator(logits))
    rows, widths = (lines(a, b, align_corners) for a, b in zip(logits.shape[2:], target.shape[1:], strict=True))
    columns, stripes = _Columns(logits.shape[3], widths, like), list(_stripes(rows, like))
    weights = like.new_ones(classes) if weight is None else weight
    share = smoothing / classes  # of every class, by label smoothing
    total_weight = weights.sum()
    for index in range(logits.shape[0]):
        image = logits[index].to(like.dtype)
        total = like.new_zeros(2, dtype=torch.float64 if like.device.type != "mps" else like.dtype)
        collected = torch.zeros_like(image) if gradient is not None else None
        for stripe in stripes:
            span = slice(stripe.first, stripe.last)
            labels = target[index, span].long()
            valid = labels != ignore_index
            known = (labels >= 0) & (labels < classes)
            safe = labels.where(known, 0)[None]
            # A label that names no class makes its pixel NaN; on a CPU it has been refused.
            of_label = weights[safe[0]].where(valid, 0).masked_fill(valid & ~known, torch.nan)
            z = _upsampled(image, stripe, columns)
            z -= z.amax(0)
            at_label = z.gather(0, safe)[0]
            smooth = share * torch.tensordot(weights, z, 1) if smoothing else 0
            powers = z.exp_()
            sum_of_powers = powers.sum(0)
            logsumexp = sum_of_powers.log()
            factor = (1 - smoothing) * of_label
            loss = factor * (logsumexp - at_label)
            if smoothing:
                loss = loss + (share * total_weight * logsumexp - smooth)
            loss = loss.where(valid, 0)
            if losses is not None:
                losses[index, span] = loss
            if sums is not None:
                total += torch.stack((loss.sum(dtype=total.dtype), of_label.sum(dtype=total.dtype)))
            if collected is None:
                continue
            upstream = valid.to(like.dtype) if grad is None else grad[index, span].to(like.dtype).where(valid, 0)
            powers *= ((factor + share * total_weight) * upstream / sum_of_powers).where(valid, 0)
            powers.scatter_add_(0, safe, -(factor * upstream).where(valid, 0)[None])
            if smoothing:
                powers -= weights[:, None, None] * (share * upstream)
            second = (powers * stripe.weights).sum(1)
            collected[:, stripe.low] += columns.gather(powers.sum(1) - second)
            collected[:, stripe.high] += columns.gather(second)
        if sums is not None:
            sums[index] = total
        if gradient is not None and collected is not None:
            gradient[index] = collected
