"""ANNNet: dilated ResNet, AFNB over its last two stages, APNB, classifier."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks
from .blocks.folding import merged_convolution
from .blocks.modules import AFNB, APNB
from .interop.checkpoint_files import read_state_dict
from .interop.checkpoints import CheckpointReport, head_options, load_state
from .pyramid import POOL_SIZES
from .reference.blocks import NormLayer, PlainAFNB, PlainAPNB, PoolSizes
from .runtime.tracers import symbolic

BACKBONES = ("resnet50", "resnet101")


class DilatedResNet(nn.Module):
    """torchvision's ResNet at output stride 8; returns the maps of its last two stages. Keys are torchvision's."""

    channels = (1024, 2048)

    def __init__(self, name: str, weights: Any = None) -> None:
        super().__init__()
        from torchvision.models import get_model

        resnet = get_model(name, weights=weights, replace_stride_with_dilation=[False, True, True])
        for child_name, child in resnet.named_children():
            if child_name not in ("avgpool", "fc"):
                self.add_module(child_name, child)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not symbolic(x):
            checks.feature_map("x", x, channels=3)
        low = high = x
        for child in self.children():
            low, high = high, child(high)
        return low, high


class ANNNet(nn.Module):
    """Asymmetric non-local network for semantic segmentation, output stride 8.

    backbone → AFNB(stage 4, stage 5) → 3 × 3 convolution to ``channels``, norm, ReLU → APNB → 1 × 1 classifier →
    bilinear to the size of the picture; an auxiliary head on stage 4 in training.

    Args:
        num_classes: channels of the logits.
        backbone: ``"resnet50"`` or ``"resnet101"`` (torchvision's, dilated), or a module that returns the maps of its
            last two stages and has an attribute ``channels``, their channel counts.
        aux: whether there is an auxiliary head.
        weights: weights of a named backbone, as torchvision's ``get_model`` takes them; None initialises at random.
        align_corners: how logits are resized to the picture.
        channels: width of the head (512 in the paper).
        key_channels, value_channels: widths of queries and keys, and of values (256 in the paper).
        dropout: probability of every ``Dropout2d`` of the head.
        norm_layer: called with a channel count, returns a normalisation module of the head.
        psp_size: pool sizes of both blocks.
        blocks: ``"fused"`` for :class:`AFNB` and :class:`APNB`, ``"plain"`` for the published forward.

    Shapes:
        x (B, 3, H, W), floating point → logits (B, num_classes, H, W); in training with ``aux`` a pair
        (logits, aux_logits) of that shape each. Called with ``upsample=False``, logits of the backbone's size, for
        :func:`annnet_kernels.upsampled_cross_entropy` and :func:`annnet_kernels.upsampled_argmax`, which spare the
        memory of the others.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        ModuleNotFoundError: a named backbone without torchvision installed.

    Source: Zhu et al. 2019, arXiv 1908.07678; keys ``fusion``, ``context``, ``cls``, ``dsn`` of MendelXu/ANN.

    Example:
        >>> import torch, annnet_kernels as ak
        >>> net = ak.ANNNet(num_classes=19).eval()
        >>> net(torch.randn(1, 3, 64, 64)).shape
        torch.Size([1, 19, 64, 64])
        >>> ak.upsampled_argmax(net(torch.randn(1, 3, 64, 64), upsample=False), (64, 64)).shape
        torch.Size([1, 64, 64])
    """

    checkpoint_report: CheckpointReport
    """What :meth:`from_checkpoint` loaded; only there on a network that it made."""

    def __init__(
        self,
        num_classes: int,
        backbone: str | nn.Module = "resnet50",
        aux: bool = True,
        weights: Any = None,
        *,
        align_corners: bool = False,
        channels: int = 512,
        key_channels: int = 256,
        value_channels: int = 256,
        dropout: float = 0.05,
        norm_layer: NormLayer = nn.BatchNorm2d,
        psp_size: PoolSizes = POOL_SIZES,
        blocks: str = "fused",
    ) -> None:
        super().__init__()
        checks.positive_int("num_classes", num_classes)
        checks.positive_int("channels", channels)
        checks.one_of("blocks", blocks, ("fused", "plain"))
        if isinstance(backbone, nn.Module):
            if weights is not None:
                raise ValueError("weights: expected None with a backbone module, which brings its own")
            self.backbone = backbone
        else:
            self.backbone = DilatedResNet(checks.one_of("backbone", backbone, BACKBONES), weights)
        low, high = checks.stage_channels("backbone", self.backbone)
        afnb, apnb = (AFNB, APNB) if blocks == "fused" else (PlainAFNB, PlainAPNB)
        options: dict[str, Any] = {"dropout": dropout, "norm_layer": norm_layer, "psp_size": psp_size}
        self.fusion = afnb(low, high, high, key_channels, value_channels, **options)
        self.context = nn.Sequential(
            nn.Conv2d(high, channels, kernel_size=3, padding=1),
            nn.Sequential(norm_layer(channels), nn.ReLU()),
            apnb(channels, channels, key_channels, value_channels, **options),
        )
        self.cls = nn.Conv2d(channels, num_classes, kernel_size=1)
        self.dsn = (
            nn.Sequential(
                nn.Conv2d(low, channels, kernel_size=3, padding=1),
                nn.Sequential(norm_layer(channels), nn.ReLU()),
                nn.Dropout2d(dropout),
                nn.Conv2d(channels, num_classes, kernel_size=1),
            )
            if aux
            else None
        )
        self.align_corners = align_corners

    @classmethod
    def from_checkpoint(
        cls, path: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = False, **options: Any
    ) -> ANNNet:
        """A network with the weights of a checkpoint of MendelXu/ANN, mmsegmentation or PaddleSeg.

        Its head is loaded, whatever the dialect; its backbone only if that is torchvision's. The attribute
        ``checkpoint_report`` of the network lists what stayed as initialised; ``print`` it.

        Args:
            path: a file or a mapping, as :func:`annnet_kernels.load_checkpoint` takes it.
            strict: refuse a file that leaves anything as initialised.
            **options: arguments of the constructor. Classes, widths and auxiliary head follow from the file, as does
                the backbone's depth. Not in a file are ``psp_size`` and ``align_corners`` (True in MendelXu/ANN).

        Raises:
            TypeError, FileNotFoundError, ValueError: as :func:`annnet_kernels.load_checkpoint`.
            ModuleNotFoundError: without torchvision, unless ``backbone`` is a module.

        Example:
            >>> import tempfile, torch, annnet_kernels as ak
            >>> with tempfile.NamedTemporaryFile(suffix=".pth") as file:
            ...     torch.save(ak.ANNNet(num_classes=19).state_dict(), file.name)
            ...     net = ak.ANNNet.from_checkpoint(file.name, strict=True, align_corners=True)
            >>> len(net.checkpoint_report.initialised)
            0
        """
        state = read_state_dict(path)
        net = cls(**(head_options(state) | options))
        net.checkpoint_report = load_state(net, state, strict=strict)
        return net

    def forward(self, x: Tensor, upsample: bool = True) -> Tensor | tuple[Tensor, Tensor]:
        if not symbolic(x):
            checks.feature_map("x", x)
        size = None if upsample is False else x.shape[2:]  # tracers pass the default as a stand-in without a value
        low, high = self.backbone(x)
        logits = self._resize(self.cls(self._context_of(low, high)), size)
        if self.dsn is None or not self.training:
            return logits
        return logits, self._resize(self.dsn(low), size)

    def _context_of(self, low: Tensor, high: Tensor) -> Tensor:
        """Behind AFNB, convolution and APNB; AFNB and convolution merged where they were folded."""
        merged = merged_convolution(self.fusion, self.context[0], low, high, through=(self.context,))
        return cast(Tensor, self.context(self.fusion(low, high)) if merged is None else self.context[1:](merged))

    def convolution_behind_fusion(self) -> nn.Conv2d | None:
        """The convolution that alone reads the AFNB's output; None where a subclass may route it otherwise."""
        usual = type(self).forward is ANNNet.forward and type(self.context).forward is nn.Sequential.forward
        return cast(nn.Conv2d, self.context[0]) if usual else None

    def _resize(self, logits: Tensor, size: torch.Size | None) -> Tensor:
        if size is None:
            return logits
        return F.interpolate(logits, size=size, mode="bilinear", align_corners=self.align_corners)
