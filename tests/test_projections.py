"""Projections of both maps in one Function: gradients that accumulate, as matrices, as convolutions, and in parts."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import annnet_kernels as ak
from annnet_kernels.ops import Projections, registration
from annnet_kernels.ops.normalized import Levels

LEVELS = Levels([1, 3], [2, 3])
WIDTHS = {"low": 5, "high": 7, "key": 3, "query": 4, "skip": 6}


def plain(low, high, key_weight, key_bias, query_weight, query_bias, skip_weight):
    tokens = [F.adaptive_avg_pool2d(low, size).flatten(2) for size in zip(*LEVELS, strict=True)]
    maps = F.conv2d(low, key_weight, key_bias), F.conv2d(high, query_weight, query_bias), F.conv2d(high, skip_weight)
    return torch.cat(tokens, 2), *maps


def draw(layout):
    def a_map(channels, height, width):
        x = torch.randn(2, channels, height, width, dtype=torch.float64)
        return x.contiguous(memory_format=layout).requires_grad_()

    def parameter(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    low, high = a_map(WIDTHS["low"], 9, 8), a_map(WIDTHS["high"], 6, 5)
    key = parameter(WIDTHS["key"], WIDTHS["low"], 1, 1), parameter(WIDTHS["key"])
    query = parameter(WIDTHS["query"], WIDTHS["high"], 1, 1), parameter(WIDTHS["query"])
    return [low, high, *key, *query, parameter(WIDTHS["skip"], WIDTHS["high"], 1, 1)]


@pytest.mark.parametrize("as_matrices", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_gradients(layout, as_matrices, monkeypatch):
    """With whichever outputs have a gradient, and whichever operands want one."""
    monkeypatch.setattr(registration, "launches", lambda _: as_matrices)
    operands = draw(layout)
    outputs, expected = Projections.apply(*operands, LEVELS, None), plain(*operands)
    upstream = [torch.randn_like(out) for out in outputs]
    for used in itertools.product((True, False), repeat=4):
        if not any(used):
            continue
        pairs = [
            torch.autograd.grad(
                [out for out, use in zip(outs, used, strict=True) if use],
                operands,
                [grad for grad, use in zip(upstream, used, strict=True) if use],
                allow_unused=True,
                retain_graph=True,
            )
            for outs in (outputs, expected)
        ]
        for ours, theirs in zip(*pairs, strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs)
    for wanted in range(len(operands)):
        (ours,) = torch.autograd.grad(outputs, operands[wanted : wanted + 1], upstream, retain_graph=True)
        (theirs,) = torch.autograd.grad(expected, operands[wanted : wanted + 1], upstream, retain_graph=True)
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("as_matrices", [False, True])
def test_one_map_for_both(as_matrices, monkeypatch):
    """All three contributions to its gradient are added."""
    monkeypatch.setattr(registration, "launches", lambda _: as_matrices)
    _, high, _, _, weight, bias, skip_weight = draw(torch.channels_last)
    ours = Projections.apply(None, high, None, None, weight, bias, skip_weight, LEVELS, None)
    tokens = [F.adaptive_avg_pool2d(high, size).flatten(2) for size in zip(*LEVELS, strict=True)]
    theirs = torch.cat(tokens, 2), None, F.conv2d(high, weight, bias), F.conv2d(high, skip_weight)
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if b is not None]
    upstream = [torch.randn_like(b) for _, b in pairs]
    for a, b in pairs:
        torch.testing.assert_close(a, b)
    leaves = high, weight, bias, skip_weight
    gradients = (torch.autograd.grad([pair[side] for pair in pairs], leaves, upstream) for side in (0, 1))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("kind", ["AFNB", "APNB"])
def test_a_batch_of_gradients_where_work_is_launched(kind, monkeypatch):
    """As on a GPU, where products of weights are an operator of this package and sums are made in place."""
    monkeypatch.setattr(registration, "launches", lambda _: True)
    block = (ak.AFNB(6, 8, 8, 4, 4) if kind == "AFNB" else ak.APNB(8, 8, 4, 4)).double()
    torch.nn.init.normal_(block.stages[0].W.weight)
    channels = (6, 8) if kind == "AFNB" else (8,)
    maps = [torch.randn(2, c, 9, 10, dtype=torch.float64) for c in channels]
    maps = [x.contiguous(memory_format=torch.channels_last).requires_grad_() for x in maps]
    out, leaves = block(*maps), [*maps, *block.parameters()]
    upstreams = torch.randn(3, *out.shape, dtype=torch.float64)
    batched = torch.autograd.grad(out, leaves, upstreams, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, leaves, upstream, retain_graph=True) for upstream in upstreams]
    for found, expected in zip(batched, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(found, torch.stack(expected))
