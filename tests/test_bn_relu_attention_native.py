"""The C++ attention of maps with a norm: errors, layouts, what is added, statistics, NaN, threads, direct calls."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from attention_rule import plain_attention, random_tokens
from helpers import LAYOUTS, Results, assert_as_accurate_as_plain, random_map
from pool_rule import random_norm
from torch import Tensor

import annnet_kernels as ak
from annnet_kernels.runtime import native

if native.why_not("cpu") is not None:
    pytest.skip(f"native: {native.why_not('cpu')}", allow_module_level=True)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCALE = 0.3
ALL = (True, True, True)

# batch, key channels, value channels, height, width, tokens
SHAPES = (
    (1, 64, 48, 13, 17, 110),
    (2, 19, 37, 11, 23, 43),
    (40, 80, 19, 1, 1, 5),  # one pixel; many images, or single draws scatter
    (1, 17, 2048, 3, 7, 9),  # several chunks of channels of the skip map
    (1, 300, 16, 3, 37, 200),
)


def random_table(channels: int, dtype: torch.dtype) -> Tensor:
    return random_norm(channels, dtype=torch.promote_types(dtype, torch.float32))


def random_constant(channels: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(channels, dtype=torch.promote_types(dtype, torch.float32))


def native_forward(
    y: Tensor, norm: Tensor, key: Tensor, value: Tensor, skip: Tensor | None = None, constant: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    with ak.use_backend("native"):
        operands = y, norm, key, value, skip, constant, SCALE, True
        out, logsumexp, moments = torch.ops.annnet.asymmetric_attention(*operands)
        expected = torch.ops.annnet.batch_norm_moments(out)
    torch.testing.assert_close(moments, expected, rtol=0, atol=0, equal_nan=True)
    assert ak.last_backend("asymmetric_attention") == "native"
    return out, logsumexp


def native_backward(
    grad: Tensor,
    y: Tensor,
    norm: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    needs: Sequence[bool] = ALL,
) -> tuple[Tensor, Tensor, Tensor]:
    dz, dkey, dvalue = torch.ops.annnet.asymmetric_attention_bwd(
        grad, y, norm, key, value, logsumexp, SCALE, list(needs), "native"
    )
    assert ak.last_backend("asymmetric_attention_bwd") == "native"
    return dz, dkey, dvalue


def rectified(y: Tensor, norm: Tensor) -> Tensor:
    mean, invstd, weight, bias = norm[:, :, None, None]
    return torch.relu((y - mean) * invstd * weight + bias).to(y.dtype)


def plain(
    grad: Tensor,
    y: Tensor,
    norm: Tensor,
    key: Tensor,
    value: Tensor,
    skip: Tensor | None,
    constant: Tensor,
) -> Results:
    """z is written, and so is the context; in float64, the truth."""
    leaves = [x.detach().requires_grad_() for x in (rectified(y, norm), key, value)]
    context = plain_attention(*leaves, SCALE)
    out = (context if skip is None else context + skip) + constant.to(y.dtype)[:, None, None]
    gradients = torch.autograd.grad(out, leaves, grad)
    return dict(zip(("out", "dz", "dkey", "dvalue"), (out, *gradients), strict=True))


def assert_accurate(
    shape: tuple[int, int, int, int, int, int],
    dtype: torch.dtype,
    layout: str = "nchw",
    skip_layout: str | None = "nchw",
) -> None:
    batch, key_channels, value_channels, height, width, tokens = shape

    def run(seed: int) -> tuple[Results, Results, Results]:
        y = random_map((batch, key_channels, height, width), dtype, layout)
        grad = random_map((batch, value_channels, height, width), dtype, layout)
        key, value = (random_tokens(batch, c, tokens, dtype) for c in (key_channels, value_channels))
        norm, constant = random_table(key_channels, dtype), random_constant(value_channels, dtype)
        skip = random_map(grad.shape, dtype, skip_layout) if skip_layout is not None else None
        out, logsumexp = native_forward(y, norm, key, value, skip, constant)
        gradients = native_backward(grad, y, norm, key, value, logsumexp)
        ours = dict(zip(("out", "dz", "dkey", "dvalue"), (out, *gradients), strict=True))
        operands = (grad, y, norm, key, value, skip, constant)
        truth = plain(*(None if x is None else x.double() for x in operands))
        return ours, plain(*operands), truth

    assert_as_accurate_as_plain(run, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy_of_shapes(shape: tuple[int, int, int, int, int, int], dtype: torch.dtype) -> None:
    assert_accurate(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_of_map_layouts(layout: str, dtype: torch.dtype) -> None:
    assert_accurate((2, 19, 37, 9, 19, 23), dtype, layout=layout, skip_layout=None)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("skip_layout", LAYOUTS)
def test_accuracy_of_skip_layouts(skip_layout: str, layout: str) -> None:
    """The skip map may lie in memory otherwise than the output."""
    assert_accurate((2, 19, 37, 9, 19, 23), torch.float32, layout=layout, skip_layout=skip_layout)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_a_large_mean_costs_no_accuracy(layout: str) -> None:
    """μ/σ = 1000: with a single scale and shift the differences would cancel."""
    y = random_map((1, 16, 9, 21), torch.float32, layout) + 1000
    key, value = random_tokens(1, 16, 30, y.dtype), random_tokens(1, 8, 30, y.dtype)
    norm = torch.tensor([1000.0, 1.3, 0.7, 1.0])[:, None].repeat(1, 16)
    out, _ = native_forward(y, norm, key, value)
    truth = plain_attention(rectified(y.double(), norm.double()), key.double(), value.double(), SCALE)
    assert float((out - truth).norm() / truth.norm()) < 1e-6


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_passes_the_relu_and_spoils_only_its_own_pixel(dtype: torch.dtype, layout: str) -> None:
    y, key, value = (
        random_map((2, 21, 9, 37), dtype, layout),
        random_tokens(2, 21, 43, dtype),
        random_tokens(2, 35, 43, dtype),
    )
    grad, norm = random_map((2, 35, 9, 37), dtype, layout), random_table(21, dtype)
    spoilt = y.clone()
    spoilt[1, 4, 7, 5] = float("nan")
    results = []
    for map_ in (y, spoilt):
        out, logsumexp = native_forward(map_, norm, key, value, grad)
        results.append((out, native_backward(grad, map_, norm, key, value, logsumexp)[0]))
    for clean, ours in zip(*results, strict=True):
        assert ours[1, :, 7, 5].isnan().all()
        ours[1, :, 7, 5] = clean[1, :, 7, 5] = 0
        assert torch.equal(ours, clean)


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "slice"])
def test_bitwise_equal_for_any_number_of_threads(layout: str) -> None:
    y, key, value = random_map((2, 21, 23, 37), torch.float32, layout), torch.randn(2, 21, 43), torch.randn(2, 35, 43)
    grad, norm = random_map((2, 35, 23, 37), torch.float32, layout), random_table(21, torch.float32)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out, logsumexp = native_forward(y, norm, key, value, grad)
            results.append((out, logsumexp, *native_backward(grad, y, norm, key, value, logsumexp)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert torch.equal(ours, first)


def test_gradients_that_are_not_needed() -> None:
    y, key, value = torch.randn(1, 9, 5, 7), torch.randn(1, 9, 11), torch.randn(1, 13, 11)
    grad, norm = torch.randn(1, 13, 5, 7), random_table(9, torch.float32)
    _, logsumexp = native_forward(y, norm, key, value)
    everything = native_backward(grad, y, norm, key, value, logsumexp)
    for wanted in range(3):
        needs = [index == wanted for index in range(3)]
        for needed, ours, full in zip(
            needs, native_backward(grad, y, norm, key, value, logsumexp, needs), everything, strict=True
        ):
            assert torch.equal(ours, full) if needed else ours.shape == (0,)


def test_batch_of_none() -> None:
    y, key, value = torch.randn(0, 9, 5, 7), torch.randn(0, 9, 11), torch.randn(0, 13, 11)
    norm = random_table(9, torch.float32)
    out, logsumexp = native_forward(y, norm, key, value, out_like := torch.randn(0, 13, 5, 7))
    gradients = native_backward(out_like, y, norm, key, value, logsumexp)
    assert [tuple(g.shape) for g in (out, *gradients)] == [(0, 13, 5, 7), (0, 9, 5, 7), (0, 9, 11), (0, 13, 11)]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"norm": torch.zeros(4, 8)}, ValueError, r"norm: expected shape \[4, 9\]"),
        ({"norm": torch.zeros(4, 9).double()}, TypeError, "norm: expected dtype Float, got Double"),
        ({"skip": torch.zeros(1, 9, 5, 7)}, ValueError, "skip: expected shape"),
        ({"skip": torch.zeros(1, 13, 5, 7).half()}, TypeError, "skip: expected the dtype of query"),
        ({"constant": torch.zeros(9)}, ValueError, r"constant: expected shape \[13\]"),
        ({"constant": torch.zeros(13).half()}, TypeError, "constant: expected dtype Float, got Half"),
        ({"constant": torch.zeros(26)[::2]}, ValueError, "constant: expected contiguous"),
        ({"statistics": True}, ValueError, "moments: expected shape"),
    ],
)
def test_direct_calls_are_checked(change: dict[str, Tensor], error: type[Exception], message: str) -> None:
    arguments = {"norm": random_table(9, torch.float32), "constant": torch.randn(13), "statistics": False}
    arguments |= {"query": torch.randn(1, 9, 5, 7), "key": torch.randn(1, 9, 11), "value": torch.randn(1, 13, 11)}
    arguments |= {"skip": torch.randn(1, 13, 5, 7), "out": torch.empty(1, 13, 5, 7), "logsumexp": torch.empty(1, 35)}
    arguments |= {"moments": torch.empty(0, dtype=torch.float64)}
    with pytest.raises(error, match=message):
        torch.ops.annnet_native.asymmetric_attention(scale=SCALE, **{**arguments, **change})
