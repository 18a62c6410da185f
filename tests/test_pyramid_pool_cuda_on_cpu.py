"""The CUDA kernels of the pooling, run on the CPU: every layout, dtype and way to cut the work; memory; barriers."""

from __future__ import annotations

import re

import cuda_on_cpu
import pytest
import torch
from helpers import LAYOUTS, assert_as_accurate_as_plain, random_map
from hypothesis import given, settings, strategies as st
from pool_rule import GRAD_LAYOUTS, assert_rounded, levels, random_token_gradient
from torch import Tensor

import annnet_kernels as ak
from annnet_kernels import pyramid, reference

if cuda_on_cpu.why_not() is not None:
    pytest.skip(f"CUDA on the CPU: {cuda_on_cpu.why_not()}", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = cuda_on_cpu.DTYPES
SIZES = [1, 3, 6, 8]


@pytest.fixture(scope="module")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> cuda_on_cpu.CudaOnCpu:
    return cuda_on_cpu.CudaOnCpu.compile(tmp_path_factory.mktemp("cuda_on_cpu"))


def plain_spread(grad: Tensor, x: Tensor, heights: list[int], widths: list[int]) -> Tensor:
    return torch.ops.annnet.pyramid_pool_bwd(grad, None, list(x.shape[2:]), heights, widths, False, "reference")


def assert_right(
    pooled: Tensor, spread: Tensor, x: Tensor, grad: Tensor, heights: list[int], widths: list[int]
) -> None:
    x, grad = x.double(), grad.double()
    assert_rounded(pooled, *(reference.pyramid_pool(t, heights, widths) for t in (x, x.abs())))
    assert_rounded(spread, *(plain_spread(t, x, heights, widths) for t in (grad, grad.abs())))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(gpu: cuda_on_cpu.CudaOnCpu, layout: str, dtype: torch.dtype) -> None:
    """35 × 25 is divided by no pool size; 16 channels are two, four or eight vectors."""

    def run(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        x = random_map((1, 16, 35, 25), dtype, layout)
        grad = random_token_gradient(1, 16, 110, dtype)
        ours = {"tokens": gpu.pool(x, SIZES, SIZES), "dx": gpu.spread(grad, x, SIZES, SIZES)}
        plain = {"tokens": reference.pyramid_pool(x, SIZES, SIZES), "dx": plain_spread(grad, x, SIZES, SIZES)}
        truth = {
            "tokens": reference.pyramid_pool(x.double(), SIZES, SIZES),
            "dx": plain_spread(grad.double(), x, SIZES, SIZES),
        }
        return ours, plain, truth

    assert_as_accurate_as_plain(run, dtype)


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    channels=st.integers(1, 40),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    sizes=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=4),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    grad_layout=st.sampled_from(GRAD_LAYOUTS),
    multiprocessors=st.sampled_from((1, 4, 30)),
)
def test_any_shape_and_pyramid(
    gpu: cuda_on_cpu.CudaOnCpu,
    batch: int,
    channels: int,
    height: int,
    width: int,
    sizes: list[tuple[int, int]],
    layout: str,
    dtype: torch.dtype,
    grad_layout: str,
    multiprocessors: int,
) -> None:
    heights, widths = [h for h, _ in sizes], [w for _, w in sizes]
    gpu.multiprocessors = multiprocessors
    x = random_map((batch, channels, height, width), dtype, layout)
    grad = random_token_gradient(batch, channels, pyramid.num_tokens(heights, widths), dtype, grad_layout)
    assert_right(gpu.pool(x, heights, widths), gpu.spread(grad, x, heights, widths), x, grad, heights, widths)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed"])
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((1, 2, 9, 8), [(100, 3), (2, 5)]),  # more bins than a plan holds
        ((1, 8, 7, 5), [(1, 2)] * 13),  # more levels
        ((1, 2, 2, 9000), [(1, 1), (2, 3), (6, 8)]),  # rows longer than shared memory
        ((1, 2, 9000, 2), [(1, 1), (2, 3), (6, 8)]),
        ((1, 530, 9, 9), [(1, 1), (2, 3), (6, 8)]),  # more channels than a block has
    ],
    ids=str,
)
def test_beyond_every_limit(
    gpu: cuda_on_cpu.CudaOnCpu, shape: tuple[int, int, int, int], sizes: list[tuple[int, int]], layout: str
) -> None:
    heights, widths = levels(sizes)
    x = random_map(shape, torch.float32, layout)
    grad = random_token_gradient(*shape[:2], pyramid.num_tokens(heights, widths), torch.float32)
    assert_right(gpu.pool(x, heights, widths), gpu.spread(grad, x, heights, widths), x, grad, heights, widths)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [37, 40])
