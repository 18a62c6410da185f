"""The Triton attention: errors, layouts, gradient flags, blocks of tokens, splits, isolation, memory manners."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from attention_rule import assert_accurate, plain_attention, random_tokens
from helpers import LAYOUTS, Results, assert_as_accurate_as_plain, random_map, surrounded
from pool_rule import random_norm
from torch import Tensor

import annnet_kernels as ak
from annnet_kernels.kernels import asymmetric_attention as launches
from annnet_kernels.kernels.launch import INTERPRETER, device_of, product_precision
from annnet_kernels.runtime.backends import interpreting

DEVICE = "cpu" if interpreting() else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OF_TRAINING = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SEEDS = 3 if interpreting() else 5
"""The interpreter is slow; a wrong kernel is wrong by more than one draw scatters."""

# batch, key channels, value channels, height, width, tokens
SHAPES = (
    (1, 64, 96, 9, 17, 110),  # the fast case; pixels are no multiple of a block
    (2, 19, 48, 5, 17, 7),
    (2, 48, 19, 1, 37, 64),  # one row; a full short block of tokens
    (2, 40, 24, 1, 1, 128),  # one pixel; a full block of tokens
    (1, 16, 20, 12, 11, 1),  # one token: the softmax is constant
    (1, 16, 36, 5, 9, 129),  # one token more than a block
    (1, 16, 16, 3, 5, 1024),  # many tokens
    (1, 1, 1, 2, 2, 2),
    (1, 16, 20, 19, 29, 7),  # so many pixels that 16-bit sums over them are split, too
)


@pytest.fixture(autouse=True)
def _triton_backend():
    with ak.use_backend("triton"):
        yield


def assert_triton_accurate(shape, dtype, seeds=SEEDS, **options):
    assert_accurate(shape, dtype, "triton", device=DEVICE, seeds=seeds, **options)
    assert ak.last_backend("asymmetric_attention") == ak.last_backend("asymmetric_attention_bwd") == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy_of_shapes(shape, dtype):
    few_values = math.prod(shape) < 100  # the median of an error that four values decide scatters over few seeds
    assert_triton_accurate(shape, dtype, seeds=9 * SEEDS if few_values else SEEDS)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(1, 64, 1024, 3, 5, 50), (1, 512, 19, 3, 5, 13)], ids=str)
def test_accuracy_of_wide_channels(shape, dtype):
    assert_triton_accurate(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_of_map_layouts(layout, dtype):
    assert_triton_accurate((2, 19, 21, 7, 9, 23), dtype, map_layout=layout)


@OF_TRAINING
@pytest.mark.parametrize("layout", ["channels", "slice", "expanded"])
def test_accuracy_of_token_layouts(layout, dtype):
    assert_triton_accurate((2, 19, 21, 7, 9, 23), dtype, map_layout="channels_last", token_layout=layout)


@pytest.mark.parametrize(
    ("dtype", "tokens"), [*((dtype, 110) for dtype in DTYPES), (torch.float32, 200), (torch.bfloat16, 200)]
)
@pytest.mark.parametrize("magnitude", [8.0, 300.0])
def test_accuracy_of_peaked_softmax(magnitude, dtype, tokens):
    """Logits of standard deviation 8, then in the hundreds: few pixels are not one-hot, and single draws scatter."""
    assert_triton_accurate((1, 16, 12, 5, 13, tokens), dtype, magnitude=magnitude, seeds=11)


@OF_TRAINING
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_accuracy_of_unusual_scales(scale, dtype):
    assert_triton_accurate((1, 16, 24, 9, 11, 30), dtype, scale=scale)


def odd_operands(
    dtype: torch.dtype, layout: str = "nchw", tokens: int = 43, size: tuple[int, int] = (11, 13)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value, grad_out; pixels enough for several blocks."""
    query, grad = (random_map((2, c, *size), dtype, layout, DEVICE) for c in (13, 18))
    return query, *(random_tokens(2, c, tokens, dtype, device=DEVICE) for c in (13, 18)), grad


