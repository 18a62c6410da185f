"""Mixed precision: the one autocast rule, gradient scaling, and that nothing is rounded to 16 bits unasked.

The attention and its operands follow the autocast dtype, pooling keeps the dtype of its map, float64 stays, and the
small products of the collapse are float32.
"""

import copy
from types import SimpleNamespace

import pytest
import torch
from block_rule import CLASSES, MAPS, OUT, build
from helpers import assert_as_accurate_as_plain
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import annnet_kernels as ak
from annnet_kernels.runtime.autocast import autocast_dtype

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
PRECISIONS = [
    pytest.param("cpu", torch.bfloat16, id="cpu-bfloat16"),
    pytest.param("cpu", torch.float16, id="cpu-float16"),
    pytest.param("cuda", torch.bfloat16, id="cuda-bfloat16", marks=CUDA),
    pytest.param("cuda", torch.float16, id="cuda-float16", marks=CUDA),
]
UNSCALED = [p for p in PRECISIONS if p.id != "cuda-float16"]
SCALED = [p for p in PRECISIONS if p.id != "cuda-bfloat16"]
"""Gradients are scaled for float16; on a GPU another dtype would compile more kernel variants in every test."""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=CLASSES)
def kind(request):
    return request.param


@pytest.mark.parametrize(("device", "dtype"), UNSCALED)
def test_the_rule(device, dtype):
    maps = {d: torch.randn(2, 6, 9, 7, dtype=d, device=device) for d in (torch.float32, dtype, torch.float64)}
    tokens = {d: torch.randn(2, 6, 5, dtype=d, device=device) for d in maps}
    with torch.autocast(device, dtype):
        for own, x in maps.items():
            assert ak.pyramid_pool(x).dtype == own
            expected = torch.float64 if own == torch.float64 else dtype
            assert ak.asymmetric_attention(x, tokens[own], tokens[own]).dtype == expected
        mixed = ak.asymmetric_attention(maps[torch.float32], tokens[dtype], tokens[torch.float32])
    rounded = (maps[torch.float32].to(dtype), tokens[dtype], tokens[torch.float32].to(dtype))
    torch.testing.assert_close(mixed, ak.asymmetric_attention(*rounded))
    with (
        torch.autocast(device, dtype, enabled=False),
        pytest.raises(TypeError, match="key: expected the dtype of query"),
    ):
        ak.asymmetric_attention(maps[torch.float32], tokens[dtype], tokens[dtype])


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(("device", "dtype"), UNSCALED)
def test_autocast_changes_nothing_inside_an_operator(device, dtype, backend):
    def attend(*operands):
        out, attention = ak.asymmetric_attention(*operands, return_attention=True)
        return out, attention, *torch.autograd.grad(out.sum(), operands)

    query, key, value = (torch.randn(2, 6, *size, dtype=dtype, device=device) for size in ((9, 7), (5,), (5,)))
    operands = [x.requires_grad_() for x in (query, key, value)]
    with ak.use_backend(backend):
        expected = attend(*operands)
        with torch.autocast(device, dtype):
            found = attend(*operands)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def scaled_step(block, maps, weights, device, dtype, scale):
    """Output, and gradients as an optimizer sees them: scaled, then unscaled."""
    block = copy.deepcopy(block)
    inputs = [x.detach().clone().requires_grad_() for x in maps]
    optimizer = torch.optim.SGD([*block.parameters(), *inputs], lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=scale)
    with torch.autocast(device, dtype, enabled=dtype is not None):
        out = block(*inputs)
    scaler.scale((out * weights).sum()).backward()
    scaler.unscale_(optimizer)
    found = {"out": out.detach()} | {f"grad map {i}": x.grad for i, x in enumerate(inputs)}
    return found | {f"grad {name}": p.grad for name, p in block.named_parameters()}


@pytest.mark.parametrize(("device", "dtype"), SCALED[1:])  # the first, unscaled: test_blocks.py
def test_a_scaled_step_is_as_accurate_as_plain(kind, device, dtype):
    def run(seed):
        fused, plain = (block.to(device) for block in build(kind))
        maps = [torch.randn(b, c, 4 * h, 4 * w, dtype=torch.float64, device=device) for b, c, h, w in MAPS[kind]]
        weights = torch.randn(2, OUT, *maps[-1].shape[2:], dtype=torch.float64, device=device)
        truth = scaled_step(plain, maps, weights, device, None, 1.0)
        single = [x.float() for x in maps]
        results = [scaled_step(b.float(), single, weights.float(), device, dtype, 2.0**4) for b in (fused, plain)]
        for name in [n for n in truth if n.endswith("bias") and is_nothing(n, truth)]:
            for found in (truth, *results):
                del found[name]
        return *results, truth

    assert_as_accurate_as_plain(run, dtype, seeds=15)


def is_nothing(name, truth):
    """A bias ahead of batch statistics: its gradient cancels."""
    weight = name.replace("bias", "weight")
    return float(truth[name].norm()) < 1e-9 * float(truth[weight].norm())


@pytest.mark.parametrize(("device", "dtype"), SCALED)
def test_an_overflow_skips_the_step(kind, device, dtype):
    block = build(kind)[0].float().to(device)
    before = copy.deepcopy(block.state_dict())
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    maps = [torch.randn(b, c, 4 * h, 4 * w, device=device) for b, c, h, w in MAPS[kind]]
    for factor, moves in ((torch.inf, False), (1.0, True)):
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            loss = (block(*maps) * factor).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(p.isfinite().all() for p in block.parameters())
        moved = any(not torch.equal(p, before[name]) for name, p in block.named_parameters())
        assert moved == moves
        assert scaler.get_scale() == 2.0


class Narrow(TorchDispatchMode):
    """Collects floating-point results narrower than ``dtype``, by operator."""

    def __init__(self, dtype):
        super().__init__()
        self.bits, self.found = torch.finfo(dtype).bits, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and torch.finfo(x.dtype).bits < self.bits:
                self.found.add(f"{function}: {x.dtype}")
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_rounded_unasked(kind, training, dtype):
    block = build(kind)[0].to(dtype).train(training)
    maps = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in MAPS[kind]]
    with Narrow(dtype) as narrow:
        out = block(*maps)
        tokens = ak.pyramid_pool(out)
        ak.asymmetric_attention(out, tokens, tokens[:, :3]).sum().backward()
    assert not narrow.found
    assert out.dtype == dtype
    assert all(p.grad.dtype == dtype for p in block.parameters())


def test_a_block_keeps_the_dtype_of_the_plain_block(kind):
    fused, plain = (block.float() for block in build(kind))
    maps = [torch.randn(shape) for shape in MAPS[kind]]
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(*maps).dtype == plain(*maps).dtype == torch.bfloat16
    assert all(b.dtype in (torch.float32, torch.int64) for b in fused.buffers())


def test_autocast_of_a_device_that_is_not_here():
    """PyTorch's quick answer, whether any autocast is on, leaves Metal's out."""
    on_metal = SimpleNamespace(is_cpu=False, device=SimpleNamespace(type="mps"))
    torch.set_autocast_enabled("mps", True)
    try:
        assert autocast_dtype(on_metal) == torch.get_autocast_dtype("mps")
        assert autocast_dtype(torch.ones(1)) is None
    finally:
        torch.set_autocast_enabled("mps", False)