def test_memory_beyond_the_map_and_the_outputs(
    gpu: cuda_on_cpu.CudaOnCpu, dtype: torch.dtype, channels_last: bool, width: int
) -> None:
    """All memory around the operands is NaN: none of it may be read into a result or overwritten."""
    height = 13

    def embedded(shape: tuple[int, ...], margins: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        whole = torch.full([n + 2 * m for n, m in zip(shape, margins, strict=True)], float("nan"), dtype=dtype)
        return whole, whole[tuple(slice(m, n + m) for n, m in zip(shape, margins, strict=True))]

    for channels in (1, 5, 16):
        shape = (2, height, width, channels) if channels_last else (2, channels, height, width)
        # A margin along the images alone leaves an image without gaps, and one of 8 channels leaves it aligned.
        for margins in ((1, 0, 0, 0), (1, 1, 1, 1), (1, 1, 1, 8)):
            whole_x, x = embedded(shape, margins)
            x.copy_(torch.randn(shape))
            whole_dx, dx = embedded(shape, margins)
            if channels_last:
                x, dx = x.permute(0, 3, 1, 2), dx.permute(0, 3, 1, 2)
            whole_out, out = embedded((2, 110, channels), (1, 1, 1))
            gpu.pool_into(x, SIZES, SIZES, out.transpose(1, 2))
            gpu.spread_into(out.transpose(1, 2), SIZES, SIZES, dx)
            for whole, inner in ((whole_x, x), (whole_out, out), (whole_dx, dx)):
                assert inner.isfinite().all()
                assert whole.isnan().sum() == whole.numel() - inner.numel()


@pytest.mark.parametrize("layout", LAYOUTS[:4])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_pixel_reaches_only_its_bins(gpu: cuda_on_cpu.CudaOnCpu, layout: str, bad: float) -> None:
    x = random_map((1, 16, 33, 40), torch.float32, layout)
    y, column, channel = 16, 20, 3  # in two bins of the levels of 3 and 6: on their edges
    x[0, channel, y, column] = bad
    spoiled = ~gpu.pool(x, SIZES, SIZES).isfinite()
    regions = ak.token_regions(tuple(SIZES), (33, 40))
    holds = torch.tensor([r.top <= y < r.bottom and r.left <= column < r.right for r in regions])
    assert 4 < holds.sum() < 20
    assert torch.equal(spoiled[0, channel], holds)
    assert spoiled.sum() == holds.sum()


@pytest.mark.parametrize("layout", LAYOUTS[:4])
def test_the_order_of_threads_changes_nothing(gpu: cuda_on_cpu.CudaOnCpu, layout: str) -> None:
    """Threads take turns in another order at every barrier: without one of the barriers, results would differ."""
    x, grad = random_map((1, 24, 33, 19), torch.float32, layout), random_token_gradient(1, 24, 110, torch.float32)
    results = []
    for order in range(4):
        gpu.order = order
        results.append((gpu.pool(x, SIZES, SIZES), gpu.spread(grad, x, SIZES, SIZES)))
    gpu.order = None
    for pooled, spread in results[1:]:
        assert torch.equal(pooled, results[0][0])
        assert torch.equal(spread, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("layout", "shape", "vectors"),
    [
        ("channels_last", (2, 64, 31, 33), 1.0),
        ("channels_last", (2, 19, 31, 33), 0.0),
        ("nchw", (2, 3, 97, 97), 0.98),  # of every plane, but for what lies beside its first and last 16 bytes
        ("nchw", (2, 3, 64, 64), 1.0),
        ("slice", (2, 3, 33, 33), 0.0),
        ("transposed", (2, 3, 97, 97), 0.98),
    ],
)
def test_the_map_is_loaded_once_and_by_vectors(
    gpu: cuda_on_cpu.CudaOnCpu, layout: str, shape: tuple[int, int, int, int], vectors: float, dtype: torch.dtype
) -> None:
    x = random_map(shape, dtype, layout)
    gpu.multiprocessors = 1  # one part per plane, where it fits
    gpu.pool(x, SIZES, SIZES)
    assert gpu.counts.loaded_bytes == x.numel() * x.element_size()
    share = 16 * gpu.counts.loads_of_16_bytes / gpu.counts.loaded_bytes
    assert share >= vectors
    assert share == vectors or vectors == 0.98
    if layout != "slice" and vectors == 0:
        assert share == 0


@pytest.mark.parametrize(("first", "whole"), [(0, 19), (3, 24), (8, 24)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_of_channels(gpu: cuda_on_cpu.CudaOnCpu, dtype: torch.dtype, first: int, whole: int) -> None:
    """16 channels that begin at 16 bytes in the first pixel only, in none, and in all."""
    x = torch.randn(2, 9, 11, whole).to(dtype)[..., first : first + 16].permute(0, 3, 1, 2)
    pooled = gpu.pool(x, SIZES, SIZES)
    assert (gpu.counts.other_loads == 0) == (whole == 24 and first == 8)
    grad = random_token_gradient(2, 16, 110, dtype)
    was = x.clone()
    gpu.spread_into(grad, SIZES, SIZES, x)
    assert_right(pooled, x, was, grad, SIZES, SIZES)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_shim_rounds_as_pytorch_does(gpu: cuda_on_cpu.CudaOnCpu, dtype: torch.dtype) -> None:
    """Means of two numbers round to nearest even; subnormals, infinities and NaN included."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)[::61]
    pairs = torch.stack([every, every[torch.randperm(len(every))]], dim=1)
    pooled = gpu.pool(pairs.view(1, 1, -1, 2).permute(0, 2, 1, 3), [1], [1]).flatten()
    expected = ((pairs[:, 0].float() + pairs[:, 1].float()) / 2).to(dtype)
    assert torch.equal(pooled.nan_to_num(nan=1.25), expected.nan_to_num(nan=1.25))


def test_device_code_is_free_of_atomics_and_of_libraries() -> None:
    """Nothing that would make results vary, and no header that a bare nvcc lacks."""
    for source in cuda_on_cpu.SOURCES.iterdir():
        text = source.read_text()
        assert "atomic" not in text
        assert "ATen/cuda" not in text
        assert set(re.findall(r"#include <(c10/\w+)/", text)) <= {"c10/cuda"}
