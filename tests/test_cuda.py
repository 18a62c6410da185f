"""Blocks on a GPU as PyTorch's own: streams, devices, CUDA graphs, determinism, and no synchronisation."""

import copy

import pytest
import torch
from block_rule import CLASSES, MAPS, assert_same, build

from annnet_kernels.blocks import programs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

BFLOAT16 = torch.bfloat16
"""Streams, graphs and determinism ask nothing of dtype and layout, and each pair costs 20 kernel variants: so those of
training, channels_last with it. Kernels alone are tested for determinism in both layouts."""


@pytest.fixture(autouse=True)
def _deterministic_libraries(monkeypatch):
    """Where bits are compared, cuDNN and cuBLAS must give the same ones too."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=CLASSES)
def kind(request):
    return request.param


def make(kind, device="cuda"):
    """A block in training, its maps, and a weighting of its output."""
    block = build(kind)[0].to(device, BFLOAT16)
    maps = [torch.randn(b, c, 5 * h, 5 * w, dtype=BFLOAT16, device=device) for b, c, h, w in MAPS[kind]]
    maps = [x.to(memory_format=torch.channels_last) for x in maps]
    with torch.no_grad():
        weights = torch.randn_like(copy.deepcopy(block)(*maps))
    return block, maps, weights


def step(block, maps, weights):
    """Output, gradients and buffers of one training step of a copy."""
    block = copy.deepcopy(block)
    inputs = [x.detach().clone().requires_grad_() for x in maps]
    out = block(*inputs)
    (out * weights).sum().backward()
    found = {"out": out.detach()} | {f"grad input {i}": x.grad for i, x in enumerate(inputs)}
    found |= {f"grad {name}": p.grad for name, p in block.named_parameters()}
    return found | dict(block.named_buffers())


def assert_equal_bits(got, want):
    assert got.keys() == want.keys()
    different = [name for name in want if not torch.equal(got[name], want[name])]
    assert not different


def test_another_stream(kind):
    """The maps are made on that stream behind a long delay: kernels on any other would read them too early."""
    block, maps, weights = make(kind)
    expected = step(block, maps, weights)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = [torch.full_like(x, torch.nan) for x in maps]
        torch.cuda._sleep(10**8)
        for x, value in zip(late, maps, strict=True):
            x.copy_(value)
        found = step(block, late, weights)
    stream.synchronize()
    assert_equal_bits(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one(kind):
    block, maps, weights = make(kind)
    expected = step(block, maps, weights)
    torch.cuda.set_device(0)
    found = step(block.to("cuda:1"), [x.to("cuda:1") for x in maps], weights.to("cuda:1"))
    assert {x.device.index for x in found.values()} == {1}
    assert_same({name: x.cpu() for name, x in found.items()}, {n: x.cpu() for n, x in expected.items()}, 1e-2)


def test_a_training_step_in_a_cuda_graph(kind):
    """Captured once, replayed with other maps, against the same steps run one by one."""
    block, maps, weights = make(kind)
    twin = copy.deepcopy(block)
    static = [x.clone().requires_grad_() for x in maps]

    def run(block, inputs):
        for p in (*block.parameters(), *inputs):
            p.grad = None
        out = block(*inputs)
        (out * weights).sum().backward()
        return out

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(block, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(block, static)
    twin.load_state_dict(block.state_dict())
    for _ in range(3):
        fresh = [torch.randn_like(x) for x in maps]
        with torch.no_grad():
            for x, value in zip(static, fresh, strict=True):
                x.copy_(value)
        graph.replay()
        inputs = [x.requires_grad_() for x in fresh]
        expected = {"out": run(twin, inputs).detach()} | {f"grad {i}": x.grad for i, x in enumerate(inputs)}
        expected |= {n: p.grad for n, p in twin.named_parameters()} | {f"after {n}": b for n, b in twin.named_buffers()}
        found = {"out": out.detach()} | {f"grad {i}": x.grad for i, x in enumerate(static)}
        found |= {n: p.grad for n, p in block.named_parameters()} | {f"after {n}": b for n, b in block.named_buffers()}
        assert_same(found, expected, tolerance=1e-2)


def test_a_program_computes_what_the_ordinary_forward_computes(kind, monkeypatch):
    block, maps, weights = make(kind)
    found = step(block, maps, weights)
    assert None not in programs._programs.values()
    monkeypatch.setattr(programs, "run", lambda *_: None)
    assert_equal_bits(found, step(block, maps, weights))


def test_deterministic_mode_gives_the_same_bits(kind):
    block, maps, weights = make(kind)
    first = step(block, maps, weights)
    for _ in range(3):
        assert_equal_bits(step(block, maps, weights), first)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_waits_for_the_gpu(kind, training):
    block, maps, weights = make(kind)
    block.train(training)
    inputs = [x.requires_grad_() for x in maps]
    (block(*inputs) * weights).sum().backward()  # what compiles at a first call may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        (block(*inputs) * weights).sum().backward()
        with torch.no_grad():
            block(*inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
