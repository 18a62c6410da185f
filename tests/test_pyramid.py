"""Bin geometry: what every implementation of the pooling is built on."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from annnet_kernels import pyramid


def test_bins_are_those_of_adaptive_average_pooling():
    """Pooling the unit vectors shows which pixels a bin holds."""
    for length in (1, 2, 3, 7, 8, 33, 97, 130):
        pixels = torch.eye(length, dtype=torch.float64)[None]
        for bins in (1, 2, 3, 5, 6, 8, 13, 97, 130):
            held = F.adaptive_avg_pool1d(pixels, bins)[0] > 0  # (pixel, bin)
            for index, (start, end) in enumerate(pyramid.bin_edges(length, bins)):
                assert held[:, index].nonzero().flatten().tolist() == list(range(start, end)), (length, bins, index)


@settings(max_examples=300, deadline=None)
@given(length=st.integers(1, 5000), bins=st.integers(1, 300))
def test_what_the_kernels_rely_on(length, bins):
    """Bins cover every pixel in order, and neighbours share at most one: so a cut crosses at most one bin."""
    edges = pyramid.bin_edges(length, bins)
    assert edges[0][0] == 0
    assert edges[-1][1] == length
    for (start, end), (following, _) in itertools.pairwise(edges):
        assert start < end
        assert start <= following
        assert end - 1 <= following <= end


@pytest.mark.parametrize("sizes", [((1, 3, 6, 8), (1, 3, 6, 8)), ((2, 5), (7, 1))])
def test_tokens_are_numbered_level_by_level(sizes):
    heights, widths = sizes
    regions = pyramid.regions(heights, widths, 40, 30)
    assert len(regions) == pyramid.num_tokens(heights, widths)
    for offset, h, w in zip(pyramid.level_offsets(heights, widths), heights, widths, strict=True):
        level = regions[offset : offset + h * w]
        assert [(r.top, r.bottom) for r in level[::w]] == pyramid.bin_edges(40, h)
        assert [(r.left, r.right) for r in level[:w]] == pyramid.bin_edges(30, w)
