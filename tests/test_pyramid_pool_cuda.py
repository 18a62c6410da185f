"""The CUDA C++ pooling on a GPU. Where there is none, test_pyramid_pool_cuda_on_cpu.py runs the same kernels."""

from __future__ import annotations

import pytest
import torch
from helpers import LAYOUTS, random_map, relative_error
from hypothesis import given, settings, strategies as st
from pool_rule import GRAD_LAYOUTS, assert_pool_accurate, levels, random_token_gradient
from torch import Tensor

import annnet_kernels as ak
from annnet_kernels import pyramid, reference
from annnet_kernels.runtime import native

DEVICE = "cuda"
NO_GPU = None if torch.cuda.is_available() else "needs a CUDA GPU"
REASON = NO_GPU or native.why_not("cuda", "pyramid_pool", torch.cuda.get_device_capability())
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=f"CUDA C++: {REASON}")]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 5e-6, torch.float64: 1e-14, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SIZES = [1, 3, 6, 8]


def pool(x: Tensor, heights: list[int], widths: list[int]) -> Tensor:
    with ak.use_backend("native"):
        return ak.pyramid_pool(x, list(zip(heights, widths, strict=True)))


def spread(grad: Tensor, x: Tensor, heights: list[int], widths: list[int], backend: str = "native") -> Tensor:
    channels_last = x.stride(1) == 1
    return torch.ops.annnet.pyramid_pool_bwd(grad, None, list(x.shape[2:]), heights, widths, channels_last, backend)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [19, 64])
def test_accuracy_of_layouts(layout: str, dtype: torch.dtype, channels: int) -> None:
    assert_pool_accurate((2, channels, 97, 33), dtype, "native", layout, device=DEVICE)
    assert ak.last_backend("pyramid_pool") == ak.last_backend("pyramid_pool_bwd") == "native"


@pytest.mark.parametrize("grad_layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 7, 5, 3), (1, 5, 1, 20), (2, 512, 97, 97), (1, 64, 128, 256)], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_accuracy_of_shapes_and_gradients(shape: tuple[int, int, int, int], grad_layout: str, layout: str) -> None:
    assert_pool_accurate(shape, torch.float32, "native", layout, grad_layout, device=DEVICE, seeds=1)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 70), st.integers(1, 70)),
    sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    grad_layout=st.sampled_from(GRAD_LAYOUTS),
)
def test_any_shape_and_pyramid(
    shape: tuple[int, int, int, int],
    sizes: list[tuple[int, int]],
    layout: str,
    dtype: torch.dtype,
    grad_layout: str,
) -> None:
    heights, widths = levels(sizes)
    tokens = pyramid.num_tokens(heights, widths)
    x = random_map(shape, dtype, layout, DEVICE)
    grad = random_token_gradient(*shape[:2], tokens, dtype, grad_layout, DEVICE)
    pooled, dx = pool(x, heights, widths), spread(grad, x, heights, widths)
    assert pooled.shape == (*shape[:2], tokens)
    assert dx.shape == x.shape
    if shape[0] > 0:
        assert relative_error(pooled, reference.pyramid_pool(x.double(), heights, widths)) < ROUNDING[dtype]
        assert relative_error(dx, spread(grad.double(), x, heights, widths, "reference")) < ROUNDING[dtype]


def test_memory_beyond_the_map_and_the_outputs() -> None:
    for channels in (1, 5, 16):
        whole_x = torch.full((4, 15, 39, channels + 2), float("nan"), device=DEVICE)
        x = whole_x[1:-1, 1:-1, 1:-1, 1:-1].copy_(torch.randn(2, 13, 37, channels)).permute(0, 3, 1, 2)
        whole_out = torch.full((4, 112, channels + 2), float("nan"), device=DEVICE)
        out = whole_out[1:-1, 1:-1, 1:-1].transpose(1, 2)
        torch.ops.annnet_native.pyramid_pool(x, None, SIZES, SIZES, out)
        torch.ops.annnet_native.pyramid_pool_bwd(out, None, [13, 37], SIZES, SIZES, True, x)
        for whole, inner in ((whole_out, out), (whole_x, x)):
            assert inner.isfinite().all()
            assert whole.isnan().sum() == whole.numel() - inner.numel()


