"""Tables of norms against ``nn.BatchNorm2d.forward``, in every state that a module can be in."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

import annnet_kernels as ak
from annnet_kernels.blocks.normalization import (
    FeatureMap,
    Shift,
    apply_tail,
    moments_of,
    norm_of,
    sums_of,
    uses_batch_statistics,
)
from annnet_kernels.runtime import native

pytestmark = pytest.mark.usefixtures("one_thread")

NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))
)
BACKENDS = ("reference", NATIVE)
CHANNELS = 5
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
MOMENTA = (None, 0.0, 0.1, 1.0)


def module_in(state: tuple, dtype: torch.dtype) -> nn.BatchNorm2d:
    """A batch norm with random parameters and buffers; what it tracks is decided after it was built."""
    training, tracked, momentum, present, affine = state
    norm = nn.BatchNorm2d(CHANNELS, momentum=momentum, affine=affine).to(dtype)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.num_batches_tracked.fill_(3)
    norm.track_running_stats = tracked
    for name, there in zip(BUFFERS, present, strict=True):
        if not there:
            setattr(norm, name, None)
    return norm.train(training)


STATES = list(
    itertools.product((True, False), (True, False), MOMENTA, itertools.product((True, False), repeat=3), (True, False))
)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_every_state_of_a_module(dtype: torch.dtype, calls: int, backend: str) -> None:
    exact = dtype == torch.float64
    refused = 0
    for state in STATES:
        ours = module_in(state, dtype)
        twin = copy.deepcopy(ours)
        x, weights = torch.randn(2, 3, CHANNELS, 4, 6, dtype=dtype)
        mine, theirs = (x.clone().requires_grad_() for _ in range(2))
        try:
            with torch.no_grad():
                for _ in range(calls - 1):
                    twin(x)
            expected = twin(theirs).relu() if exact else twin(theirs)  # rounding would decide what a ReLU lets pass
        except (ValueError, RuntimeError):  # the latter in evaluation
            refused += 1
            with pytest.raises(ValueError, match="running_mean and running_var, or neither"):
                norm_of(ours, mine, calls=calls)
            continue
        with ak.use_backend(backend):
            out = apply_tail(FeatureMap(mine, norm_of(ours, mine, calls=calls)), exact, None)
            gradients = torch.autograd.grad(out, [mine, *ours.parameters()], weights)
        truth = torch.autograd.grad(expected, [theirs, *twin.parameters()], weights)
        tolerance = {} if exact else {"atol": 0.1, "rtol": 0.05}
        torch.testing.assert_close((out, gradients), (expected, truth), msg=f"{state}", **tolerance)
        assert [name for name, _ in ours.named_buffers()] == [name for name, _ in twin.named_buffers()]
        for (name, buffer), other in zip(ours.named_buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(buffer, other, msg=f"{name} of {state}", **tolerance)
    assert refused == len(STATES) * 3 // 8  # one of both statistics is missing, and they are asked for


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norm_that_no_longer_tracks_leaves_its_buffers_alone(backend: str) -> None:
    block = ak.APNB(4, 4, CHANNELS, 4)
    norm = next(module for module in block.modules() if isinstance(module, nn.BatchNorm2d))
    norm.track_running_stats = False
    before = copy.deepcopy(norm.state_dict())
    with ak.use_backend(backend):
        block(torch.randn(2, 4, 7, 9))
    assert "collapsed" in repr(block)
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_convolution_bias_enters_the_running_mean_alone(momentum: float | None, backend: str) -> None:
    norm = nn.BatchNorm2d(CHANNELS, momentum=momentum).double()
    twin = copy.deepcopy(norm)
    y, bias = torch.randn(2, CHANNELS, 4, 6, dtype=torch.float64), torch.randn(CHANNELS, dtype=torch.float64)
    for _ in range(2):
        twin(y + bias[:, None, None])
    with ak.use_backend(backend):
        table = norm_of(norm, y, Shift(bias), calls=2).table
    torch.testing.assert_close(norm.state_dict(), twin.state_dict())
    torch.testing.assert_close(table[0], y.mean((0, 2, 3)))
    torch.testing.assert_close(table[1], (y.var((0, 2, 3), correction=0) + norm.eps).rsqrt())


@pytest.mark.parametrize("backend", BACKENDS)
def test_buffers_that_change_are_counted_as_changed(backend: str) -> None:
    """Whoever keeps what was made of them, such as a fold, asks for their versions."""
    norm = nn.BatchNorm2d(CHANNELS)
    before = [buffer._version for buffer in norm.buffers()]
    with ak.use_backend(backend):
        norm_of(norm, torch.randn(2, CHANNELS, 3, 4))
    assert all(buffer._version > version for buffer, version in zip(norm.buffers(), before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_buffers_and_parameters(backend: str) -> None:
    norm = nn.BatchNorm2d(CHANNELS)
    twin = copy.deepcopy(norm)
    for name in BUFFERS[:2]:
        setattr(norm, name, getattr(norm, name).repeat_interleave(2)[::2])
    norm.weight = nn.Parameter(norm.weight.detach().repeat_interleave(2)[::2])
    y = torch.randn(2, CHANNELS, 3, 4)
    with ak.use_backend(backend):
        out = apply_tail(FeatureMap(y, norm_of(norm, y)), False, None)
    torch.testing.assert_close(out, twin(y))
    torch.testing.assert_close(norm.state_dict(), twin.state_dict())


@pytest.mark.parametrize("backend", BACKENDS)
def test_moments_add_up_over_maps(backend: str) -> None:
    maps = [torch.randn(batch, CHANNELS, 3, width) + 7 for batch, width in ((2, 5), (1, 1), (0, 3), (3, 2))]
    with ak.use_backend(backend):
        found = moments_of(sum(sums_of(y) for y in maps))
    values = torch.cat([y.transpose(0, 1).flatten(1) for y in maps], dim=1).double()
    deviation = (values - values.mean(1, keepdim=True)).square().sum(1)
    count = torch.full((CHANNELS,), float(values.shape[1]), dtype=torch.float64)
    torch.testing.assert_close(found, torch.stack((count, values.mean(1), deviation)), rtol=1e-6, atol=1e-6)


def test_what_uses_batch_statistics() -> None:
    norm = nn.BatchNorm2d(CHANNELS).eval()
    assert not uses_batch_statistics(norm)
    norm.running_mean = None
    assert not uses_batch_statistics(norm)  # and evaluation is refused
    norm.running_var = None
    assert uses_batch_statistics(norm)
    assert uses_batch_statistics(nn.BatchNorm2d(CHANNELS))
