"""Decode heads of other code bases and networks around them, as written and replaced: what the cases of heads measure.

Everything is built at random from configurations; a case whose package is not installed is left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import annnet_kernels as ak
from annnet_kernels.decode_heads.algebra import convolve_resized
from annnet_kernels.interop.replace_heads import dialect_of, retype

from .published import do_without_compiled_operators

CLASSES = 150
WIDTH = 512  # of the heads of UPerNet and PSPNet, as published

SEGFORMER_B0, SEGFORMER_B2 = "SegFormer-B0, transformers", "SegFormer-B2, transformers"
SWIN = "UPerNet with Swin-T, transformers"
PSP_HEAD = "PSPHead, mmsegmentation"
BOTTLENECK = "UPerNet's 3×3 bottleneck"

NETWORKS = (SEGFORMER_B0, SEGFORMER_B2, SWIN)
LAYERS = (PSP_HEAD, BOTTLENECK)
HEADS = (*NETWORKS, *LAYERS)
_PACKAGES = {PSP_HEAD: "mmseg", BOTTLENECK: None}


def is_available(subject: str) -> bool:
    """Whether the package that a case of heads needs is installed."""
    package = _PACKAGES.get(subject, "transformers")
    return package is None or importlib.util.find_spec(package) is not None


class Network(nn.Module):
    """A network of transformers: logits in evaluation, in training a loss.

    Args:
        model: the network.
        fused_loss: take the loss of this package from the small logits, instead of the loss that the network computes
            itself from resized ones.
    """

    def __init__(self, model: nn.Module, fused_loss: bool = False) -> None:
        super().__init__()
        self.model = model
        self.fused_loss = fused_loss

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            logits: Tensor = self.model(pixel_values=x).logits
            return logits
        pixels = torch.arange(x.shape[0] * x.shape[2] * x.shape[3], device=x.device)
        labels = (pixels * 7919 % CLASSES).view(x.shape[0], *x.shape[2:])
        if self.fused_loss:
            return ak.upsampled_cross_entropy(self.model(pixel_values=x).logits, labels).view(1)
        loss: Tensor = self.model(pixel_values=x, labels=labels).loss
        return loss.view(1)


class HeadOf(nn.Module):
    """A head that takes one map."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head([x])
        return logits


class Bottleneck(nn.Module):
    """The 3×3 convolution of UPerNet's head over maps at strides 4, 8, 16 and 32, norm and ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4 * WIDTH, WIDTH, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)

    def forward(self, *maps: Tensor) -> Tensor:
        return torch.relu(self.norm(self.convolve(maps)))

    def convolve(self, maps: tuple[Tensor, ...]) -> Tensor:
        size = maps[0].shape[2:]
        resized = [F.interpolate(z, size=size, mode="bilinear", align_corners=False) for z in maps[1:]]
        out: Tensor = self.conv(torch.cat([maps[0], *resized], 1))
        return out


class ReplacedBottleneck(Bottleneck):
    def convolve(self, maps: tuple[Tensor, ...]) -> Tensor:
        return convolve_resized(maps, self.conv.weight, None, (maps[0].shape[2], maps[0].shape[3]), False)


def _segformer(sizes: list[int], depths: list[int], width: int) -> nn.Module:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    none = {"drop_path_rate": 0.0, "hidden_dropout_prob": 0.0, "classifier_dropout_prob": 0.0}
    config = SegformerConfig(
        num_labels=CLASSES,
        hidden_sizes=sizes,
        depths=depths,
        num_attention_heads=[1, 2, 5, 8],
        decoder_hidden_size=width,
        **none,
    )
    return Network(SegformerForSemanticSegmentation(config))


def _swin() -> nn.Module:
    from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

    stages = [f"stage{i}" for i in (1, 2, 3, 4)]
    backbone = SwinConfig(
        embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], drop_path_rate=0.0, out_features=stages
    )
    config = UperNetConfig(backbone_config=backbone, hidden_size=WIDTH, num_labels=CLASSES, use_auxiliary_head=False)
    return Network(UperNetForSemanticSegmentation(config))


def _psp_head() -> nn.Module:
    do_without_compiled_operators()
    from mmseg.models.decode_heads import PSPHead

    options: dict[str, Any] = {"norm_cfg": {"type": "BN"}, "dropout_ratio": 0}
    return HeadOf(PSPHead(in_channels=2048, in_index=0, channels=WIDTH, num_classes=19, **options))


_BUILDERS: dict[str, Callable[[], nn.Module]] = {
    SEGFORMER_B0: lambda: _segformer([32, 64, 160, 256], [2, 2, 2, 2], 256),
    SEGFORMER_B2: lambda: _segformer([64, 128, 320, 512], [3, 4, 6, 3], 768),
    SWIN: _swin,
    PSP_HEAD: _psp_head,
    BOTTLENECK: Bottleneck,
}


def plain(subject: str) -> nn.Module:
    """As written."""
    return _BUILDERS[subject]()


def replaced(subject: str) -> nn.Module:
    """With its head replaced; parameters bear the same names."""
    if subject == BOTTLENECK:
        return ReplacedBottleneck()
    module = plain(subject)
    for head in module.modules():
        if (dialect := dialect_of(head)) is not None:
            retype(head, dialect)  # the benchmark compares by itself
            return module
    raise ValueError(f"{subject}: expected a head that can be replaced, found none")


def with_fused_loss(subject: str) -> nn.Module:
    """A network with its head replaced and the loss of this package."""
    module = replaced(subject)
    assert isinstance(module, Network)
    module.fused_loss = True
    return module
