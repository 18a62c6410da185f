"""The C++ pooling on the CPU: every layout and dtype, out-of-range memory, rounding, threads."""

from __future__ import annotations

import pytest
import torch
from helpers import LAYOUTS, assert_as_accurate_as_plain, random_map
from hypothesis import given, settings, strategies as st
from pool_rule import assert_pool_accurate, assert_rounded
from torch import Tensor

import annnet_kernels as ak
from annnet_kernels import pyramid, reference
from annnet_kernels.runtime import native

if native.why_not("cpu") is not None:
    pytest.skip(f"native: {native.why_not('cpu')}", allow_module_level=True)

from annnet_kernels import _C

pytestmark = pytest.mark.usefixtures("one_thread")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (1, 3, 6, 8)
LARGEST_HALF = 65504.0


def _pool(x: Tensor, heights: list[int], widths: list[int]) -> Tensor:
    with ak.use_backend("native"):
        return ak.pyramid_pool(x, list(zip(heights, widths, strict=True)))


def _spread(grad: Tensor, x: Tensor, heights: list[int], widths: list[int], backend: str = "native") -> Tensor:
    channels_last = x.stride(1) == 1
    return torch.ops.annnet.pyramid_pool_bwd(grad, None, list(x.shape[2:]), heights, widths, channels_last, backend)


def test_the_extension_serves_cpu_tensors_by_itself() -> None:
    x = torch.randn(1, 4, 9, 9, requires_grad=True)
    ak.pyramid_pool(x).sum().backward()
    assert ak.last_backend("pyramid_pool") == "native"
    assert ak.last_backend("pyramid_pool_bwd") == "native"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    """97 × 33 is divided by no pool size; 19 channels are a vector of 16 and three, or eight, eight and three."""

    def run(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        x = random_map((1, 19, 97, 33), dtype, layout)
        grad = random_map((1, 1, 19, 110), dtype)[0]
        sizes = list(SIZES)
        ours = {"tokens": _pool(x, sizes, sizes), "dx": _spread(grad, x, sizes, sizes)}
        plain = {
            "tokens": reference.pyramid_pool(x, sizes, sizes),
            "dx": _spread(grad, x, sizes, sizes, "reference"),
        }
        truth = {
            "tokens": reference.pyramid_pool(x.double(), sizes, sizes),
            "dx": _spread(grad.double(), x, sizes, sizes, "reference"),
        }
        return ours, plain, truth

    assert_as_accurate_as_plain(run, dtype)


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(0, 3),
    channels=st.integers(1, 40),
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=4),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    grad_layout=st.sampled_from(("dense", "token-major", "expanded", "slice")),
)
def test_any_shape_and_pyramid(
    batch: int,
    channels: int,
    height: int,
    width: int,
    sizes: list[tuple[int, int]],
    layout: str,
    dtype: torch.dtype,
    grad_layout: str,
) -> None:
    heights, widths = [h for h, _ in sizes], [w for _, w in sizes]
    tokens = pyramid.num_tokens(heights, widths)
    x = random_map((batch, channels, height, width), dtype, layout)
    grad = {
        "dense": torch.randn(batch, channels, tokens).to(dtype),
        "token-major": torch.randn(batch, tokens, channels).to(dtype).transpose(1, 2),
        "expanded": torch.randn(()).to(dtype).expand(batch, channels, tokens),
        "slice": torch.randn(batch, channels, 2 * tokens).to(dtype)[:, :, ::2],
    }[grad_layout]
    pooled, spread = _pool(x, heights, widths), _spread(grad, x, heights, widths)
    wide, wide_grad = x.double(), grad.double()
    assert_rounded(pooled, *(reference.pyramid_pool(t, heights, widths) for t in (wide, wide.abs())))
    assert_rounded(spread, *(_spread(t, x, heights, widths, "reference") for t in (wide_grad, wide_grad.abs())))


