"""The C++ attention on the CPU: error against float64, every layout, gradient flag, and its memory manners."""

from __future__ import annotations

import importlib
import itertools
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from attention_rule import assert_accurate, plain_attention, random_tokens
from fresh import python
from helpers import LAYOUTS, random_map, surrounded
from torch import Tensor

import annnet_kernels as ak
from annnet_kernels.runtime import native
from annnet_kernels.runtime.backends import requested_backend

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu"))),
]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)

# batch, key channels, value channels, height, width, tokens
SHAPES = (
    (1, 256, 256, 13, 17, 110),  # the fast case; pixels are no multiple of a block
    (2, 19, 48, 13, 17, 7),
    (3, 96, 19, 1, 37, 110),  # one row
    (40, 80, 96, 1, 1, 5),  # one pixel; many images, or single draws scatter
    (1, 48, 80, 12, 11, 1),  # one token: the softmax is constant
    (1, 512, 2048, 5, 9, 50),  # several chunks of channels
    (1, 2048, 19, 5, 5, 13),
    (1, 48, 80, 5, 7, 1024),  # many tokens
    (2, 1, 1, 29, 31, 3),  # one channel
)


@pytest.fixture(autouse=True)
def _native_backend() -> Iterator[None]:
    with ak.use_backend("native"):
        yield


