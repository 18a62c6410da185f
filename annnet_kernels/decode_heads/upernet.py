"""UPerNet's head: pyramid pooling of the coarsest map, a feature pyramid, and a 3×3 convolution over all its levels.

Both joins run at the resolution of what they join; what stands between them is called as it was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .parts import Dialect, Parts, Pyramid, SizeAt, join_maps, join_of, pool_and_join, size_of
from .pspnet import at_indices, classify, levels_of, pyramid_of, selected, why_not_selected
from .segformer import level_shapes


def _parts(head: Any) -> Parts:
    return Parts(join_of(head.fpn_bottleneck), pyramid=pyramid_of(head.psp_modules, head.bottleneck))


def _forward(head: Any, parts: Parts, features: Any) -> Tensor:
    assert parts.pyramid is not None
    align_corners = bool(head.align_corners)
    features = selected(head, features)
    laterals = [conv(features[i]) for i, conv in enumerate(head.lateral_convs)]
    laterals.append(pool_and_join(parts.pyramid, features[-1]))
    _add_coarser(laterals, align_corners)
    levels = [conv(laterals[i]) for i, conv in enumerate(head.fpn_convs)]
    levels.append(laterals[-1])
    return classify(head, join_maps(parts.join, levels, size_of(levels[0]), align_corners))


def _add_coarser(laterals: list[Tensor], align_corners: bool) -> None:
    """Add to every level the resized sum of the coarser ones, in place of the list's entries."""
    for i in range(len(laterals) - 1, 0, -1):
        coarser = F.interpolate(laterals[i], size_of(laterals[i - 1]), mode="bilinear", align_corners=align_corners)
        laterals[i - 1] = laterals[i - 1] + coarser


def _shapes(head: Any, parts: Parts, size_at: SizeAt) -> list[tuple[int, int, int]]:
    channels = [conv.conv.in_channels for conv in head.lateral_convs]
    return at_indices(head, level_shapes([*channels, _top_channels(parts.pyramid)], size_at))


def _top_channels(pyramid: Pyramid | None) -> int:
    """Channels of the pooled map: what the join reads beside its levels."""
    assert pyramid is not None
    conv = pyramid.join.conv
    return conv.in_channels - len(pyramid.levels) * conv.out_channels


def _smp_parts(head: Any) -> Parts:
    levels, containers = levels_of(head.psp.blocks)
    join = join_of(head.psp.out_conv)
    pyramid = Pyramid(levels, join, [*containers, head.psp], align_corners=False, map_first=True)
    return Parts(join_of(head.fusion_block), pyramid=pyramid)


def _smp_forward(head: Any, parts: Parts, features: Any) -> Tensor:
    assert parts.pyramid is not None
    maps = [norm(x) for norm, x in zip(head.feature_norms, features[2:], strict=True)]
    coarsest_first: list[Tensor] = [pool_and_join(parts.pyramid, maps[-1])]
    for block, lateral in zip(head.fpn_lateral_blocks, maps[-2::-1], strict=True):
        coarsest_first.append(block(coarsest_first[-1], lateral))
    for i, block in enumerate(head.fpn_conv_blocks, start=1):
        coarsest_first[i] = block(coarsest_first[i])
    return join_maps(parts.join, coarsest_first[::-1], size_of(coarsest_first[-1]), align_corners=False)


def _smp_shapes(head: Any, parts: Parts, size_at: SizeAt) -> list[tuple[int, int, int]]:
    channels: Sequence[int] = [norm.normalized_shape[0] for norm in head.feature_norms]
    return [(3, *size_at(1)), (1, *size_at(2)), *level_shapes(channels, size_at)]


DIALECTS = (
    *(
        Dialect(
            "UPerNet",
            code,
            ("psp_modules", "bottleneck", "lateral_convs", "fpn_convs", "fpn_bottleneck", classifier),
            _parts,
            _forward,
            _shapes,
            why_not_selected,
        )
        for code, classifier in (("transformers", "classifier"), ("mmsegmentation", "conv_seg"))
    ),
    Dialect(
        "UPerNet",
        "segmentation_models_pytorch",
        ("feature_norms", "psp.blocks", "psp.out_conv", "fpn_lateral_blocks", "fpn_conv_blocks", "fusion_block"),
        _smp_parts,
        _smp_forward,
        _smp_shapes,
    ),
)
