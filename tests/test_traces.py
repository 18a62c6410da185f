"""torch.jit.trace and torch.fx.symbolic_trace of blocks: traces that compute the same at other sizes."""

import io
import warnings

import block_rule
import pytest
import torch
from checkpoint_states import net
from fused_pairs import OURS, twins
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import annnet_kernels as ak

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.torch.jit.* is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

SIZES = ((1, 7, 9), (3, 20, 21), (2, 3, 1))


@pytest.fixture(params=OURS)
def pair(request):
    fused, plain, kind = twins(request.param)
    return fused, plain, [shape[1] for shape in block_rule.MAPS[kind]]


def draw(channels, size):
    batch, height, width = size
    return tuple(torch.randn(batch, c, height + i, width, dtype=torch.float64) for i, c in enumerate(channels))


def step(module, maps):
    """Output, gradients of the maps and statistics of one call."""
    inputs = [x.clone().requires_grad_() for x in maps]
    out = module(*inputs)
    out.square().sum().backward()
    return {"out": out.detach(), **{f"input {i}": x.grad for i, x in enumerate(inputs)}, **dict(module.named_buffers())}


@pytest.mark.tool(
    "torch.jit.trace, save and load", "runs plain", "with one warning; other sizes, both modes, gradients"
)
@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_jit_trace(pair, training, gradients):
    fused, plain, channels = pair
    example = draw(channels, (2, 13, 11))
    fused.train(training), plain.train(training)
    with warnings.catch_warnings(record=True) as caught, torch.set_grad_enabled(gradients):
        warnings.simplefilter("always")
        traced = torch.jit.trace(fused, example, check_trace=not training)
    said = [str(w.message) for w in caught if "annnet_kernels" in str(w.message)]
    assert said == [f"annnet_kernels: {type(fused).__name__} runs its published forward, because of torch.jit.trace"]
    with torch.set_grad_enabled(gradients):
        expected = torch.jit.trace(plain, example, check_trace=not training)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    traced = torch.jit.load(file)
    for size in SIZES:
        maps = draw(channels, size)
        block_rule.assert_same(step(traced, maps), step(expected, maps))
        if not training:
            torch.testing.assert_close(traced(*maps), fused(*maps))


@pytest.mark.tool("torch.fx.symbolic_trace", "runs plain", "with a warning; other sizes, both modes, gradients")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_symbolic_trace(pair, training):
    fused, plain, channels = pair
    with pytest.warns(UserWarning, match=r"runs its published forward, because of torch\.fx\.symbolic_trace"):
        traced = torch.fx.symbolic_trace(nn.Sequential(fused) if len(channels) == 1 else fused)
    traced.train(training), plain.train(training)
    names = {name.removeprefix("0.") for name, _ in traced.named_modules()}
    assert {"stages.0.f_key.0", "stages.0.W", "conv_bn_dropout.0"} <= names
    for size in SIZES[:2]:
        maps = draw(channels, size)
        got, expected = step(traced, maps), step(plain, maps)
        block_rule.assert_same({name.removeprefix("0."): x for name, x in got.items()}, expected)


@pytest.mark.filterwarnings("ignore:annnet_kernels. A.NB runs its published forward:UserWarning")
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("trace", ["jit", "fx"])
def test_a_network_is_traced(trace, folded):
    model = net(aux=False).eval()
    if folded:
        ak.fold_for_inference(model)
    example = torch.randn(2, 3, 40, 48)
    traced = torch.jit.trace(model, (example,)) if trace == "jit" else torch.fx.symbolic_trace(model)
    for size in ((1, 3, 33, 41), (3, 3, 64, 40)):
        x = torch.randn(size)
        torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["AFNB", "APNB"])
def test_a_trace_with_symbolic_sizes(kind):
    """``make_fx`` gives sizes as symbols, which no cache takes for a key."""
    block = (ak.AFNB(6, 8, 8, 4, 4) if kind == "AFNB" else ak.APNB(8, 8, 4, 4)).double().eval()
    nn.init.normal_(block.stages[0].W.weight)
    maps = [torch.randn(2, channels, 9, 10, dtype=torch.float64) for channels in ((6, 8) if kind == "AFNB" else (8,))]
    state = {**dict(block.named_parameters()), **dict(block.named_buffers())}

    def call(state, *maps):
        return torch.func.functional_call(block, state, maps)

    with torch.no_grad():
        expected = block(*maps)
        traced = make_fx(call, tracing_mode="symbolic")(state, *maps)
        torch.testing.assert_close(traced(state, *maps), expected)
