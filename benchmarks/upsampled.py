"""The loss and the prediction of upsampled logits: subjects of the benchmark, their labels, and the plain operations.

A case's ``size`` is that of the logits, its ``channels`` are the classes; pixels are eight times finer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import annnet_kernels as ak

LOSS, ARGMAX = "upsampled_cross_entropy", "upsampled_argmax"
SUBJECTS = (LOSS, ARGMAX)
IGNORED = 255
ARGMAX_BOUND = 0.02
"""Relative error of class indices: what a few pixels make whose two largest logits are within rounding."""


def pixel_size(size: Sequence[int]) -> tuple[int, int]:
    """(H, W) for logits of a size, as an output stride of 8 gives: 65 → 513, 64 → 512."""
    height, width = (8 * n - 7 if n % 2 else 8 * n for n in size)
    return height, width


def labels(batch: int, classes: int, size: Sequence[int]) -> Tensor:
    """(B, H, W) int64, a tenth of them ignored; the same in every call."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, *pixel_size(size))
    target = torch.randint(0, classes, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < 0.1] = IGNORED
    return target.to(torch.get_default_device())


def plain_loss(logits: Tensor, target: Tensor) -> Tensor:
    upsampled = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(upsampled, target, ignore_index=IGNORED)


def our_loss(logits: Tensor, target: Tensor) -> Tensor:
    return ak.upsampled_cross_entropy(logits, target, ignore_index=IGNORED)


def plain_argmax(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits, size, mode="bilinear", align_corners=False).argmax(1)


def function(subject: str, ours: bool, shape: tuple[int, int, int, int]) -> Callable[[Tensor], Tensor]:
    """What is measured for logits of this shape, as a function of them."""
    batch, classes, *size = shape
    if subject == ARGMAX:
        argmax, pixels = ak.upsampled_argmax if ours else plain_argmax, pixel_size(size)
        return lambda logits: argmax(logits, pixels)
    loss, target = our_loss if ours else plain_loss, labels(batch, classes, size)
    return lambda logits: loss(logits, target)
