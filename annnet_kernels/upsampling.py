"""Geometry of bilinear upsampling in integers, as ``F.interpolate`` defines it (mirror: csrc/cpu/upsampled_logits.cpp).

A pixel at position p of ``length_out`` lies at (p·a + b) / d of ``length_in``. The division is exact, so that the
weights of a pixel are rounded once; PyTorch computes the position in float32, whose error grows with the map.
"""

from __future__ import annotations

from typing import NamedTuple


class Line(NamedTuple):
    """Where a pixel lies along one axis: between the cells ``low`` and ``high``, of which ``high`` has the weight."""

    low: int
    high: int
    weight: float


def ratio(length_in: int, length_out: int, align_corners: bool) -> tuple[int, int, int]:
    """(a, b, d): pixel p lies at (p·a + b) / d."""
    if align_corners:
        return length_in - 1, 0, max(length_out - 1, 1)
    return 2 * length_in, length_in - length_out, 2 * length_out


def lines(length_in: int, length_out: int, align_corners: bool) -> list[Line]:
    """One :class:`Line` per pixel; outside the centres of the first and the last cell, these alone count."""
    step, start, divisor = ratio(length_in, length_out, align_corners)
    last = length_in - 1
    result = []
    for pixel in range(length_out):
        low, rest = divmod(pixel * step + start, divisor)
        if low < 0:
            low, rest = 0, 0
        elif low >= last:
            low, rest = last, 0
        result.append(Line(low, min(low + 1, last), rest / divisor))
    return result
