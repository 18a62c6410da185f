"""PSPNet's head: a map and its pyramid of pooled maps, resized, concatenated and convolved.

The part of the convolution that reads a pooled map runs on its few pixels.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .parts import Dialect, Level, Parts, Pyramid, SizeAt, join_of, pool_and_join

STRIDE = 8
"""Of the map that PSPNet's backbones make."""


def levels_of(blocks: Any) -> tuple[list[Level], list[nn.Module]]:
    """The levels of a pyramid, and the modules around them: each block calls a pooling and then its other children."""
    levels, containers = [], []
    for block in blocks:
        pool, *branch = getattr(block, "layers", block.children())  # transformers calls its list, not its children
        levels.append(Level(pool, branch))
        containers.append(block)
    return levels, containers


def pyramid_of(pooling: Any, bottleneck: nn.Module) -> Pyramid:
    """Of mmsegmentation's and transformers' heads: the map ahead of its levels; the bottleneck joins them."""
    levels, containers = levels_of(getattr(pooling, "blocks", pooling.children()))
    return Pyramid(levels, join_of(bottleneck), [*containers, pooling], bool(pooling.align_corners), map_first=True)


def classify(head: Any, x: Tensor) -> Tensor:
    """Logits: by mmsegmentation's method, or by the dropout and the classifier that it calls, where a copy has them."""
    if hasattr(head, "cls_seg"):
        logits: Tensor = head.cls_seg(x)
        return logits
    if isinstance(getattr(head, "dropout", None), nn.Module):
        x = head.dropout(x)
    classifier = head.classifier if hasattr(head, "classifier") else head.conv_seg
    logits = classifier(x)
    return logits


def selected(head: Any, features: Any) -> Any:
    """What mmsegmentation's heads select of the backbone's maps; heads without a selection take all."""
    return head._transform_inputs(features) if hasattr(head, "_transform_inputs") else features


def why_not_selected(head: Any) -> str | None:
    """Why the maps that a head would select are not known."""
    transform = getattr(head, "input_transform", None)
    if transform not in (None, "multiple_select"):
        return f"input_transform is {transform!r}, supported are None and 'multiple_select'"
    return None


def at_indices(head: Any, shapes: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """The maps where mmsegmentation's heads expect them in the list of the backbone's maps."""
    found = getattr(head, "in_index", None)
    indices = list(range(len(shapes))) if found is None else [found] if isinstance(found, int) else list(found)
    length = max(max(indices) + 1, -min(indices))
    placed = [(1, 1, 1)] * length
    for index, shape in zip(indices, shapes, strict=True):
        placed[index] = shape
    return placed


def _mmseg_parts(head: Any) -> Parts:
    pyramid = pyramid_of(head.psp_modules, head.bottleneck)
    return Parts(pyramid.join, pyramid=pyramid)


def _mmseg_forward(head: Any, parts: Parts, features: Any) -> Tensor:
    assert parts.pyramid is not None
    x = selected(head, features)
    return classify(head, pool_and_join(parts.pyramid, x if isinstance(x, Tensor) else x[-1]))


def _mmseg_shapes(head: Any, parts: Parts, size_at: SizeAt) -> list[tuple[int, int, int]]:
    return at_indices(head, [(_width_of_map(parts.pyramid), *size_at(STRIDE))])


def _width_of_map(pyramid: Pyramid | None) -> int:
    """Channels of the map that is pooled: those that the first convolution behind a pooling reads."""
    assert pyramid is not None
    module = nn.ModuleList(pyramid.levels[0].branch)
    return next(m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d))


def _smp_parts(head: Any) -> Parts:
    blocks = list(head.psp.blocks)
    levels, containers = levels_of([block.pool for block in blocks])
    join = join_of(head.conv, head.dropout)
    pyramid = Pyramid(levels, join, [*containers, *blocks, head.psp], align_corners=True, map_first=False)
    return Parts(join, pyramid=pyramid)


def _smp_forward(head: Any, parts: Parts, features: Any) -> Tensor:
    assert parts.pyramid is not None
    return pool_and_join(parts.pyramid, features[-1])


def _smp_shapes(head: Any, parts: Parts, size_at: SizeAt) -> list[tuple[int, int, int]]:
    return [(_width_of_map(parts.pyramid), *size_at(STRIDE))]


DIALECTS = (
    Dialect(
        "PSPNet",
        "mmsegmentation",
        ("psp_modules", "bottleneck", "conv_seg"),
        _mmseg_parts,
        _mmseg_forward,
        _mmseg_shapes,
        why_not_selected,
    ),
    Dialect(
        "PSPNet",
        "segmentation_models_pytorch",
        ("psp.blocks", "conv", "dropout"),
        _smp_parts,
        _smp_forward,
        _smp_shapes,
    ),
)
