"""torch.compile: one graph without a break, and one compilation for ten sizes of map.

Inductor's own lowering of a convolution's backward (torch 2.10, 2.11, 2.14: a lone ``Conv2d`` shows it) holds for one
size. So a training step of the blocks is held to one compilation ahead of inductor; inductor is held to it where it
compiles no such backward: in evaluation, and for the operators.
"""

import copy

import pytest
import torch
from block_rule import CLASSES, MAPS, assert_same, build
from torch import nn

import annnet_kernels as ak

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = (
    (2, 13, 9),
    (3, 9, 17),
    (2, 20, 20),
    (4, 7, 5),
    (2, 33, 8),
    (5, 8, 33),
    (3, 16, 16),
    (2, 6, 6),
    (6, 3, 19),
    (2, 97, 2),
)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


class Operators(nn.Module):
    """Keys and values are one tensor, as users write it."""

    def forward(self, low, high):
        tokens = ak.pyramid_pool(low, (1, (2, 3)))
        return ak.asymmetric_attention(low, tokens, tokens), ak.pyramid_pool(high)


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.afnb, self.apnb = (build(kind)[0] for kind in CLASSES)

    def forward(self, low, high):
        return self.afnb(low, high), self.apnb(high)


def draw(size, device="cpu", dtype=torch.float64):
    batch, height, width = size
    shapes = [(batch, shape[1], height + i, width + i) for i, shape in enumerate(MAPS["AFNB"])]
    return [torch.randn(shape, dtype=dtype, device=device) for shape in shapes]


def step(call, model, maps):
    """Outputs, gradients and buffers of one training step."""
    maps = [x.clone().requires_grad_() for x in maps]
    model.zero_grad()
    outputs = call(*maps)
    sum((out * torch.linspace(-1, 1, out.numel()).to(out).view(out.shape)).sum() for out in outputs).backward()
    found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
    found |= {f"grad input {i}": x.grad for i, x in enumerate(maps) if x.grad is not None}
    found |= {f"grad {name}": p.grad.clone() for name, p in model.named_parameters()}
    return found | {name: b.clone() for name, b in model.named_buffers()}


def forward(call, model, maps):
    with torch.no_grad():
        return {f"output {i}": out for i, out in enumerate(call(*maps))}


@pytest.mark.parametrize(
    ("make", "what", "backend"),
    [(Blocks, step, "aot_eager"), (lambda: Blocks().eval(), forward, "inductor"), (Operators, step, "inductor")],
    ids=["training step", "evaluation by inductor", "operators by inductor"],
)
def test_one_compilation_serves_every_size(make, what, backend):
    model = make()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
    for index, size in enumerate(SIZES):
        maps = draw(size)
        with torch.compiler.set_stance("default" if index == 0 else "fail_on_recompile"):
            assert_same(what(compiled, model, maps), what(twin, twin, maps))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


class Refine(nn.Module):
    def __init__(self):
        super().__init__()
        self.apnb = build("APNB")[0]

    def forward(self, low, high):
        return (self.apnb(high),)


def test_a_training_step_by_inductor():
    model = Refine()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        maps = draw(SIZES[0])
        assert_same(step(compiled, model, maps), step(twin, twin, maps))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_graphs_of_inductor():
    """``mode="reduce-overhead"`` records graphs in the first calls and replays them with other data afterwards."""
    model = Blocks().float().cuda()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(5):
        maps = draw(SIZES[0], "cuda", torch.float32)
        torch.compiler.cudagraph_mark_step_begin()
        assert_same(step(compiled, model, maps), step(twin, twin, maps), tolerance=1e-3)
    assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


@pytest.mark.tool("torch.compile with compiled autograd", "works", "training and evaluation")
@pytest.mark.parametrize(
    ("kind", "training", "backend"),
    [
        ("APNB", False, "aot_eager"),
        ("APNB", True, "aot_eager_decomp_partition"),
    ],
)
def test_compiled_autograd(kind, training, backend):
    """The last backend is inductor but for the code it writes, which takes minutes to compile."""
    block = build(kind)[0].train(training)
    twin = copy.deepcopy(block)
    maps = draw(SIZES[0])[-len(MAPS[kind]) :]

    def run(model):
        inputs = [x.clone().requires_grad_() for x in maps]
        out = model(*inputs)
        (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        return {"out": out.detach(), **{f"input {i}": x.grad for i, x in enumerate(inputs)}}

    with torch._dynamo.config.patch(compiled_autograd=True):
        got = torch.compile(run, backend=backend)(block)
    expected = run(twin)
    for found, model in ((got, block), (expected, twin)):
        found |= {f"grad {name}": p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())
    assert_same(got, expected)
