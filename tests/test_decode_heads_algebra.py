"""The algebra behind replaced heads: exact in float64, as accurate as plain PyTorch below that."""

import random

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate_as_plain, relative_error

from annnet_kernels.decode_heads import algebra

pytestmark = pytest.mark.usefixtures("one_thread")
EXACT = 1e-11


def plain_join(maps, weight, bias, size, align_corners):
    resized = [F.interpolate(z, size=size, mode="bilinear", align_corners=align_corners) for z in maps]
    return F.conv2d(torch.cat(resized, 1), weight, bias, padding=weight.shape[2] // 2)


def plain_fuse(maps, projections, weight, bias, size, align_corners):
    projected = [
        F.conv2d(x, linear[:, :, None, None], offset) for x, (linear, offset) in zip(maps, projections, strict=True)
    ]
    return plain_join(projected, weight, bias, size, align_corners)


def random_size(limit):
    return random.randint(1, limit), random.randint(1, limit)


def random_maps(batch, size, whole, layout=torch.contiguous_format):
    """One to four maps; the first of the result's size if ``whole``, the others smaller or larger."""
    sizes = [size] * whole + [random_size(12) for _ in range(random.randint(1, 3))]
    maps = [torch.randn(batch, random.randint(1, 6), *size, dtype=torch.float64) for size in sizes]
    return [x.contiguous(memory_format=layout).requires_grad_() for x in maps]


def parameter(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_equal_with_gradients(ours, plain, leaves):
    assert ours.shape == plain.shape
    assert relative_error(ours, plain) <= EXACT
    upstream = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, leaves, upstream)
    for got, want in zip(torch.autograd.grad(ours, leaves, upstream), expected, strict=True):
        assert (got - want).abs().max() <= EXACT * max(float(want.abs().max()), 1.0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("taps", [1, 3, 5])
def test_a_convolution_of_resized_maps(taps, align_corners, layout):
    random.seed(torch.initial_seed())
    for repetition in range(12):
        size = random_size(17)
        maps = random_maps(random.randint(1, 3), size, repetition % 3 > 0, layout)
        weight, bias = parameter(5, sum(z.shape[1] for z in maps), taps, taps), parameter(5)
        ours = algebra.convolve_resized(maps, weight, bias, size, align_corners)
        assert_equal_with_gradients(ours, plain_join(maps, weight, bias, size, align_corners), [*maps, weight, bias])


@pytest.mark.parametrize("align_corners", [False, True])
def test_projections_ahead_of_the_resizing(align_corners):
    random.seed(torch.initial_seed())
    for repetition in range(24):
        size = random_size(17)
        maps = random_maps(random.randint(1, 3), size, repetition % 3 > 0)
        projections = [(parameter(4, z.shape[1]), parameter(4) if repetition % 2 else None) for z in maps]
        weight, bias = parameter(5, 4 * len(maps), 1, 1), parameter(5) if repetition % 4 else None
        ours = algebra.fuse_projected(maps, projections, weight, bias, size, align_corners)
        plain = plain_fuse(maps, projections, weight, bias, size, align_corners)
        leaves = [*maps, weight, *(x for pair in projections for x in pair), bias]
        assert_equal_with_gradients(ours, plain, [x for x in leaves if x is not None])


def operands(dtype, taps):
    """Widths at which rounding, not chance, decides."""
    maps = [torch.randn(2, 48, *size).to(dtype).requires_grad_() for size in ((19, 17), (10, 9), (5, 4), (1, 1))]
    return maps, torch.nn.Parameter((torch.randn(40, 192, taps, taps) / (192 * taps**2) ** 0.5).to(dtype))


def results(function, maps, weight, upstream, **context):
    with torch.autocast("cpu", torch.bfloat16, **context):
        out = function(maps, weight)
    gradients = torch.autograd.grad(out, [*maps, weight], upstream.to(out.dtype))
    return {"out": out} | {f"gradient {i}": gradient for i, gradient in enumerate(gradients)}


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("how", ["float32", "bfloat16", "autocast"])
def test_as_accurate_as_plain(how, taps, align_corners):
    dtype = torch.bfloat16 if how == "bfloat16" else torch.float32

    def run(seed):
        maps, weight = operands(dtype, taps)
        upstream = torch.randn(2, 40, 19, 17)

        def ours(maps, weight):
            return algebra.convolve_resized(maps, weight, None, (19, 17), align_corners)

        def plain(maps, weight):
            return plain_join(maps, weight, None, (19, 17), align_corners)

        wide = [x.detach().double().requires_grad_() for x in (*maps, weight)]
        exact = results(plain, wide[:-1], wide[-1], upstream, enabled=False)
        autocast = how == "autocast"
        mine, theirs = (results(f, maps, weight, upstream, enabled=autocast) for f in (ours, plain))
        assert mine["out"].dtype == theirs["out"].dtype
        return mine, theirs, exact

    assert_as_accurate_as_plain(run, torch.float32 if how == "float32" else torch.bfloat16)


def test_bfloat16_levels_are_summed_in_float32(monkeypatch):
    """Two levels that cancel leave what float32 keeps of their difference; a sum in bfloat16 would round it away."""
    z = torch.full((1, 1, 2, 2), 1.0, dtype=torch.bfloat16)
    weight = torch.tensor([256.0, 1.0, -256.0], dtype=torch.bfloat16).view(1, 3, 1, 1)
    out = algebra.convolve_resized([z, z, z], weight, None, (4, 4), False)
    torch.testing.assert_close(out, torch.ones(1, 1, 4, 4, dtype=torch.bfloat16), rtol=0, atol=0)


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("length", "size"), [(1, 5), (5, 1), (2, 9), (6, 4), (7, 7), (3, 17)])
def test_the_matrix_is_that_of_interpolate(length, size, align_corners):
    units = torch.eye(length, dtype=torch.float64)[None]
    expected = F.interpolate(units, size=size, mode="linear", align_corners=align_corners)[0]
    ahead, straight, behind = algebra.resizing_matrix(
        length, size, align_corners, 3, torch.float64, torch.device("cpu")
    )
    torch.testing.assert_close(straight, expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(ahead, F.pad(expected, (1, 0))[:, :size], rtol=0, atol=1e-14)
    torch.testing.assert_close(behind, F.pad(expected, (0, 1))[:, 1:], rtol=0, atol=1e-14)


def test_projections_fold_only_where_that_costs_less():
    from torch.utils.flop_counter import FlopCounterMode

    for side in (1, 40):
        x, projection, weight = torch.randn(1, 24, side, side), (torch.randn(16, 24), None), torch.randn(16, 16, 1, 1)
        with FlopCounterMode(display=False) as counter:
            algebra.fuse_projected([x], [projection], weight, None, (side, side), False)
        folded = 16 * 16 * 24 + side**2 * 24 * 16
        twice = side**2 * 16 * (24 + 16)
        assert counter.get_total_flops() == 2 * min(folded, twice)
    assert folded < twice
