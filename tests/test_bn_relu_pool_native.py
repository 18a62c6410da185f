"""The C++ prologue on the CPU: pooling of a map that is normalised and rectified on load, and its backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers import LAYOUTS, assert_as_accurate_as_plain, random_map, relative_error
from hypothesis import assume, given, settings, strategies as st
from pool_rule import random_norm
from torch import Tensor

import annnet_kernels as ak
from annnet_kernels import pyramid
from annnet_kernels.runtime import native

if native.why_not("cpu") is not None:
    pytest.skip(f"native: {native.why_not('cpu')}", allow_module_level=True)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 8e-3, torch.float16: 1e-3}
SIZES = [1, 3, 6, 8]


def _table(channels: int, dtype: torch.dtype) -> Tensor:
    return random_norm(channels, dtype=torch.promote_types(dtype, torch.float32))


def _run(backend: str, operator: str, y: Tensor, *arguments: Any) -> Tensor:
    result: Tensor
    if operator == "pyramid_pool":
        with ak.use_backend(backend):
            result = torch.ops.annnet.pyramid_pool(y, *arguments)
    else:
        result = getattr(torch.ops.annnet, operator)(y, *arguments, backend)
    assert ak.last_backend(operator) == backend
    return result


def _all(backend: str, y: Tensor, norm: Tensor, gradients: Sequence[Tensor | None]) -> dict[str, Tensor]:
    """Every operator; ``gradients`` are of the tokens and of the map, and the mean sums."""
    grad_tokens, grad_map, mean_sums = gradients
    reads = grad_tokens, grad_map
    return {
        "tokens": _run(backend, "pyramid_pool", y, norm, SIZES, SIZES),
        "sums": _run(backend, "bn_relu_bwd_sums", y, norm, *reads, SIZES, SIZES),
        "dy": _run(backend, "bn_relu_bwd_input", y, norm, *reads, mean_sums, 1, SIZES, SIZES),
    }


def _double(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("readers", ["tokens", "map", "both"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype: torch.dtype, layout: str, readers: str) -> None:
    def run(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        y = random_map((2, 19, 33, 20), dtype, layout)
        norm = _table(19, dtype)
        gradients = (
            torch.randn(2, 19, 110).to(dtype) if readers != "map" else None,
            random_map((2, 19, 33, 20), dtype, layout) if readers != "tokens" else None,
            torch.randn(2, 19, dtype=norm.dtype) if readers != "map" else None,
        )
        truth = _all("reference", y.double(), norm.double(), _double(gradients))
        return _all("native", y, norm, gradients), _all("reference", y, norm, gradients), truth

    assert_as_accurate_as_plain(run, dtype)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 3),
    channels=st.integers(1, 24),
    height=st.integers(1, 36),
    width=st.integers(1, 36),
    sizes=st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=3),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_pyramid_and_layout(
    batch: int,
    channels: int,
    height: int,
    width: int,
    sizes: list[tuple[int, int]],
    layouts: tuple[str, str],
    dtype: torch.dtype,
) -> None:
    """The gradient of the map may lie in memory otherwise than the map."""
    heights, widths = [h for h, _ in sizes], [w for _, w in sizes]
    shape = (batch, channels, height, width)
    y, grad_map = random_map(shape, dtype, layouts[0]), random_map(shape, dtype, layouts[1])
    norm = _table(channels, dtype)
    grad_tokens = torch.randn(batch, pyramid.num_tokens(heights, widths), channels).to(dtype).transpose(1, 2)
    mean_sums = torch.randn(2, channels, dtype=norm.dtype)
    mean, invstd, weight, bias = norm.double()[:, :, None, None]
    near_zero = ((y.double() - mean) * invstd * weight + bias).abs() < 1e-5
    assume(not near_zero.any())  # ahead of the ReLU, where rounding decides
    gradients = (grad_tokens, grad_map)
    for operator, arguments, exact in (
        ("pyramid_pool", (), ()),
        ("bn_relu_bwd_sums", gradients, _double(gradients)),
        ("bn_relu_bwd_input", (*gradients, mean_sums, 2), (*_double((*gradients, mean_sums)), 2)),
    ):
        ours = _run("native", operator, y, norm, *arguments, heights, widths)
        truth = _run("reference", operator, y.double(), norm.double(), *exact, heights, widths)
        if truth.numel() == 0 or not truth.any():
            assert torch.equal(ours.double(), truth)
        else:
            assert relative_error(ours, truth) < ROUNDING[dtype], operator


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_the_output_has_the_layout_of_the_map(layout: str) -> None:
    y = random_map((2, 5, 9, 11), torch.float32, layout)
    dy = _run("native", "bn_relu_bwd_input", y, _table(5, y.dtype), None, y, None, 1, SIZES, SIZES)
    assert dy.stride() == y.stride()


@pytest.mark.parametrize("layout", LAYOUTS[:3])
def test_nan_passes_the_relu_and_spoils_nothing_else(layout: str) -> None:
    y = random_map((1, 17, 33, 40), torch.float32, layout)
    norm = _table(17, y.dtype)
    y[0, 3, 16, 20] = float("nan")
    tokens = _run("native", "pyramid_pool", y, norm, SIZES, SIZES)
    regions = ak.token_regions(SIZES, (33, 40))
    holds = torch.tensor([r.top <= 16 < r.bottom and r.left <= 20 < r.right for r in regions])
    assert torch.equal(tokens.isnan()[0, 3], holds)
    assert tokens.isnan().sum() == holds.sum()
    dy = _run("native", "bn_relu_bwd_input", y, norm, None, y, norm[:2], 1, SIZES, SIZES)
    assert dy.isnan().sum() == 1


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed"])
def test_bitwise_the_same_for_any_number_of_threads(layout: str) -> None:
    y = random_map((2, 48, 37, 40), torch.float32, layout)
    gradients = torch.randn(2, 48, 110), random_map((2, 48, 37, 40), torch.float32, layout), torch.randn(2, 48)
    norm, before = _table(48, y.dtype), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(_all("native", y, norm, gradients))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for name, value in result.items():
            assert torch.equal(value, results[0][name]), name


def test_a_large_mean_costs_no_accuracy() -> None:
    """μ/σ = 1000: with a single scale and shift the differences would cancel."""
    y = torch.randn(2, 16, 33, 40) + 1000
    norm = torch.stack((y.mean((0, 2, 3)), torch.rand(16) + 0.5, torch.ones(16), torch.full((16,), 3.0)))
    tokens = _run("native", "pyramid_pool", y, norm, SIZES, SIZES)
    truth = _run("reference", "pyramid_pool", y.double(), norm.double(), SIZES, SIZES)
    assert relative_error(tokens, truth) < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm": torch.zeros(4)}, r"norm: expected shape \[4, 3\]"),
        ({"norm": torch.zeros(4, 3).double()}, "norm: expected dtype Float, got Double"),
        ({"norm": torch.zeros(3, 4).t()}, "norm: expected a contiguous table"),
        ({"grad_map": None}, "grad_tokens and grad_map: expected at least one"),
        ({"grad_map": torch.zeros(1, 3, 4, 4)}, "grad_map: expected shape"),
        ({"sums": torch.zeros(2, 4)}, "sums: expected shape"),
    ],
)
def test_wrong_arguments_of_the_bare_operator(change: dict[str, Tensor | None], message: str) -> None:
    arguments: dict[str, Any] = {"y": torch.zeros(1, 3, 4, 5), "norm": torch.zeros(4, 3)}
    arguments |= {"grad_tokens": None, "grad_map": torch.zeros(1, 3, 4, 5)}
    arguments |= {"heights": SIZES, "widths": SIZES, "sums": torch.zeros(2, 3)}
    with pytest.raises((ValueError, TypeError), match=message):
        torch.ops.annnet_native.bn_relu_bwd_sums(**arguments | change)
