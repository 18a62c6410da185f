"""A fused block and its plain twin, and the comparison of what one call of each leaves behind."""

import copy

import pytest
import torch
from block_rule import CLASSES, assert_same, build, draw_maps, output_weights, results

import annnet_kernels as ak

OURS = {f"{kind}, {way}": (kind, way) for kind in CLASSES for way in ("own", "replaced")}


def twins(name, **options):
    """A fused block, a plain one with the same parameters, and the kind of both."""
    kind, way = OURS[name]
    fused, plain = build(kind, **options)
    if way == "replaced":
        fused = copy.deepcopy(plain)
        assert ak.replace_blocks(fused).replaced
    return fused, plain, kind


@pytest.fixture(params=OURS)
def pair(request):
    """Our own blocks and replaced ones, each with its plain twin."""
    return twins(request.param)


def assert_equal_calls(fused, plain, kind, tolerance=1e-9, modes=(True, False), dtype=torch.float64):
    """Output, gradients and buffers, in training and evaluation; what is random draws the same."""
    maps, weights = [x.to(dtype) for x in draw_maps(kind)], output_weights(kind)
    for training in modes:
        found = []
        for block in (fused, plain):
            torch.manual_seed(2)
            found.append(results(block.train(training), maps, weights))
        assert_same(*found, tolerance=tolerance)


def changed_alike(pair, change):
    for block in pair[:2]:
        torch.manual_seed(1)
        change(block)
    return pair
