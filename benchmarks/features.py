"""Real input: photographs, and the feature maps that the model's backbone makes of them.

No weights can be downloaded where this runs, so the backbone is initialised at random from a fixed seed and normalises
with the statistics of the picture. The maps then have the spatial structure and the rectified, skewed values of real
ones, not their meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import annnet_kernels as ak

from . import heads, upsampled
from .cases import CLASSES, MODEL, PAIR, Case

NOTE = "backbone ResNet-50 initialised at random (seed 0), normalising with each picture's own statistics"
Maps = tuple[Tensor, ...]
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".tif", ".tiff", ".webp"}
MAX_PICTURES = 16
FEW_PIXELS = 5000  # maps of so many take 80 MB at most
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's weights expect


def find_pictures(path: str | None) -> list[Path]:
    """The pictures of a file or folder; by default the photograph that matplotlib ships."""
    if path is None:
        import matplotlib

        return [Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"]
    root = Path(path)
    if not root.exists():
        raise ValueError(f"--images: {path} does not exist")
    found = [root] if root.is_file() else sorted(p for p in root.iterdir() if p.suffix.lower() in SUFFIXES)
    if not found:
        raise ValueError(f"--images: no picture ({', '.join(sorted(SUFFIXES))}) in {path}")
    return found[:MAX_PICTURES]


def randomise(module: nn.Module, seed: int) -> nn.Module:
    """Fresh parameters from a seed. The projections W, which start at zero, become random: else nothing attends."""
    torch.manual_seed(seed)
    for name, child in module.named_modules():
        if isinstance(child, (nn.Conv2d, nn.BatchNorm2d)):
            child.reset_parameters()
        if isinstance(child, nn.BatchNorm2d):
            nn.init.uniform_(child.weight, 0.5, 1.5)
            nn.init.normal_(child.bias, std=0.1)
        if isinstance(child, nn.Conv2d) and name.rsplit(".", 1)[-1] == "W":
            nn.init.normal_(child.weight, std=child.in_channels**-0.5)
            nn.init.normal_(child.bias, std=0.1)
    return module


class Features:
    """Maps for every case, made from the same pictures.

    Args:
        pictures: files; a batch takes them in turn, each time cropped elsewhere.
        device: where the backbone runs and the maps lie.
    """

    def __init__(self, pictures: list[Path], device: torch.device) -> None:
        self.pictures = pictures
        self.device = device
        self._model: ak.ANNNet | None = None
        self._cache: dict[tuple[int, ...], dict[str, Maps]] = {}

    def images(self, size: tuple[int, int], batch: int) -> Tensor:
        """(B, 3, H, W) float32, normalised."""
        from PIL import Image

        height, width = size
        random = np.random.default_rng(0)
        crops = []
        for index in range(batch):
            with Image.open(self.pictures[index % len(self.pictures)]) as file:
                picture = file.convert("RGB")
            factor = max(height / picture.height, width / picture.width) * random.uniform(1.0, 1.25)
            wide, high = (max(n, round(side * factor)) for n, side in zip((width, height), picture.size, strict=True))
            picture = picture.resize((wide, high), Image.Resampling.BILINEAR)
            left, top = random.integers(wide - width + 1), random.integers(high - height + 1)
            crops.append(np.asarray(picture, dtype=np.float32)[top : top + height, left : left + width] / 255)
        pixels = (np.stack(crops) - np.float32(MEAN)) / np.float32(DEVIATION)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(self.device)

    def maps(self, case: Case) -> Maps:
        """The float32 inputs of a case: image; low and high; the map; a pyramid; or query, key map and value map."""
        if case.subject == MODEL or case.subject in heads.NETWORKS:
            return (self.images(case.size, case.batch),)
        if case.subject in upsampled.SUBJECTS:
            return self._kept(self._logits, case)
        if case.subject == "asymmetric_attention":
            return self._kept(self._projections, case)
        if case.subject == heads.BOTTLENECK:
            return self._kept(self._pyramid, case)
        low, high = self._kept(self._stages, case)
        if case.subject in ("AFNB", PAIR):
            return low, high
        return (high,) if case.channels == high.shape[1] else self._kept(self._refined, case)

    def _kept(self, make: Callable[[Case], Maps], case: Case) -> Maps:
        """``make(case)``, which counts for its size; large maps leave with the next size: batches take gigabytes."""
        size = (*case.size, case.batch)
        if size not in self._cache:
            self._cache = {kept: made for kept, made in self._cache.items() if prod(kept) <= FEW_PIXELS}
        made = self._cache.setdefault(size, {})
        key = f"{make.__name__} {case.channels}" if case.subject in upsampled.SUBJECTS else make.__name__
        if key not in made:
            with torch.no_grad():
                made[key] = make(case)
        return made[key]

    def _stages(self, case: Case) -> Maps:
        """Maps of the backbone's last two stages, exactly of the case's size."""
        height, width = case.size
        images = self.images((8 * height - 7, 8 * width - 7), case.batch)
        stages = [self._backbone().backbone(picture) for picture in images.split(1)]
        return tuple(torch.cat(level) for level in zip(*stages, strict=True))

    def _pyramid(self, case: Case) -> Maps:
        """Four maps, each of half the size of the one before: the APNB's map, averaged."""
        (finest,) = self._kept(self._refined, case)
        return tuple(torch.nn.functional.avg_pool2d(finest, 2**level) for level in range(4))

    def _logits(self, case: Case) -> Maps:
        """Channels of the backbone's last stage, scaled like logits."""
        _, high = self._kept(self._stages, case)
        chosen = high[:, : case.channels].clone()
        return (chosen * (2 / chosen.std()),)

    def _refined(self, case: Case) -> Maps:
        """The map that the APNB takes."""
        model = self._backbone()
        low, high = self._kept(self._stages, case)
        return (_by_picture(lambda *stages: model.context[:2](model.fusion(*stages)), low, high),)

    def _projections(self, case: Case) -> Maps:
        """What the APNB makes of its map: query, key (the same projection) and value."""
        (refined,) = self._kept(self._refined, case)
        stage = self._backbone().context[2].stages[0]
        query = _by_picture(stage.f_query, refined)
        return query, query.clone(), _by_picture(stage.f_value, refined)

    def _backbone(self) -> ak.ANNNet:
        """In training mode: normalising with the picture's own statistics keeps a random network's values in range."""
        if self._model is None:
            with torch.random.fork_rng(devices=[]):
                model = randomise(ak.ANNNet(CLASSES, blocks="plain", dropout=0.0), seed=0)
            self._model = model.to(self.device).train()
        return self._model


def _by_picture(function: Callable[..., Tensor], *maps: Tensor) -> Tensor:
    """function(maps), one picture at a time, to keep the peak of a large batch small."""
    return torch.cat([function(*one) for one in zip(*(m.split(1) for m in maps), strict=True)])
