"""Pictures with a class per pixel: a folder, and torchvision's VOC, Cityscapes and pets, read alike.

Whatever a data set calls its classes, labels leave here as 0 to C-1, and IGNORE where the truth is void.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import datasets, tv_tensors
from torchvision.transforms.v2 import functional as TF

from .errors import DataError
from .options import Options

IGNORE = 255
_INVALID = 254

CAMVID = ("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist")
VOC = ("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow")
VOC += ("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor")
PICTURES = (".jpg", ".jpeg", ".png")

Transform = Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[Tensor, Tensor]]


class Source(NamedTuple):
    """Where the pictures come from: pairs of PIL pictures, the classes, and the class of every label value."""

    pairs: Any
    names: Callable[[int], str]
    classes: Sequence[str]
    label_map: dict[int, int]


class Pictures(Dataset[tuple[Tensor, Tensor]]):
    """(picture (3, H, W), labels (H, W) uint8), transformed; the random ones as ``(epoch, index)`` decides.

    A key (epoch, index) seeds the augmentation, so that it does not depend on who loads the picture, or when.
    """

    def __init__(self, source: Source, transform: Transform, seed: int = 0) -> None:
        self.source, self.transform, self.seed = source, transform, seed
        self.table = torch.full((256,), _INVALID, dtype=torch.uint8)
        self.table[list(source.label_map)] = torch.tensor(list(source.label_map.values()), dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.source.pairs)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor]:
        epoch, index = key
        image, labels = self.source.pairs[index]
        pair = tv_tensors.Image(TF.pil_to_tensor(image.convert("RGB"))), self._labels(image, labels, index)
        generator, state = torch.default_generator, torch.default_generator.get_state()
        generator.manual_seed(int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1)[0]))
        try:
            return self.transform(*pair)
        finally:
            generator.set_state(state)

    def _labels(self, image: Image.Image, labels: Image.Image, index: int) -> tv_tensors.Mask:
        name = self.source.names(index)
        if image.size != labels.size:
            (width, height), (label_width, label_height) = image.size, labels.size
            raise DataError(f"{name}: the picture is {width}×{height}, its labels are {label_width}×{label_height}")
        values = np.asarray(labels)
        if values.ndim != 2 or values.dtype != np.uint8:
            raise DataError(f"{name}: expected labels of one 8-bit channel, got mode {labels.mode}")
        classes = self.table[torch.from_numpy(values.astype(np.int64))]
        if (classes == _INVALID).any():
            value = int(values[(classes == _INVALID).numpy()][0])
            known = ", ".join(str(v) for v in self.source.label_map)
            raise DataError(f"{name}: label {value} is no class of this data set; known are {known}")
        return tv_tensors.Mask(classes)


class _Folder:
    """Pairs of ROOT/SPLIT/images/NAME.* and ROOT/SPLIT/labels/NAME.png."""

    def __init__(self, root: Path, split: str) -> None:
        images, labels = (_existing(root / split / kind) for kind in ("images", "labels"))
        self.images = sorted(path for path in images.iterdir() if path.suffix.lower() in PICTURES)
        if not self.images:
            raise DataError(f"{images}: no pictures ({', '.join(PICTURES)}) in this folder")
        self.labels = [labels / f"{path.stem}.png" for path in self.images]
        if missing := [path for path in self.labels if not path.exists()]:
            raise DataError(f"{missing[0]}: no such file; {len(missing)} of {len(self.images)} pictures lack labels")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, Image.Image]:
        return Image.open(self.images[index]), Image.open(self.labels[index])


def open_source(options: Options, split: str) -> Source:
    """The pictures of a split, ``"train"`` or ``"val"``."""
    root = options.data if options.download else _existing(options.data)
    try:
        return _OPEN[options.dataset](root, split, options)
    except RuntimeError as error:  # how torchvision says that files are missing
        raise DataError(f"{root}: no {options.dataset} data set here ({error})") from error


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder")
    return folder


def _camvid(root: Path, split: str, options: Options) -> Source:
    return _folder_source(_Folder(root, split), CAMVID, void=len(CAMVID))


def _folder(root: Path, split: str, options: Options) -> Source:
    return _folder_source(_Folder(root, split), [str(i) for i in range(options.num_classes)], options.void)


def _folder_source(pairs: _Folder, classes: Sequence[str], void: int) -> Source:
    return Source(pairs, lambda i: str(pairs.images[i]), classes, {void: IGNORE} | {i: i for i in range(len(classes))})


def _voc(root: Path, split: str, options: Options) -> Source:
    pairs = datasets.VOCSegmentation(str(root), image_set=split, download=options.download)
    return Source(pairs, lambda i: pairs.images[i], VOC, {255: IGNORE} | {i: i for i in range(len(VOC))})


def _cityscapes(root: Path, split: str, options: Options) -> Source:
    pairs = datasets.Cityscapes(str(root), split=split, mode="fine", target_type="semantic")
    evaluated = [kind for kind in pairs.classes if kind.train_id not in (-1, 255)]
    label_map = {kind.id: IGNORE for kind in pairs.classes if kind.id >= 0} | {k.id: k.train_id for k in evaluated}
    return Source(pairs, lambda i: pairs.images[i], [kind.name for kind in evaluated], label_map)


def _pets(root: Path, split: str, options: Options) -> Source:
    pairs = datasets.OxfordIIITPet(
        str(root), "trainval" if split == "train" else "test", "segmentation", download=options.download
    )
    label_map = {1: 1, 2: 0, 3: IGNORE}  # animal, background, outline
    return Source(pairs, lambda i: f"picture {i} of {root}", ("background", "animal"), label_map)


_OPEN: dict[str, Callable[[Path, str, Options], Source]] = {
    "camvid": _camvid,
    "folder": _folder,
    "voc": _voc,
    "cityscapes": _cityscapes,
    "pets": _pets,
}
