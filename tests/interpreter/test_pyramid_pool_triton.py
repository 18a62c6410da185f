"""The Triton pooling: errors, layouts, cuts, bytes, isolation, memory manners; the prologue and its backward."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from helpers import LAYOUTS, random_map
from pool_rule import (
    GRAD_LAYOUTS,
    assert_pool_accurate,
    assert_rectified_accurate,
    levels,
    random_norm,
    random_token_gradient,
)
from torch import Tensor

import annnet_kernels as ak
from annnet_kernels.kernels import pyramid_pool as launches
from annnet_kernels.kernels.launch import INTERPRETER
from annnet_kernels.layouts import empty_tokens
from annnet_kernels.pyramid import num_tokens
from annnet_kernels.runtime.backends import interpreting

DEVICE = "cpu" if interpreting() else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OF_TRAINING = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SIZES = [1, 3, 6, 8]
SHORT = (1, (2, 3), 5)
CUT = (33, 80)
"""Rows and columns of a map that is cut in both: with few tokens, since each is a program that adds up parts."""
SEEDS = 1 if interpreting() else 5
"""A call takes a second or more in the interpreter. A wrong kernel is wrong by more than one draw scatters."""

SHAPES = [
    (2, 19, 13, 11),  # more than one block of channels in NCHW
    (1, 7, 5, 3),  # fewer rows and columns than bins
    (1, 5, 1, 20),
    (1, 3, 20, 1),
    (1, 9, 2, 70),  # walked from left to right
    (1, 2, 1, 1),
    (1, 68, 9, 40),  # several blocks of channels and tiles of columns; multiples of a vector
]
if not interpreting():
    SHAPES += [(2, 512, 97, 97), (4, 256, 128, 256), (3, 80, 65, 129)]


@pytest.fixture(autouse=True)
def _triton_backend():
    with ak.use_backend("triton"):
        yield


@OF_TRAINING
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy_of_shapes(shape, layout, dtype):
    assert_pool_accurate(shape, dtype, "triton", layout, device=DEVICE, seeds=SEEDS)
    assert ak.last_backend("pyramid_pool") == ak.last_backend("pyramid_pool_bwd") == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[2:])
def test_accuracy_of_views(layout, dtype):
    assert_pool_accurate((1, 9, 13, 11), dtype, "triton", layout, sizes=SHORT, device=DEVICE, seeds=SEEDS)


@OF_TRAINING
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("grad_layout", GRAD_LAYOUTS[1:])
def test_accuracy_of_gradient_layouts(grad_layout, layout, dtype):
    assert_pool_accurate((2, 16, 9, 11), dtype, "triton", layout, grad_layout, SHORT, DEVICE, SEEDS)


@pytest.mark.parametrize(("height", "dtype"), [(17, torch.float32), (2, torch.bfloat16)])
@pytest.mark.parametrize("sizes", [(1,), (11,), ((2, 5), 3), (1, 2, 3, 6), ((40, 3), (2, 40))], ids=str)
def test_accuracy_of_pyramids(sizes, height, dtype):
    assert_pool_accurate((1, 8, height, 41), dtype, "triton", "channels_last", sizes=sizes, device=DEVICE, seeds=SEEDS)


def forward_plan(x: Tensor, sizes: Sequence[int | tuple[int, int]] = SIZES):
    heights, widths = levels(sizes)
    tokens = empty_tokens(x, x.shape[0], x.shape[1], num_tokens(heights, widths))
    return launches.plan_forward(x, None, heights, widths, tokens, INTERPRETER)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("images", [(1, 4), (2, 5)], ids=str)
def test_maps_are_cut(images, layout, dtype):
    """Or the tests of this file would not see the sum of parts."""
    main, combine = forward_plan(random_map((*images, *CUT), dtype, layout, DEVICE), SHORT)
    assert main.arguments["split_rows"] <= 33 // 3
    assert main.arguments["tile_columns"] <= 80 // 2
    assert combine.kernel.__name__ == "pyramid_pool_combine_kernel"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_low_maps_are_walked_from_left_to_right(dtype):
    launch, *_ = forward_plan(random_map((1, 16, 2, 70), dtype, "channels_last", DEVICE))
    assert launch.arguments["transposed"] == 1
    assert launch.arguments["height"] == 70
    assert forward_plan(random_map((1, 16, 70, 70), dtype))[0].arguments["transposed"] == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_accuracy_of_cut_maps(layout, dtype):
    assert_pool_accurate((1, 4, *CUT), dtype, "triton", layout, sizes=SHORT, device=DEVICE, seeds=SEEDS)


def forward_and_backward(x: Tensor, grad: Tensor, channels_last: bool = False) -> tuple[Tensor, Tensor]:
    heights, widths = levels(SHORT)
    tokens = torch.ops.annnet.pyramid_pool(x, None, heights, widths)
    size = list(x.shape[2:])
    return tokens, torch.ops.annnet.pyramid_pool_bwd(grad, None, size, heights, widths, channels_last, "triton")


# Bytes


@contextlib.contextmanager
def counted_bytes() -> Iterator[dict[str, int]]:
    """Bytes that interpreted kernels load and store: the unmasked elements of every access."""
    from triton.runtime.interpreter import InterpreterBuilder

    count = {"load": 0, "store": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def counting(kind, access):
        def call(self, pointers, *arguments):
            mask = arguments[0 if kind == "load" else 1]
            count[kind] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8
            return access(self, pointers, *arguments)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpreterBuilder, "create_masked_load", counting("load", load))
        patch.setattr(InterpreterBuilder, "create_masked_store", counting("store", store))
        yield count


counted = pytest.mark.skipif(not interpreting(), reason="bytes are counted in Triton's interpreter")
COUNTED = [
    *(((1, 16, 97, 97), torch.float16, layout) for layout in ("nchw", "channels_last")),
    *(((1, 16, 33, 40), torch.float32, layout) for layout in ("nchw", "channels_last")),
    *(((1, 16, 1, 97), torch.float32, layout) for layout in ("nchw", "channels_last")),  # fewer pixels than tokens
    ((1, 16, 1, 97), torch.float16, "channels_last"),
    ((1, 16, 200, 3), torch.bfloat16, "channels_last"),
]


@counted
@pytest.mark.parametrize(("shape", "dtype", "layout"), COUNTED, ids=str)
def test_bytes(shape, dtype, layout):
    """The forward loads the map once, the backward writes its gradient once and reads no map; parts included."""
    x = random_map(shape, dtype, layout)
    grad = random_token_gradient(1, 16, 110, dtype)
    size = x.numel() * x.element_size()
    with counted_bytes() as forward:
        tokens = torch.ops.annnet.pyramid_pool(x, None, SIZES, SIZES)
    with counted_bytes() as backward:
        torch.ops.annnet.pyramid_pool_bwd(
            grad, None, list(shape[2:]), SIZES, SIZES, layout == "channels_last", "triton"
        )
    ratios = {
        "forward loads": forward["load"] / size,
        "forward stores": forward["store"] / size,
        "backward loads": backward["load"] / size,
        "backward stores": backward["store"] / size,
    }
    print(shape, layout, dtype, {name: round(ratio, 3) for name, ratio in ratios.items()})
    assert 1 <= ratios["forward loads"] <= 1.2
    assert ratios["backward stores"] == 1
    assert backward["load"] <= 4 * tokens.numel() * tokens.element_size()


@counted
@pytest.mark.parametrize("with_map", [False, True])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_bytes_of_rectified(layout, with_map):
    """Each pass reads y and the other gradient of z, if there is one, once; only the last writes a map, once."""
    y = random_map((1, 16, 65, 70), torch.bfloat16, layout)
    norm, means = random_norm(16), torch.randn(2, 16)
    gradients = random_token_gradient(1, 16, 110, torch.bfloat16), random_map(y.shape, y.dtype, layout)
    gradients = gradients if with_map else (gradients[0], None)
    operators, size = torch.ops.annnet, y.numel() * y.element_size()
    with counted_bytes() as forward:
        operators.pyramid_pool(y, norm, SIZES, SIZES)
    with counted_bytes() as sums:
        operators.bn_relu_bwd_sums(y, norm, *gradients, SIZES, SIZES, "triton")
    with counted_bytes() as backward:
        operators.bn_relu_bwd_input(y, norm, *gradients, means, 1, SIZES, SIZES, "triton")
    loads = [count["load"] / size for count in (forward, sums, backward)]
    stores = [count["store"] / size for count in (forward, sums, backward)]
    print(layout, with_map, "loads", [round(x, 3) for x in loads], "stores", [round(x, 3) for x in stores])
    assert 1 <= loads[0] <= 1.2
    assert all(1 + with_map <= ratio <= 1.2 + with_map for ratio in loads[1:])
    assert stores[0] <= 0.2
    assert stores[1] <= 0.05
    assert stores[2] == 1


# Isolation, determinism, memory


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(("bad", "dtype"), [(float("nan"), torch.float32), (float("inf"), torch.bfloat16)])
def test_non_finite_pixel_reaches_only_its_bins(layout, bad, dtype):
    x = random_map((1, 5, 33, 40), dtype, layout, DEVICE)
    row, column, channel = 16, 20, 3  # in two bins of some levels: on their edges
    x[0, channel, row, column] = bad
    spoiled = ~torch.ops.annnet.pyramid_pool(x, None, SIZES, SIZES).isfinite().cpu()
    regions = ak.token_regions(SIZES, (33, 40))
    holds = torch.tensor([r.top <= row < r.bottom and r.left <= column < r.right for r in regions])
    assert torch.equal(spoiled[0, channel], holds)
    assert spoiled.sum() == holds.sum()


@OF_TRAINING
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_non_finite_token_gradient_reaches_only_its_pixels(layout, dtype):
    grad = random_token_gradient(1, 5, 110, dtype, device=DEVICE)
    grad[0, 2, 60] = float("inf")
    dx = torch.ops.annnet.pyramid_pool_bwd(grad, None, [33, 40], SIZES, SIZES, layout == "channels_last", "triton")
    region = ak.token_regions(SIZES, (33, 40))[60]
    expected = torch.zeros(1, 5, 33, 40, dtype=torch.bool, device=DEVICE)
    expected[0, 2, region.top : region.bottom, region.left : region.right] = True
    assert torch.equal(~dx.isfinite(), expected)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_bitwise_deterministic(layout):
    x = random_map((2, 5, *CUT), torch.bfloat16, layout, DEVICE)
    grad = random_token_gradient(2, 5, 32, torch.bfloat16, device=DEVICE)
    for first, second in zip(forward_and_backward(x, grad), forward_and_backward(x, grad), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_of_none(dtype):
    x, grad = (torch.empty(0, 4, *size, dtype=dtype, device=DEVICE) for size in ((9, 9), (32,)))
    tokens, dx = forward_and_backward(x, grad)
    assert tokens.dtype == dx.dtype == dtype
    assert tokens.shape == (0, 4, 32)
    assert dx.shape == (0, 4, 9, 9)


def surrounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of x of the same strides in the middle of memory full of NaN, and that memory."""
    margin = 4096
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    memory = torch.full((span + 2 * margin,), float("nan"), dtype=x.dtype, device=x.device)
    inside = memory.as_strided(x.shape, x.stride(), margin)
    inside.copy_(x)
    return inside, memory


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(1, 19, 13, 35), (1, 16, 13, 40)], ids=str)
def test_touches_nothing_beyond_its_tensors(shape, channels_last):
    x = random_map(shape, torch.bfloat16, "channels_last" if channels_last else "nchw", DEVICE)
    grad = random_token_gradient(1, shape[1], 32, torch.bfloat16, device=DEVICE)
    heights, widths = levels(SHORT)
    expected = forward_and_backward(x, grad, channels_last)
    outputs = [surrounded(torch.zeros_like(t)) for t in expected]
    launches.pyramid_pool(surrounded(x)[0], None, heights, widths, outputs[0][0])
    launches.pyramid_pool_bwd(surrounded(grad)[0], None, shape[2:], heights, widths, channels_last, outputs[1][0])
    for (ours, memory), reference in zip(outputs, expected, strict=True):
        assert torch.equal(ours, reference)
        assert memory.isnan().sum() == memory.numel() - math.prod(ours.shape)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_offsets_beyond_32_bits(dtype):
    """Strides whose products exceed 2³¹ elements, on memory that is mostly never touched."""
    stride = 2**30 + 5
    memory = torch.empty(3 * stride, dtype=dtype, device=DEVICE)
    for strides in ((0, stride, 4, 1), (0, 4, stride, 1), (0, 12, 4, stride), (0, 1, stride, 3)):
        x = memory.as_strided((1, 3, 3, 3), strides)
        x.copy_(torch.randn(1, 3, 3, 3))
        far, near = (torch.ops.annnet.pyramid_pool(m, None, [1, 2], [1, 2]) for m in (x, x.contiguous()))
        assert torch.equal(far, near)


