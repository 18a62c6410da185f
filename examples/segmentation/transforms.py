"""Augmentation and normalisation, from torchvision's v2 transforms."""

from __future__ import annotations

from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from .data import IGNORE, Transform
from .options import Options

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which backbones were trained on


class RandomScale(v2.Transform):
    """Picture and labels enlarged or reduced by one random factor."""

    def __init__(self, smallest: float, largest: float) -> None:
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        factor = float(torch.empty(()).uniform_(self.smallest, self.largest))
        return {"size": [max(1, round(factor * length)) for length in TF.get_size(flat_inputs[0])]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(TF.resize, inpt, params["size"], antialias=True)


def training_transform(options: Options) -> Transform:
    """Random scale, crop, flip and colours; where a crop is larger than the picture, labels are void."""
    padding = {tv_tensors.Image: [round(255 * channel) for channel in MEAN], tv_tensors.Mask: IGNORE}
    return v2.Compose(
        [
            RandomScale(*options.scale),
            v2.RandomCrop(options.crop, pad_if_needed=True, fill=padding),
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(options.jitter, options.jitter, options.jitter, options.jitter / 4),
            evaluation_transform(),
        ]
    )


def evaluation_transform() -> Transform:
    """Normalised float32 pictures."""
    return v2.Compose(
        [
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(MEAN, STD),
            v2.ToPureTensor(),
        ]
    )