@pytest.mark.parametrize(
    "shape",
    [(1, 3, 1, 9000), (1, 2, 9000, 1), (1, 530, 9, 9), (1, 17, 9, 4096), (1, 17, 9, 4127), (1, 2, 70, 4140)],
    ids=str,
)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_maps_longer_than_a_buffer(shape: tuple[int, int, int, int], layout: str) -> None:
    """Rows of more than 4128 columns and around 4096, up to where a buffer has room for a vector more; row segments of
    more than 32 rows, units of more than 512 channels."""
    assert_pool_accurate(shape, torch.float32, "native", layout)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number(dtype: torch.dtype) -> None:
    """Means of two numbers round to nearest even; subnormals, infinities and NaN included."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    pairs = torch.stack([every, every[torch.randperm(2**16)]], dim=1)
    for x in (pairs.view(1, 2**16, 1, 2), pairs.view(1, 1, 2**16, 2).permute(0, 2, 1, 3)):
        assert torch.equal(
            _pool(x, [1], [1]).flatten().nan_to_num(nan=1.25),
            ((pairs[:, 0].float() + pairs[:, 1].float()) / 2).to(dtype).nan_to_num(nan=1.25),
        )
    alone = every.view(1, 1, 256, 256)
    for copied in (_pool(alone, [256], [256]).flatten(), _spread(every.view(1, 1, -1), alone, [256], [256]).flatten()):
        assert torch.equal(copied.nan_to_num(nan=1.25), every.nan_to_num(nan=1.25))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_beyond_the_map_and_the_outputs(dtype: torch.dtype, channels_last: bool) -> None:
    """All memory around the operands is NaN: none of it may be read into a result or overwritten."""
    sizes, (height, width) = list(SIZES), (13, 37)

    def embedded(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        whole = torch.full([n + 2 for n in shape], float("nan"), dtype=dtype)
        return whole, whole[tuple(slice(1, -1) for _ in shape)]

    for channels in (1, 5, 16, 21):
        shape = (2, height, width, channels) if channels_last else (2, channels, height, width)
        _, x = embedded(shape)
        x.copy_(torch.randn(shape))
        whole_dx, dx = embedded(shape)
        if channels_last:
            x, dx = x.permute(0, 3, 1, 2), dx.permute(0, 3, 1, 2)
        whole_out, out = embedded((2, 110, channels))
        torch.ops.annnet_native.pyramid_pool(x, None, sizes, sizes, out.transpose(1, 2))
        torch.ops.annnet_native.pyramid_pool_bwd(
            out.transpose(1, 2), None, [height, width], sizes, sizes, channels_last, dx
        )
        for whole, inner in ((whole_out, out), (whole_dx, dx)):
            assert inner.isfinite().all()
            assert whole.isnan().sum() == whole.numel() - inner.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [7, 16, 33, 97])
def test_memory_beyond_a_dense_gradient(dtype: torch.dtype, width: int) -> None:
    """Rows that follow each other are written in aligned vectors, from wherever the map begins."""
    sizes, shape = list(SIZES), (1, 3, 40, width)
    grad = torch.randn(1, 3, 110).to(dtype)
    expected = torch.empty(1, 3, 40, width + 1, dtype=dtype)[..., :width]  # is written row by row
    torch.ops.annnet_native.pyramid_pool_bwd(grad, None, [40, width], sizes, sizes, False, expected)
    for offset in range(1, 67, 5):
        whole = torch.full([expected.numel() + 128], float("nan"), dtype=dtype)
        dx = whole[offset : offset + expected.numel()].view(shape)
        torch.ops.annnet_native.pyramid_pool_bwd(grad, None, [40, width], sizes, sizes, False, dx)
        assert torch.equal(dx, expected)
        assert whole.isnan().sum() == 128


@pytest.mark.parametrize("layout", LAYOUTS[:4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_pixel_reaches_only_its_bins(layout: str, bad: float) -> None:
    x = random_map((1, 17, 33, 40), torch.float32, layout)
    y, column, channel = 16, 20, 3  # in two bins of the levels of 3 and 6: on their edges
    x[0, channel, y, column] = bad
    spoiled = ~_pool(x, list(SIZES), list(SIZES)).isfinite()
    regions = ak.token_regions(SIZES, (33, 40))
    holds = torch.tensor([r.top <= y < r.bottom and r.left <= column < r.right for r in regions])
    assert 4 < holds.sum() < 20
    assert torch.equal(spoiled[0, channel], holds)
    assert spoiled.sum() == holds.sum()


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed"])
@pytest.mark.parametrize("shape", [(1, 16, 65, 40), (3, 48, 17, 19), (1, 600, 9, 9)], ids=str)
def test_bitwise_the_same_for_any_number_of_threads(layout: str, shape: tuple[int, int, int, int]) -> None:
    x = random_map(shape, torch.float32, layout)
    grad = torch.randn(shape[0], shape[1], 110)
    sizes, before = list(SIZES), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append((_pool(x, sizes, sizes), _spread(grad, x, sizes, sizes)))
    finally:
        torch.set_num_threads(before)
    for pooled, spread in results[1:]:
        assert torch.equal(pooled, results[0][0])
        assert torch.equal(spread, results[0][1])


def test_offsets_beyond_32_bits() -> None:
    """The second image lies 2³¹ + 5 elements behind the first; only the pages that are used exist."""
    stride = 2**31 + 5
    try:
        memory = torch.empty(stride + 1024, dtype=torch.bfloat16)
    except RuntimeError:
        pytest.skip("4 GiB of address space are not to be had")
    x = memory.as_strided((2, 2, 16, 16), (stride, 256, 16, 1))
    x.copy_(torch.randn(2, 2, 16, 16))
    assert torch.equal(_pool(x, list(SIZES), list(SIZES)), _pool(x.contiguous(), list(SIZES), list(SIZES)))
    grad = torch.randn(2, 2, 110).bfloat16()
    torch.ops.annnet_native.pyramid_pool_bwd(grad, None, [16, 16], list(SIZES), list(SIZES), False, x)
    assert torch.equal(x, _spread(grad, torch.empty(2, 2, 16, 16), list(SIZES), list(SIZES)))


def test_the_same_bins_as_in_python() -> None:
    for length in range(1, 131):
        for bins in range(1, 131):
            assert _C.bin_edges(length, bins) == pyramid.bin_edges(length, bins), (length, bins)


def test_gradients_of_first_and_second_order() -> None:
    x = random_map((1, 2, 5, 4), torch.float64).requires_grad_()
    with ak.use_backend("native"):
        assert torch.autograd.gradcheck(lambda x: ak.pyramid_pool(x, (2, (3, 1))), x)
        assert torch.autograd.gradgradcheck(lambda x: ak.pyramid_pool(x, (2, (3, 1))), x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 4, 5), None, [1], [1], torch.zeros(3, 4, 1)), "x: expected 4 dimensions"),
        ((torch.zeros(1, 2, 3, 4), None, [2], [2], torch.zeros(1, 2, 3)), r"tokens: expected shape \[1, 2, 4\]"),
        (
            (torch.zeros(1, 2, 3, 4), None, [2], [2, 1], torch.zeros(1, 2, 4)),
            "heights and widths: expected one of each",
        ),
        ((torch.zeros(1, 2, 3, 4), None, [0], [2], torch.zeros(1, 2, 0)), "heights: expected positive sizes"),
        (
            (torch.zeros(1, 2, 3, 4), None, [1], [1], torch.zeros(1, 2, 1).double()),
            "out: expected the dtype of x, Float",
        ),
        (
            (torch.zeros(1, 2, 3, 4).int(), None, [1], [1], torch.zeros(1, 2, 1).int()),
            "map: expected dtype float32, float64",
        ),
    ],
)
def test_wrong_arguments_of_the_bare_operator(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.annnet_native.pyramid_pool(*arguments)