def assert_native_accurate(shape: tuple[int, int, int, int, int, int], dtype: torch.dtype, **options: Any) -> None:
    assert_accurate(shape, dtype, "native", **options)
    assert ak.last_backend("asymmetric_attention") == ak.last_backend("asymmetric_attention_bwd") == "native"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy_of_shapes(shape: tuple[int, int, int, int, int, int], dtype: torch.dtype) -> None:
    assert_native_accurate(shape, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_of_map_layouts(layout: str, dtype: torch.dtype) -> None:
    assert_native_accurate((2, 19, 37, 13, 29, 23), dtype, map_layout=layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["channels", "slice", "expanded"])
def test_accuracy_of_token_layouts(layout: str, dtype: torch.dtype) -> None:
    assert_native_accurate((2, 19, 37, 13, 29, 23), dtype, map_layout="channels_last", token_layout=layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [8.0, 300.0])
def test_accuracy_of_peaked_softmax(magnitude: float, dtype: torch.dtype) -> None:
    """Logits of standard deviation 8, then in the hundreds: no overflow, no NaN, no loss of accuracy."""
    assert_native_accurate((1, 64, 48, 19, 23, 110), dtype, magnitude=magnitude)


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_accuracy_of_unusual_scales(scale: float) -> None:
    assert_native_accurate((1, 16, 24, 9, 11, 30), torch.float32, scale=scale)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("scale", [1.0, 0.3, -1.0])
def test_logits_up_to_the_largest_float(scale: float, layout: str) -> None:
    """One channel, so that a logit is one product; keys are equal or far apart."""
    magnitude = 10.0 ** torch.empty(1, 1, 31, 37).uniform_(0, 38)
    query = (magnitude * torch.randn(1, 1, 31, 37).sign()).expand(1, 2, 31, 37) * torch.tensor([1.0, 0.0])[
        :, None, None
    ]
    query = query.contiguous(
        memory_format=torch.channels_last if layout == "channels_last" else torch.contiguous_format
    )
    key, value = torch.tensor([1.0, 0.5, -1.0, -0.25])[torch.randint(4, (1, 2, 43))], torch.randn(1, 24, 43)
    out, logsumexp, _ = torch.ops.annnet.asymmetric_attention(query, None, key, value, None, None, scale, False)
    truth = plain_attention(query.double(), key.double(), value.double(), scale)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    logits = query.double().flatten(2).transpose(1, 2) @ key.double() * scale
    torch.testing.assert_close(logsumexp.double(), logits.logsumexp(dim=2), rtol=1e-6, atol=1e-6)


CHANNELS = pytest.mark.parametrize("channels", [(21, 35), (24, 40)], ids=["packed", "in_place"])
"""Of query and value: maps are read in place where these are multiples of the rows of a tile."""


def operands_of_odd_sizes(
    dtype: torch.dtype, layout: str = "nchw", channels: tuple[int, int] = (21, 35)
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value, grad_out."""
    query, grad = (random_map((2, count, 31, 37), dtype, layout) for count in channels)
    key, value = (random_tokens(2, count, 43, dtype) for count in channels)
    return query, key, value, grad


def forward_and_backward(
    query: Tensor, key: Tensor, value: Tensor, grad: Tensor, needs: tuple[bool, ...] = (True, True, True)
) -> tuple[Tensor, ...]:
    out, logsumexp, _ = torch.ops.annnet.asymmetric_attention(query, None, key, value, None, None, 0.2, False)
    gradients = torch.ops.annnet.asymmetric_attention_bwd(
        grad, query, None, key, value, logsumexp, 0.2, needs, requested_backend()
    )
    return out, logsumexp, *gradients


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CHANNELS
def test_bitwise_equal_for_any_number_of_threads(channels: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    operands = operands_of_odd_sizes(dtype, layout, channels)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(forward_and_backward(*operands))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for ours, first in zip(result, results[0], strict=True):
            assert torch.equal(ours, first)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("needs", tuple(itertools.product((True, False), repeat=3)), ids=str)
@CHANNELS
def test_gradients_that_are_not_needed(channels: tuple[int, int], needs: tuple[bool, ...], layout: str) -> None:
    operands = operands_of_odd_sizes(torch.float32, layout, channels)
    wanted, everything = forward_and_backward(*operands, needs=needs), forward_and_backward(*operands)
    for needed, ours, full in zip(needs, wanted[2:], everything[2:], strict=True):
        assert torch.equal(ours, full) if needed else ours.shape == (0,)


@pytest.mark.parametrize("shape", [(3, 24, 1, 1), (1, 1, 5, 7)], ids=["one pixel", "one channel"])
def test_gradients_that_are_not_needed_where_both_layouts_are_dense(shape: tuple[int, int, int, int]) -> None:
    """The strides of channels_last, in which dquery is contiguous as well."""
    batch, channels, height, width = shape
    query = torch.randn(batch, height, width, channels + 3).permute(0, 3, 1, 2)[:, 3:]
    grad = random_map((batch, 40, height, width), torch.float32, "channels_last")
    key, value = random_tokens(batch, channels, 43, torch.float32), random_tokens(batch, 40, 43, torch.float32)
    everything = forward_and_backward(query, key, value, grad)
    wanted = forward_and_backward(query, key, value, grad, needs=(False, True, True))
    assert torch.equal(wanted[3], everything[3])
    assert torch.equal(wanted[4], everything[4])


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CHANNELS
def test_non_finite_pixel_spoils_only_its_own_output(
    channels: tuple[int, int], dtype: torch.dtype, layout: str, bad: float
) -> None:
    query, key, value, grad = operands_of_odd_sizes(dtype, layout, channels)
    clean_out, _, clean_dquery, *_ = forward_and_backward(query, key, value, grad)
    spoilt = query.clone()
    spoilt[1, 4, 7, 5] = bad
    out, _, dquery, *_ = forward_and_backward(spoilt, key, value, grad)
    for ours, clean in ((out, clean_out), (dquery, clean_dquery)):
        assert ours[1, :, 7, 5].isnan().all()
        ours[1, :, 7, 5] = clean[1, :, 7, 5] = 0
        assert torch.equal(ours, clean)


GUARDED = """
import ctypes, mmap, torch
import annnet_kernels as ak

def guarded(*shape):
    count, page = torch.Size(shape).numel(), mmap.PAGESIZE
    pages = -(-4 * count // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + pages * page), ctypes.c_size_t(page), 0) == 0
    return torch.frombuffer(memory, dtype=torch.float32, offset=pages * page - 4 * count, count=count).view(shape)

for maps in (lambda c: guarded(1, c, 31, 37), lambda c: guarded(1, 31, 37, c).permute(0, 3, 1, 2)):
    query, key, value = maps(24).requires_grad_(), torch.randn(1, 24, 43), torch.randn(1, 40, 43)
    with ak.use_backend("native"):
        ak.asymmetric_attention(query, key.requires_grad_(), value.requires_grad_()).backward(maps(40))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects a page as Linux does")
def test_reads_nothing_beyond_a_map_in_place() -> None:
    """The maps end where a page begins that must not be read; the last block has parts of vectors and of tiles."""
    run = python(GUARDED)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_reading_in_place_changes_no_bit(layout: str) -> None:
    """Rows with a gap after them are packed."""
    query, key, value, grad = operands_of_odd_sizes(torch.float32, layout, (24, 40))
    with_gaps = [torch.cat([x, x], dim=3)[..., : x.shape[3]] for x in (query, grad)]
    assert all(x.stride() != gaps.stride() for x, gaps in zip((query, grad), with_gaps, strict=True))
    expected = forward_and_backward(with_gaps[0], key, value, with_gaps[1])
    for ours, packed in zip(forward_and_backward(query, key, value, grad), expected, strict=True):
        assert torch.equal(ours, packed)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_logsumexp(layout: str) -> None:
    query, key, value, grad = operands_of_odd_sizes(torch.float32, layout)
    _, logsumexp, *_ = forward_and_backward(query, key, value, grad)
    truth = (query.double().flatten(2).transpose(1, 2) @ key.double() * 0.2).logsumexp(dim=2)
    torch.testing.assert_close(logsumexp.double(), truth, rtol=1e-6, atol=1e-6)


def test_batch_of_none() -> None:
    query, key, value, grad = (x[:0] for x in operands_of_odd_sizes(torch.float32))
    shapes = [tuple(x.shape) for x in forward_and_backward(query, key, value, grad)]
    assert shapes == [(0, 35, 31, 37), (0, 31 * 37), (0, 21, 31, 37), (0, 21, 43), (0, 35, 43)]


@pytest.mark.parametrize("layout", ["nchw", "channels_last", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@CHANNELS
def test_touches_nothing_beyond_its_tensors(channels: tuple[int, int], dtype: torch.dtype, layout: str) -> None:
    """Inputs lie in memory full of NaN, outputs in memory that must not change."""
    operands = operands_of_odd_sizes(dtype, layout, channels)
    expected = forward_and_backward(*operands)
    query, key, value, grad = (surrounded(x, float("nan"))[0] for x in operands)
    outputs = [surrounded(torch.zeros_like(x), 7.0) for x in expected]
    untouched = [memory.clone() for _, memory in outputs]
    out, logsumexp, dquery, dkey, dvalue = (inside for inside, _ in outputs)
    moments = torch.empty(0, dtype=torch.float64)
    operands = query, None, key, value, None, None, 0.2, False
    torch.ops.annnet_native.asymmetric_attention(*operands, out, logsumexp, moments)
    torch.ops.annnet_native.asymmetric_attention_bwd(
        grad, query, None, key, value, logsumexp, 0.2, (True, True, True), dquery, dkey, dvalue
    )
    for (ours, memory), reference, before in zip(outputs, expected, untouched, strict=True):
        assert torch.equal(ours, reference)
        ours.zero_()
        assert torch.equal(memory, before)


def test_direct_calls_are_checked() -> None:
    query, key, value, _ = operands_of_odd_sizes(torch.float32)
    out, logsumexp = torch.empty(2, 35, 31, 37), torch.empty(2, 31 * 37)
    moments = torch.empty(0, dtype=torch.float64)

    def call(query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor) -> None:
        operands = query, None, key, value, None, None, 0.2, False
        torch.ops.annnet_native.asymmetric_attention(*operands, out, logsumexp, moments)

    with pytest.raises(ValueError, match="key: expected shape"):
        call(query, key[:, :20], value, out, logsumexp)
    with pytest.raises(ValueError, match="value: expected shape"):
        call(query, key, value[:, :, 1:], out, logsumexp)
    with pytest.raises(TypeError, match="value: expected the dtype of query"):
        call(query, key, value.double(), out, logsumexp)
    with pytest.raises(ValueError, match="out: expected a dense"):
        call(query, key, value, random_map((2, 35, 31, 37), torch.float32, "slice"), logsumexp)
    with pytest.raises(TypeError, match="logsumexp: expected dtype"):
        call(query, key, value, out, logsumexp.double())


def test_level_follows_the_environment() -> None:
    levels = importlib.import_module("annnet_kernels._C").cpu_levels()
    level = os.environ.get("ANNNET_CPU_LEVEL")
    assert native.cpu_level() == (level if level in levels else levels[-1])