# The prologue


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_of_rectified_layouts(layout, dtype):
    assert_rectified_accurate((1, 9, 13, 11), dtype, "triton", layout, sizes=SHORT, device=DEVICE, seeds=SEEDS)
    for operator in ("pyramid_pool", "bn_relu_bwd_sums", "bn_relu_bwd_input"):
        assert ak.last_backend(operator) == "triton"


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("absent", ["with_tokens", "with_map", "with_statistics"])
def test_accuracy_of_what_may_be_absent(absent, layout):
    assert_rectified_accurate(
        (2, 16, 17, 24), torch.bfloat16, "triton", layout, sizes=SHORT, device=DEVICE, seeds=SEEDS, **{absent: False}
    )


@OF_TRAINING
def test_accuracy_of_cut_rectified_maps(dtype):
    shape = (2, 8, 33, 40)
    assert_rectified_accurate(shape, dtype, "triton", "channels_last", sizes=SHORT, device=DEVICE, seeds=SEEDS)


@OF_TRAINING
@pytest.mark.parametrize(("layout", "map_layout"), [("nchw", "channels_last"), ("channels_last", "expanded")])
def test_accuracy_of_maps_of_different_layouts(layout, map_layout, dtype):
    assert_rectified_accurate(
        (1, 9, 13, 11), dtype, "triton", layout, map_layout=map_layout, sizes=SHORT, device=DEVICE, seeds=SEEDS
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rectifying_keeps_nan(dtype):
    y = torch.randn(1, 4, 9, 9, device=DEVICE).to(dtype)
    y[0, 1, 4, 4] = float("nan")
    norm = random_norm(4, DEVICE)
    tokens = torch.ops.annnet.pyramid_pool(y, norm, [1], [1])
    assert torch.equal(tokens.isnan().flatten().cpu(), torch.tensor([False, True, False, False]))
    grad = torch.ones_like(y)
    dy = torch.ops.annnet.bn_relu_bwd_input(y, norm, None, grad, None, 1, [1], [1], "triton")
    assert dy[0, 1, 4, 4] == (norm[1][1] * norm[2][1]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rectified_batch_of_none(dtype):
    y, norm = torch.empty(0, 4, 9, 9, dtype=dtype, device=DEVICE), random_norm(4, DEVICE)
    assert torch.ops.annnet.pyramid_pool(y, norm, SIZES, SIZES).shape == (0, 4, 110)
    sums = torch.ops.annnet.bn_relu_bwd_sums(y, norm, None, y, SIZES, SIZES, "triton")
    assert torch.equal(sums.cpu(), torch.zeros(2, 4))
    assert torch.ops.annnet.bn_relu_bwd_input(y, norm, None, y, sums, 1, SIZES, SIZES, "triton").shape == y.shape
