"""Bin geometry of the pyramid: pure integers, shared by every implementation (mirrored by csrc/pyramid_geometry.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

POOL_SIZES: tuple[int, ...] = (1, 3, 6, 8)
"""The pyramid of the paper: 1² + 3² + 6² + 8² = 110 tokens."""


class TokenRegion(NamedTuple):
    """The rectangle of pixels that one token averages: rows top to bottom - 1, columns left to right - 1."""

    top: int
    bottom: int
    left: int
    right: int


def bin_edges(length: int, bins: int) -> list[tuple[int, int]]:
    """Half-open ranges of the ``bins`` bins over ``length`` pixels, as in ``AdaptiveAvgPool2d``.

    Neighbours overlap where ``bins`` does not divide ``length`` and repeat where ``bins > length``.
    """
    return [(i * length // bins, -(-(i + 1) * length // bins)) for i in range(bins)]


def num_tokens(heights: Sequence[int], widths: Sequence[int]) -> int:
    """Number of tokens T of a pyramid whose level ``i`` has ``heights[i]`` × ``widths[i]`` bins."""
    return sum(h * w for h, w in zip(heights, widths, strict=True))


def level_offsets(heights: Sequence[int], widths: Sequence[int]) -> list[int]:
    """Index of the first token of each level."""
    offsets, total = [], 0
    for h, w in zip(heights, widths, strict=True):
        offsets.append(total)
        total += h * w
    return offsets


def regions(heights: Sequence[int], widths: Sequence[int], height: int, width: int) -> list[TokenRegion]:
    """The rectangle of every token on a ``height`` × ``width`` map, in token order."""
    return [
        TokenRegion(top, bottom, left, right)
        for rows, columns in zip(heights, widths, strict=True)
        for top, bottom in bin_edges(height, rows)
        for left, right in bin_edges(width, columns)
    ]
