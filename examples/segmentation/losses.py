"""Cross-entropy as a sum over pixels and their number: a mean over processes is not the mean of their means.

Logits come as small as the network makes them, and the loss upsamples them. Of a plain network they come at the size of
the labels, and the loss is PyTorch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import annnet_kernels as ak

from .data import IGNORE
from .distributed import Processes
from .options import Options


class Total(NamedTuple):
    """Summed loss of the pixels that count, and how many they are."""

    loss: Tensor
    pixels: Tensor


Criterion = Callable[..., Tensor]
"""``F.cross_entropy``, or what takes its arguments."""


def criterion_of(options: Options) -> Criterion:
    """The loss that belongs to the logits of ``options.blocks``."""
    return F.cross_entropy if options.blocks == "plain" else ak.upsampled_cross_entropy


def cross_entropy(logits: Tensor, labels: Tensor, criterion: Criterion = ak.upsampled_cross_entropy) -> Total:
    """Over all pixels that are not void; logits (B, C, h, w), labels (B, H, W)."""
    loss = criterion(logits, labels, ignore_index=IGNORE, reduction="sum")
    return Total(loss, (labels != IGNORE).sum().to(loss.dtype))


def hard_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    threshold: float,
    fraction: float,
    criterion: Criterion = ak.upsampled_cross_entropy,
) -> Total:
    """Over hard pixels (OHEM): those whose class has less than ``threshold`` probability, and the hardest of a picture.

    Which pixels count is decided picture by picture, so it does not depend on how a batch is spread over processes.
    """
    losses = criterion(logits, labels, ignore_index=IGNORE, reduction="none").flatten(1)
    valid = (labels != IGNORE).flatten(1)
    with torch.no_grad():
        ranked = losses.masked_fill(~valid, -1).sort(dim=1, descending=True).values
        kept = (valid.sum(1) * fraction).ceil().long().clamp(min=1)
        hardest = ranked.gather(1, kept[:, None] - 1)
        counts = valid & ((losses > -math.log(threshold)) | (losses >= hardest))
    return Total((losses * counts).sum(), counts.sum().to(losses.dtype))


def training_loss(
    outputs: Tensor | tuple[Tensor, Tensor], labels: Tensor, options: Options, processes: Processes
) -> tuple[Tensor, Tensor]:
    """What this process differentiates, and the loss of the whole batch, the same in all processes.

    DDP and FSDP average gradients over processes; the factor ``processes.count`` makes that the gradient of the sum.
    """
    logits, aux_logits = outputs if isinstance(outputs, tuple) else (outputs, None)
    criterion = criterion_of(options)
    if options.ohem:
        totals = [hard_cross_entropy(logits, labels, options.ohem_threshold, options.ohem_fraction, criterion)]
    else:
        totals = [cross_entropy(logits, labels, criterion)]
    weights = [1.0]
    if aux_logits is not None:
        totals.append(cross_entropy(aux_logits, labels, criterion))
        weights.append(options.aux_weight)
    everywhere = processes.sum(torch.stack([value.detach() for total in totals for value in total])).view(-1, 2)
    pixels = everywhere[:, 1].clamp(min=1)
    share = sum(w * total.loss / n for w, total, n in zip(weights, totals, pixels, strict=True)) * processes.count
    whole = (everywhere[:, 0] / pixels * everywhere.new_tensor(weights)).sum()
    return share, whole
