"""Probabilities for a picture of any size: whole, in windows, over scales and mirrored."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

Predictor = Callable[[Tensor], Tensor]
"""Pictures (B, 3, H, W) → class probabilities (B, C, H, W)."""


def whole_image(network: Callable[[Tensor], Tensor]) -> Predictor:
    """The network over the picture as it is; ``network`` returns logits."""
    return lambda image: network(image).softmax(1)


def sliding_window(predict: Predictor, window: int) -> Predictor:
    """Averaged over windows of ``window`` × ``window`` that overlap by at least a third."""

    def slide(image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        total, count = image.new_zeros(()), image.new_zeros(1, 1, height, width)
        for top, left in product(_starts(height, window), _starts(width, window)):
            rows, columns = slice(top, top + window), slice(left, left + window)
            part = predict(image[:, :, rows, columns])
            if total.dim() == 0:
                total = part.new_zeros(*part.shape[:2], height, width)
            total[:, :, rows, columns] += part
            count[:, :, rows, columns] += 1
        return total / count

    return slide


def in_one_window(image: Tensor, window: int) -> bool:
    """Whether :func:`sliding_window` would see the picture at once; without windows (0) it does."""
    return not window or max(image.shape[2:]) <= window


def _starts(length: int, window: int) -> list[int]:
    """First pixels of windows that cover ``length``, evenly spaced."""
    if length <= window:
        return [0]
    steps = math.ceil((length - window) / max(1, window * 2 // 3))
    return [round(i * (length - window) / steps) for i in range(steps + 1)]


def multi_scale(predict: Predictor, scales: Sequence[float], flip: bool) -> Predictor:
    """Averaged over resized and, with ``flip``, mirrored pictures."""

    def average(image: Tensor) -> Tensor:
        size = image.shape[2:]
        predictions = []
        for scale in scales:
            scaled = image if scale == 1 else _resize(image, [max(1, round(scale * length)) for length in size])
            predictions.append(_resize(predict(scaled), size))
            if flip:
                predictions.append(_resize(predict(scaled.flip(3)).flip(3), size))
        return torch.stack(predictions).mean(0)

    return average


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if x.shape[2:] == torch.Size(size):
        return x
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=False)