@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_a_non_finite_pixel_reaches_only_its_bins(layout: str) -> None:
    x = random_map((1, 16, 33, 40), torch.float32, layout, DEVICE)
    y, column, channel = 16, 20, 3
    x[0, channel, y, column] = float("inf")
    spoiled = ~pool(x, SIZES, SIZES).isfinite()
    regions = ak.token_regions(tuple(SIZES), (33, 40))
    holds = torch.tensor([r.top <= y < r.bottom and r.left <= column < r.right for r in regions])
    assert torch.equal(spoiled[0, channel].cpu(), holds)
    assert spoiled.sum() == holds.sum()


@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_bitwise_the_same_every_time(layout: str) -> None:
    x = random_map((4, 48, 97, 33), torch.bfloat16, layout, DEVICE)
    grad = random_token_gradient(4, 48, 110, torch.bfloat16, device=DEVICE)
    first = pool(x, SIZES, SIZES), spread(grad, x, SIZES, SIZES)
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(5):
            assert torch.equal(pool(x, SIZES, SIZES), first[0])
            assert torch.equal(spread(grad, x, SIZES, SIZES), first[1])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("channels_last", [False, True])
def test_more_than_two_to_the_31_elements(channels_last: bool) -> None:
    shape = (2, 2**12, 2**9 + 1, 2**9)
    try:
        x = torch.empty(shape, dtype=torch.float16, device=DEVICE)
        dx = torch.empty_like(x)
    except RuntimeError:
        pytest.skip("9 GB of memory are not to be had")
    if channels_last:
        x, dx = (t.view(2, shape[2], shape[3], shape[1]).permute(0, 3, 1, 2) for t in (x, dx))
    x.copy_(torch.randn((), device=DEVICE))
    x[-1, -1, :, :] = torch.randn(shape[2:], device=DEVICE)
    pooled = pool(x, SIZES, SIZES)
    last = x[-1:, -1:].double()
    assert relative_error(pooled[-1:, -1:], reference.pyramid_pool(last, SIZES, SIZES)) < 1e-3
    torch.ops.annnet_native.pyramid_pool_bwd(pooled, None, list(shape[2:]), SIZES, SIZES, channels_last, dx)
    expected = spread(pooled[-1:, -1:].double(), last, SIZES, SIZES, "reference")
    assert relative_error(dx[-1:, -1:], expected) < 1e-3


def test_derivatives_of_first_and_second_order() -> None:
    x = random_map((1, 2, 5, 4), torch.float64, device=DEVICE).requires_grad_()
    with ak.use_backend("native"):
        assert torch.autograd.gradcheck(lambda x: ak.pyramid_pool(x, (2, (3, 1))), x)
        assert torch.autograd.gradgradcheck(lambda x: ak.pyramid_pool(x, (2, (3, 1))), x)


def test_float64_is_served_by_default() -> None:
    """Triton's kernels accumulate in float32."""
    ak.pyramid_pool(torch.randn(1, 3, 9, 9, dtype=torch.float64, device=DEVICE))
    assert ak.last_backend("pyramid_pool") == "native"


def test_it_follows_the_stream_and_a_graph_replays_it() -> None:
    x = torch.randn(4, 64, 65, 65, device=DEVICE)
    expected = pool(x, SIZES, SIZES)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = pool(x, SIZES, SIZES)
    x.mul_(2)
    graph.replay()
    torch.testing.assert_close(captured, 2 * expected, rtol=0, atol=0)


def test_operators_without_cuda_kernels_say_so() -> None:
    query = torch.randn(1, 8, 9, 9, device=DEVICE)
    tokens = pool(query, SIZES, SIZES)
    with ak.use_backend("native"), pytest.raises(RuntimeError, match="no asymmetric_attention for cuda tensors"):
        ak.asymmetric_attention(query, tokens, tokens)
