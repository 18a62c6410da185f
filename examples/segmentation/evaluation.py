"""Intersection over union on the validation pictures, by torchmetrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

import annnet_kernels as ak

from .data import IGNORE, Pictures
from .distributed import Processes, whole
from .inference import Predictor, in_one_window, multi_scale, sliding_window, whole_image
from .options import Options


class Scores(NamedTuple):
    """mIoU over the classes that occur, and the IoU of every class; NaN where neither truth nor prediction has it."""

    mean: float
    classes: dict[str, float]


Labeller = Callable[[Tensor], Tensor]
"""Pictures (B, 3, H, W) → class indices (B, H, W)."""


def labeller(network: nn.Module, options: Options, context: Callable[[], torch.autocast]) -> Labeller:
    """How the options evaluate a picture; probabilities are made where several are averaged."""
    averaged = options.flip or tuple(options.eval_scales) != (1.0,)
    predict = predictor(network, options, context)

    def label(image: Tensor) -> Tensor:
        if averaged or not in_one_window(image, options.window):
            return predict(image).argmax(1)
        with context():
            logits: Tensor = network(image, upsample=False)
        return ak.upsampled_argmax(logits, image.shape[2:])

    return label


def predictor(network: nn.Module, options: Options, context: Callable[[], torch.autocast]) -> Predictor:
    """The probabilities that the options average for a picture."""

    def logits(image: Tensor) -> Tensor:
        with context():
            out: Tensor = network(image)
        return out.to(image.dtype)

    predict = whole_image(logits)
    if options.window:
        predict = sliding_window(predict, options.window)
    if options.flip or tuple(options.eval_scales) != (1.0,):
        predict = multi_scale(predict, options.eval_scales, options.flip)
    return predict


@torch.no_grad()
def evaluate(
    network: nn.Module,
    pictures: Pictures,
    label: Labeller,
    processes: Processes,
    dtype: torch.dtype,
    seen: Callable[[], None] = lambda: None,
) -> Scores:
    """Scores over all pictures, each seen by one process; ``seen`` is called after each of this one's."""
    from torchmetrics.classification import MulticlassJaccardIndex

    classes = pictures.source.classes
    metric = MulticlassJaccardIndex(
        len(classes), average=None, ignore_index=IGNORE, zero_division=float("nan"), validate_args=False
    ).to(processes.device)
    network.eval()
    with whole(network):
        for index in range(processes.rank, len(pictures), processes.count):
            image, labels = pictures[0, index]
            predicted = label(image[None].to(processes.device, dtype))
            metric.update(predicted, labels[None].to(processes.device))
            seen()
    iou = metric.compute().double().cpu()
    return Scores(float(iou.nanmean()), dict(zip(classes, iou.tolist(), strict=True)))
