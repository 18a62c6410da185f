"""Narrow decode heads of every code base that is installed, and maps for them."""

import importlib.util
import math
import warnings
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.published import do_without_compiled_operators

IMAGE = (64, 64)
"""For which narrow heads gain by replacement: interpolation costs the same for any width."""
PYRAMID_SIZES = ((13, 11), (7, 6), (4, 3), (2, 2))
NO_SIZE = (1, 1)
WIDTHS = (6, 8, 10, 12)


class Projection(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.proj = nn.Linear(inputs, outputs)

    def forward(self, x):
        return self.proj(x.flatten(2).transpose(1, 2))


class ConvNormActivation(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.activate = nn.ReLU()

    def forward(self, x):
        return self.activate(self.bn(self.conv(x)))


class PastedSegFormerHead(nn.Module):
    """A SegFormer head under the names that most copies in other repositories have."""

    mode, align_corners, activation = "bilinear", False, staticmethod(lambda x: x)

    def __init__(self, width=16, classes=5):
        super().__init__()
        for i, inputs in enumerate(WIDTHS, start=1):
            self.add_module(f"linear_c{i}", Projection(inputs, width))
        self.linear_fuse = ConvNormActivation(4 * width, width)
        self.dropout = nn.Dropout2d(0.1)
        self.linear_pred = nn.Conv2d(width, classes, 1)

    def forward(self, maps):
        size, resized = maps[0].shape[2:], []
        options = {} if self.mode == "nearest" else {"align_corners": self.align_corners}
        for i in (4, 3, 2, 1):
            x = maps[i - 1]
            z = self.activation(getattr(self, f"linear_c{i}")(x)).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])
            resized.append(F.interpolate(z, size=size, mode=self.mode, **options))
        return self.linear_pred(self.dropout(self.linear_fuse(torch.cat(resized, 1))))


class NearestSegFormerHead(PastedSegFormerHead):
    mode = "nearest"


class AlignedSegFormerHead(PastedSegFormerHead):
    align_corners = True


class ActivatedSegFormerHead(PastedSegFormerHead):
    activation = staticmethod(F.gelu)


class ReversedSegFormerHead(PastedSegFormerHead):
    """Written for maps that come coarsest first; they are of the same widths here."""

    def forward(self, maps):
        return super().forward([maps[0], maps[2], maps[1], maps[3]])


class OldTransformersHead(nn.Module):
    """SegFormer's head under the names of transformers before version 5."""

    def __init__(self, width=16, classes=5):
        super().__init__()
        self.linear_c = nn.ModuleList(Projection(inputs, width) for inputs in WIDTHS)
        self.linear_fuse = nn.Conv2d(4 * width, width, 1, bias=False)
        self.batch_norm = nn.BatchNorm2d(width)
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Conv2d(width, classes, 1)

    def forward(self, maps):
        size, resized = maps[0].shape[2:], []
        for x, projection in zip(maps, self.linear_c, strict=True):
            if x.dim() == 3:
                side = int(math.sqrt(x.shape[-1]))
                x = x.reshape(x.shape[0], side, side, -1).permute(0, 3, 1, 2)
            z = projection(x).transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])
            resized.insert(0, F.interpolate(z, size=size, mode="bilinear", align_corners=False))
        return self.classifier(self.dropout(self.activation(self.batch_norm(self.linear_fuse(torch.cat(resized, 1))))))


def _transformers_segformer():
    from transformers import SegformerConfig
    from transformers.models.segformer.modeling_segformer import SegformerDecodeHead

    return SegformerDecodeHead(SegformerConfig(hidden_sizes=list(WIDTHS), decoder_hidden_size=16, num_labels=5))


def _transformers_upernet():
    from transformers import UperNetConfig
    from transformers.models.upernet.modeling_upernet import UperNetHead

    return UperNetHead(UperNetConfig(hidden_size=16, num_labels=5), list(WIDTHS))


def _smp(name, **options):
    import segmentation_models_pytorch as smp

    modules = {
        "SegformerDecoder": smp.decoders.segformer.decoder,
        "UPerNetDecoder": smp.decoders.upernet.decoder,
        "PSPDecoder": smp.decoders.pspnet.decoder,
    }
    return getattr(modules[name], name)(**options)


def _mmseg(name, in_channels, in_index, **options):
    do_without_compiled_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mmseg.utils import register_all_modules

        register_all_modules(init_default_scope=True)
        from mmseg.registry import MODELS

        settings = {"channels": 16, "num_classes": 5, "norm_cfg": {"type": "BN"}, **options}
        return MODELS.build({"type": name, "in_channels": in_channels, "in_index": in_index, **settings})


