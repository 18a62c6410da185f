"""SegFormer's head: linear layers, resizing, concatenation, a 1×1 convolution; nothing nonlinear stands between them.

The linear layers fold into the convolution, which then runs at the resolution of each level.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..blocks.forward import epilogue
from .algebra import Size, fuse_projected
from .parts import Dialect, Join, Parts, SizeAt, join_of, size_of


def _fused(parts: Parts, maps: Sequence[Tensor], size: Size) -> Tensor:
    """The head up to its classifier; ``maps`` in the order of the concatenation."""
    conv = parts.join.conv
    projections = [(linear.weight, linear.bias) for linear in parts.projections]
    out = fuse_projected(maps, projections, conv.weight, conv.bias, size, align_corners=False)
    return epilogue(parts.join.tail, out)


def level_shapes(channels: Sequence[int], size_at: SizeAt, first: int = 0) -> list[tuple[int, int, int]]:
    """(C, H, W) of maps of these channels, the first at a stride of 4 · 2^first, each next one at twice the stride."""
    return [(count, *size_at(2 ** (first + 2 + i))) for i, count in enumerate(channels)]


# transformers: the levels finest first, concatenated in reverse.


def _transformers_parts(projections: str) -> Any:
    def parts(head: Any) -> Parts:
        levels = list(head.get_submodule(projections).children())
        join = join_of(head.linear_fuse, head.batch_norm, head.activation, head.dropout)
        return Parts(join, [level.proj for level in reversed(levels)], containers=levels)

    return parts


def _transformers_forward(head: Any, parts: Parts, features: Any) -> Tensor:
    maps = [_as_map(x) for x in features[: len(parts.projections)]]
    logits: Tensor = head.classifier(_fused(parts, maps[::-1], size_of(maps[0])))
    return logits


def _as_map(x: Tensor) -> Tensor:
    """A map (B, C, H, W); from tokens (B, N, C), which ``reshape_last_stage=False`` leaves, as transformers does it."""
    if x.dim() == 4:
        return x
    side = int(math.sqrt(x.shape[-1]))
    return x.reshape(x.shape[0], side, side, -1).permute(0, 3, 1, 2)


def _transformers_shapes(head: Any, parts: Parts, size_at: SizeAt) -> list[tuple[int, int, int]]:
    return level_shapes([linear.in_features for linear in reversed(parts.projections)], size_at)


# segmentation_models_pytorch: all stages of the encoder, the image first; concatenated coarsest first.


def _smp_parts(head: Any) -> Parts:
    levels = list(head.mlp_stage.children())
    return Parts(join_of(head.fuse_stage), [level.linear for level in levels], containers=levels)


def _smp_forward(head: Any, parts: Parts, features: Any) -> Tensor:
    height, width = size_of(features[0])
    stages = features[2:] if features[1].shape[1] == 0 else features[1:]
    maps = stages[::-1][: len(parts.projections)]
    return _fused(parts, maps, (height // 4, width // 4))


def _smp_shapes(head: Any, parts: Parts, size_at: SizeAt) -> list[tuple[int, int, int]]:
    """Encoders without a stage of stride 2 have four levels and an empty map in its place, others five."""
    channels = [linear.in_features for linear in reversed(parts.projections)]
    first = 0 if len(channels) <= 4 else -1
    empty = [] if first else [(0, *size_at(2))]
    return [(3, *size_at(1)), *empty, *level_shapes(channels, size_at, first)]


# The names of the paper's code, as they stand in many copies: one attribute per level, concatenated in reverse.


def _copy_parts(head: Any) -> Parts:
    levels = [getattr(head, f"linear_c{i}") for i in (4, 3, 2, 1)]
    tail = [head.dropout] if isinstance(head.dropout, nn.Module) else []
    return Parts(join_of(head.linear_fuse, *tail), [level.proj for level in levels], containers=levels)


def _copy_forward(head: Any, parts: Parts, features: Any) -> Tensor:
    if hasattr(head, "_transform_inputs"):
        features = head._transform_inputs(features)
    maps = list(features[:4])
    logits: Tensor = head.linear_pred(_fused(parts, maps[::-1], size_of(maps[0])))
    return logits


# mmsegmentation: a norm and a ReLU stand between the projections and the resizing.


def _mmseg_parts(head: Any) -> Parts:
    return Parts(Join(head.fusion_conv.conv, [], []))


def _never(head: Any, parts: Parts, features: Any) -> Tensor:
    raise AssertionError("a head that is always left alone was replaced")


def _why_not_mmseg(head: Any) -> str:
    return (
        "gains nothing: a norm and an activation per level stand ahead of the resizing, so that only the last "
        "convolution could move"
    )


DIALECTS = (
    *(
        Dialect(
            "SegFormer",
            f"transformers {version}",
            (projections, "linear_fuse", "batch_norm", "activation", "dropout", "classifier"),
            _transformers_parts(projections),
            _transformers_forward,
            _transformers_shapes,
        )
        for version, projections in ((4, "linear_c"), (5, "linear_projections"))
    ),
    Dialect(
        "SegFormer",
        "segmentation_models_pytorch",
        ("mlp_stage", "fuse_stage"),
        _smp_parts,
        _smp_forward,
        _smp_shapes,
    ),
    Dialect(
        "SegFormer",
        "names of the paper's code",
        (*(f"linear_c{i}.proj" for i in (1, 2, 3, 4)), "linear_fuse", "linear_pred"),
        _copy_parts,
        _copy_forward,
        _transformers_shapes,
    ),
    Dialect(
        "SegFormer",
        "mmsegmentation",
        ("convs", "fusion_conv.conv", "conv_seg"),
        _mmseg_parts,
        _never,
        lambda head, parts, size_at: [],
        _why_not_mmseg,
    ),
)