def split_operands(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``odd_operands``; pixels enough for several splits, which are longer in 16 bits."""
    return odd_operands(dtype, size=(11, 13) if dtype == torch.float32 else (19, 29))


def forward_and_backward(query, key, value, grad, needs=(True, True, True)):
    out, logsumexp, _ = torch.ops.annnet.asymmetric_attention(query, None, key, value, None, None, 0.2, False)
    gradients = torch.ops.annnet.asymmetric_attention_bwd(
        grad, query, None, key, value, logsumexp, 0.2, list(needs), "triton"
    )
    return out, logsumexp, *gradients


def backward_plan(query, key, value, grad, needs=(True, True, True), device=None):
    gradients = (torch.empty_like(query), torch.empty_like(key), torch.empty_like(value))
    wanted = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    logsumexp = query.new_empty((query.shape[0], query.shape[2] * query.shape[3]), dtype=torch.float32)
    operands = launches.Operands(query, None, key, value, 0.2, product_precision(query.dtype))
    return launches.plan_backward(grad, operands, logsumexp, tuple(wanted), device or device_of(query))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_over_pixels_is_split(dtype):
    """Or the tests of this file would not see the reduction of partial sums."""
    names = [launch.kernel.__name__ for launch in backward_plan(*split_operands(dtype), device=INTERPRETER)]
    assert names.count("asymmetric_attention_sum_splits_kernel") == 2


@OF_TRAINING
@pytest.mark.parametrize(
    ("needs", "tokens"),
    [*((needs, 43) for needs in itertools.product((True, False), repeat=3)), ((True, False, False), 150)],
    ids=str,
)
def test_gradients_that_are_not_needed(needs, tokens, dtype):
    operands = odd_operands(dtype, tokens=tokens)
    wanted, everything = forward_and_backward(*operands, needs=needs), forward_and_backward(*operands)
    for needed, ours, full in zip(needs, wanted[2:], everything[2:], strict=True):
        assert torch.equal(ours, full) if needed else ours.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_that_are_not_needed_cost_nothing(dtype):
    operands = odd_operands(dtype)
    assert backward_plan(*operands, needs=(False, False, False)) == []
    query_only = backward_plan(*operands, needs=(True, False, False))
    assert [launch.kernel.__name__ for launch in query_only] == ["asymmetric_attention_bwd_pixels_kernel"]
    assert query_only[0].arguments["attention_ptr"] is query_only[0].arguments["dlogits_ptr"] is None
    value_only = backward_plan(*operands, needs=(False, False, True))
    assert value_only[0].arguments["dlogits_ptr"] is value_only[0].arguments["dquery"].pointer is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_deterministic(dtype):
    operands = split_operands(dtype)
    for first, second in zip(forward_and_backward(*operands), forward_and_backward(*operands), strict=True):
        assert torch.equal(first, second)


@OF_TRAINING
@pytest.mark.parametrize(
    ("bad", "layout", "tokens"),
    [(float("inf"), "nchw", 43), (float("-inf"), "channels_last", 43), (float("nan"), "nchw", 150)],
)
def test_non_finite_pixel_spoils_only_its_own_output(bad, layout, tokens, dtype):
    query, key, value, grad = odd_operands(dtype, layout, tokens)
    clean_out, _, clean_dquery, *_ = forward_and_backward(query, key, value, grad)
    spoilt = query.clone()
    spoilt[1, 4, 7, 5] = bad
    out, _, dquery, *_ = forward_and_backward(spoilt, key, value, grad)
    for ours, clean in ((out, clean_out), (dquery, clean_dquery)):
        assert ours[1, :, 7, 5].isnan().all()
        ours[1, :, 7, 5] = clean[1, :, 7, 5] = 0
        assert torch.equal(ours, clean)


@OF_TRAINING
def test_logsumexp(dtype):
    query, key, value, grad = odd_operands(dtype)
    _, logsumexp, *_ = forward_and_backward(query, key, value, grad)
    truth = (query.double().flatten(2).transpose(1, 2) @ key.double() * 0.2).logsumexp(dim=2)
    torch.testing.assert_close(logsumexp.double(), truth, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_of_none(dtype):
    query, key, value, grad = (x[:0] for x in odd_operands(dtype))
    out, logsumexp, *gradients = forward_and_backward(query, key, value, grad)
    assert {x.dtype for x in (out, *gradients)} == {dtype}
    shapes = [tuple(x.shape) for x in (out, logsumexp, *gradients)]
    assert shapes == [(0, 18, 11, 13), (0, 11 * 13), (0, 13, 11, 13), (0, 13, 43), (0, 18, 43)]


@pytest.mark.parametrize(("layout", "tokens"), [("nchw", 43), ("channels_last", 150), ("transposed", 43)])
def test_touches_nothing_beyond_its_tensors(layout, tokens):
    """Inputs lie in memory full of NaN, outputs in memory that must not change."""
    operands = odd_operands(torch.bfloat16, layout, tokens)
    expected = forward_and_backward(*operands)
    query, key, value, grad = (surrounded(x, float("nan"))[0] for x in operands)
    outputs = [surrounded(torch.zeros_like(x), 7.0) for x in expected]
    untouched = [memory.clone() for _, memory in outputs]
    out, logsumexp, *gradients = (inside for inside, _ in outputs)
    moments = torch.empty(0, dtype=torch.float64, device=DEVICE)
    operands = query, None, key, value, None, None, 0.2, False
    launches.asymmetric_attention(*operands, out, logsumexp, moments)
    launches.asymmetric_attention_bwd(grad, query, None, key, value, logsumexp, 0.2, (True, True, True), *gradients)
    for (ours, memory), reference, before in zip(outputs, expected, untouched, strict=True):
        assert torch.equal(ours, reference)
        ours.zero_()
        assert torch.equal(memory, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_offsets_beyond_32_bits(dtype):
    """Strides whose products exceed 2³¹ elements, on memory that is mostly never touched."""
    height, width, channels = 2, 3, 3
    stride = 2**30 + 5
    memory = torch.empty(channels * stride, dtype=dtype, device=DEVICE)
    query = memory.as_strided((1, channels, height, width), (0, stride, width, 1))
    query.copy_(torch.randn(1, channels, height, width))
    key, value = (random_tokens(1, c, 5, dtype, device=DEVICE) for c in (channels, 4))
    far, near = (
        torch.ops.annnet.asymmetric_attention(q, None, key, value, None, None, 1.0, False)[0]
        for q in (query, query.clone())
    )
    assert torch.equal(far, near)


# The norm of the query, and what is added


def truth_of_normalised(y, norm, key, value, skip, constant, grad):
    """Output and gradients of z, key and value in float64."""
    mean, invstd, weight, bias = norm.double()[:, None, :, None, None]
    z = ((y.double() - mean) * invstd * weight + bias).relu().requires_grad_()
    leaves = [z, *(x.double().requires_grad_() for x in (key, value))]
    with ak.use_backend("reference"):
        out = ak.asymmetric_attention(*leaves, 0.2)
        gradients = torch.autograd.grad(out, leaves, grad.double())
    out = out + constant.double()[:, None, None]
    return out if skip is None else out + skip.double(), *gradients


def named(results) -> Results:
    return dict(zip(("out", "dz", "dkey", "dvalue"), results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("layout", "tokens", "with_skip"),
    [*((layout, 43, True) for layout in LAYOUTS), ("nchw", 43, False), ("channels_last", 150, True)],
)
def test_norm_skip_and_constant(layout, tokens, with_skip, dtype):
    def run(seed):
        y = random_map((1, 13, 7, 11), dtype, layout, DEVICE)
        key, value = (random_tokens(1, c, tokens, dtype, device=DEVICE) for c in (13, 18))
        grad = random_map((1, 18, 7, 11), dtype, layout, DEVICE)
        skip = random_map((1, 18, 7, 11), dtype, layout, DEVICE) if with_skip else None
        norm, constant = random_norm(13, DEVICE), torch.randn(18, device=DEVICE)

        def results(backend):
            with ak.use_backend(backend):
                operands = y, norm, key, value, skip, constant, 0.2, True
                out, logsumexp, moments = torch.ops.annnet.asymmetric_attention(*operands)
                torch.testing.assert_close(moments, torch.ops.annnet.batch_norm_moments(out))
            gradients = torch.ops.annnet.asymmetric_attention_bwd(
                grad, y, norm, key, value, logsumexp, 0.2, [True, True, True], backend
            )
            return named((out, *gradients))

        tensors = (y, norm, key, value, skip, constant, grad)
        return results("triton"), named(plain_of_normalised(*tensors)), named(truth_of_normalised(*tensors))

    assert_as_accurate_as_plain(run, dtype, seeds=SEEDS)
    assert ak.last_backend("asymmetric_attention_bwd") == "reference"  # of the truth


@OF_TRAINING
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_in_place_is_the_same_sum(layout, dtype):
    y, skip = (random_map((1, c, 7, 11), dtype, layout, DEVICE) for c in (13, 40))
    key, value = (random_tokens(1, c, 43, dtype, device=DEVICE) for c in (13, 40))
    operands = (y, random_norm(13, DEVICE), key, value, skip, torch.randn(40, device=DEVICE), 0.2, False)
    out, _, _ = torch.ops.annnet.asymmetric_attention(*operands)
    torch.ops.annnet.asymmetric_attention_(*operands)
    assert torch.equal(skip, out)


def plain_of_normalised(y, norm, key, value, skip, constant, grad):
    """The published operations in the dtype of y: batch norm in float32, rounded; attention; sum."""
    mean, invstd, weight, bias = norm[:, None, :, None, None]
    z = ((y.float() - mean) * invstd * weight + bias).to(y.dtype).relu().requires_grad_()
    leaves = [z, *(x.detach().requires_grad_() for x in (key, value))]
    out = plain_attention(*leaves, 0.2)
    gradients = torch.autograd.grad(out, leaves, grad)
    out = out + constant.to(y.dtype)[:, None, None]
    return out if skip is None else out + skip, *gradients


@OF_TRAINING
def test_rectifying_keeps_nan(dtype):
    y = torch.randn(1, 8, 3, 5, device=DEVICE).to(dtype)
    y[0, 2, 1, 1] = float("nan")
    key, value = (random_tokens(1, c, 9, dtype, device=DEVICE) for c in (8, 6))
    out, _, _ = torch.ops.annnet.asymmetric_attention(y, random_norm(8, DEVICE), key, value, None, None, 0.2, False)
    assert out[0, :, 1, 1].isnan().all()
    assert out.isnan().sum() == 6