@dataclass(frozen=True)
class Head:
    """How to build a head, the (C, H, W) of its features, and the package that it needs."""

    build: Any
    shapes: list
    package: str | None = None
    dialect: str = ""
    options: dict = field(default_factory=dict)

    def make(self):
        """In float64 and training mode, with random statistics; nothing starts at zero."""
        head = self.build(**self.options).double().train()
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.normal_(std=max(parameter[0].numel() if parameter.dim() > 1 else 4, 1) ** -0.5)
            for module in head.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)
        return head

    def maps(self, batch=2, dtype=torch.float64, sizes=None, layout=torch.contiguous_format):
        """Random features; ``sizes`` takes the place of those of the maps that the head reads, in order."""
        found, replacements = [], iter(sizes or ())
        for channels, height, width in self.shapes:
            if sizes and (height, width) != NO_SIZE:
                height, width = next(replacements)
            found.append(torch.randn(batch, channels, height, width, dtype=torch.float64).to(dtype))
        return [x.contiguous(memory_format=layout).requires_grad_() for x in found]


def _pyramid(channels=WIDTHS, sizes=PYRAMID_SIZES):
    return [(count, *size) for count, size in zip(channels, sizes, strict=True)]


_SMP, _TRANSFORMERS, _MMSEG = "segmentation_models_pytorch", "transformers", "mmseg"
_ENCODER = [3, 0, *WIDTHS]
ALL = {
    "SegFormer, transformers 4": Head(OldTransformersHead, _pyramid(), None, "SegFormer, transformers 4"),
    "SegFormer, pasted": Head(PastedSegFormerHead, _pyramid(), None, "SegFormer, names of the paper's code"),
    "SegFormer, transformers": Head(_transformers_segformer, _pyramid(), _TRANSFORMERS, "SegFormer, transformers"),
    "UPerNet, transformers": Head(_transformers_upernet, _pyramid(), _TRANSFORMERS, "UPerNet, transformers"),
    "SegFormer, smp": Head(
        lambda: _smp("SegformerDecoder", encoder_channels=_ENCODER, segmentation_channels=16),
        [(3, 52, 44), (0, 26, 22), *_pyramid()],
        _SMP,
        f"SegFormer, {_SMP}",
    ),
    "SegFormer, smp, five levels": Head(
        lambda: _smp("SegformerDecoder", encoder_channels=[3, 4, *WIDTHS], segmentation_channels=16),
        [(3, 52, 44), (4, 26, 22), *_pyramid()],
        _SMP,
        f"SegFormer, {_SMP}",
    ),
    "UPerNet, smp": Head(
        lambda: _smp("UPerNetDecoder", encoder_channels=_ENCODER, decoder_channels=16),
        [(3, *NO_SIZE), (1, *NO_SIZE), *_pyramid()],
        _SMP,
        f"UPerNet, {_SMP}",
    ),
    "PSPNet, smp": Head(
        lambda: _smp("PSPDecoder", encoder_channels=[3, 6, 40], out_channels=12), [(40, 7, 5)], _SMP, f"PSPNet, {_SMP}"
    ),
    "PSPNet, mmseg": Head(lambda: _mmseg("PSPHead", 12, 0), [(12, 7, 5)], _MMSEG, "PSPNet, mmsegmentation"),
    "PSPNet, mmseg, aligned": Head(
        lambda: _mmseg("PSPHead", 12, -1, align_corners=True), [(12, 7, 5)], _MMSEG, "PSPNet, mmsegmentation"
    ),
    "UPerNet, mmseg": Head(
        lambda: _mmseg("UPerHead", list(WIDTHS), [0, 1, 2, 3]), _pyramid(), _MMSEG, "UPerNet, mmsegmentation"
    ),
    "UPerNet, mmseg, aligned": Head(
        lambda: _mmseg("UPerHead", list(WIDTHS), [0, 1, 2, 3], align_corners=True, norm_cfg=None),
        _pyramid(),
        _MMSEG,
        "UPerNet, mmsegmentation",
    ),
}


def installed(package):
    return package is None or importlib.util.find_spec(package) is not None


def parameters(*names):
    """Heads for ``pytest.mark.parametrize``; those of a package that is not installed are skipped."""
    return [
        pytest.param(
            ALL[name],
            id=name,
            marks=pytest.mark.skipif(not installed(ALL[name].package), reason=f"{ALL[name].package} is not installed"),
        )
        for name in (names or ALL)
    ]
