"""Blocks as programs: they compute what the ordinary forward computes, and step aside for whoever looks on.

Programs are for devices on which work is launched. Here they run on a CPU that says so, served by its own kernels.
"""

from __future__ import annotations

import logging
import weakref

import fresh
import pytest
import torch
from block_rule import MAPS, build
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from annnet_kernels.blocks import program_text, programs
from annnet_kernels.ops import registration

LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(autouse=True)
def launching(monkeypatch):
    """Work on a CPU counts as launched, for a matrix of pixels too."""
    monkeypatch.setattr(registration, "launches", lambda _: True)
    monkeypatch.setattr(programs, "_programs", {})


def known():
    """Programs that were recorded, not those that could not be."""
    return [program for program in programs._programs.values() if program is not None]


def draw(kind, dtype=torch.float64, layout="nchw"):
    maps = [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in MAPS[kind]]
    return [x.contiguous(memory_format=LAYOUTS[layout]).requires_grad_() for x in maps]


def three_steps(block, maps, autocast=None):
    """Outputs, gradients and buffers of three training steps, each with a seed of its own, and of an evaluation."""
    found = []
    for seed in range(3):
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
            out = block(*maps)
        upstream = torch.randn_like(out)
        found += [out.detach(), *torch.autograd.grad(out, [*maps, *block.parameters()], upstream)]
        found += [buffer.clone() for buffer in block.buffers()]
    with torch.no_grad():
        found.append(block.eval()(*maps))
    return found


def ordinary(monkeypatch, run):
    with monkeypatch.context() as patch:
        patch.setattr(programs, "run", lambda *_: None)
        return run()


@pytest.mark.parametrize("bottleneck", [True, False], ids=["bottleneck", "context"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("precision", ["float64", "float32", "autocast"])
@pytest.mark.parametrize("kind", MAPS)
def test_it_computes_what_the_ordinary_forward_computes(kind, precision, layout, bottleneck, monkeypatch):
    """Bit for bit: the same calls in the same order, the same draws of the dropout, the same running statistics."""
    dtype = torch.float64 if precision == "float64" else torch.float32
    autocast = True if precision == "autocast" else None
    block = build(kind, dropout=0.3, bottleneck=bottleneck)[0].to(dtype)
    state = {name: x.clone() for name, x in block.state_dict().items()}
    maps = draw(kind, dtype, layout)
    expected = ordinary(monkeypatch, lambda: three_steps(block.train(), maps, autocast))
    block.load_state_dict(state)
    found = three_steps(block.train(), maps, autocast)
    assert len(known()) == len(programs._programs) == 2  # of the training steps and of the evaluation
    for mine, other in zip(found, expected, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    "change",
    [
        lambda block, maps: block.conv_bn_dropout[1].eval(),
        lambda block, maps: setattr(block.stages[0].f_query[1][0], "momentum", 0.3),
        lambda block, maps: block.stages[0].W.weight.requires_grad_(False),
        lambda block, maps: maps[0].requires_grad_(False),
        lambda block, maps: setattr(block.stages[0].f_value, "bias", None),
        lambda block, maps: block.conv_bn_dropout[-1].eval(),
    ],
    ids=["norm", "momentum", "weight", "map", "bias", "dropout"],
)
def test_what_changes_is_recorded_anew(change, monkeypatch):
    block, maps = build("AFNB", dropout=0.5)[0], draw("AFNB")

    def step():
        torch.manual_seed(0)
        out = block(*maps)
        wanted = [x for x in (*maps, *block.parameters()) if x.requires_grad]
        return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted), *(x.clone() for x in block.buffers())]

    step()
    change(block, maps)
    state = {name: x.clone() for name, x in block.state_dict().items()}
    expected = ordinary(monkeypatch, step)
    block.load_state_dict(state)
    found = step()
    assert len(known()) == 2
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)


def test_a_gradient_that_lies_otherwise(monkeypatch):
    """Expanded, as the gradient of a sum is."""
    block, maps = build("APNB")[0].eval(), draw("APNB")
    for loss in (torch.sum, lambda out: (out.transpose(2, 3) * 2).contiguous().sum()):
        found = torch.autograd.grad(loss(block(*maps)), maps)
        expected = ordinary(monkeypatch, lambda loss=loss: torch.autograd.grad(loss(block(*maps)), maps))
        torch.testing.assert_close(found, expected)


def test_the_gradient_that_a_program_gets_lies_as_the_recorded_one():
    """Its launches know strides and alignment."""
    block, maps = build("APNB")[0].eval(), draw("APNB")
    torch.autograd.grad(block(*maps).sum(), maps)
    (program,) = known()
    strides, run = [], program._backward
    program._backward = lambda *tensors: strides.append(tensors[-1].stride()) or run(*tensors)
    torch.autograd.grad(block(*maps).sum(), maps)
    assert strides == [block(*maps).stride()]


def test_autocast_does_not_reach_into_a_program():
    """Its casts are calls of their own."""
    block, maps = build("APNB")[0].float().eval(), draw("APNB", torch.float32)
    seen = []
    for records in (True, False):
        with torch.set_grad_enabled(records), torch.autocast("cpu", torch.bfloat16):
            block(*maps)
            program, run = known()[-1], known()[-1].forward
            program.forward = lambda *x, run=run: seen.append(torch.is_autocast_enabled("cpu")) or run(*x)
            block(*maps)
            assert torch.is_autocast_enabled("cpu")
    assert seen == [False, False]


def test_which_tensor_is_missing_tells_programs_apart(monkeypatch):
    """A convolution without bias ahead of a norm, or one with a bias ahead of a norm without weight."""
    maps = [x.detach() for x in draw("APNB")]
    for missing in ("conv", "norm"):
        block = build("APNB")[0].eval()
        query = block.stages[0].f_query
        if missing == "conv":
            query[0].bias = None
        else:
            query[1][0].weight = None
        with torch.no_grad():
            expected = ordinary(monkeypatch, lambda block=block: block(*maps))
            torch.testing.assert_close(block(*maps), expected)
    assert len(known()) == 2


def test_what_no_line_reads_any_more_is_freed():
    made = []

    def make(x):
        y = x + 1
        made.append(weakref.ref(y))
        return y

    def look(x):
        assert made[0]() is None
        return x * 2

    lines = [
        program_text._Line(make, "t0", [], ["t0"], ["t1"], True),
        program_text._Line(make, "t1", [], ["t1"], ["t2"], True),
        program_text._Line(look, "t2", [], ["t2"], ["t3"], True),
    ]
    program = program_text._function(["t0"], lines, "t3", {"t0", "t3"})
    assert program(torch.zeros(3)).tolist() == [4.0] * 3


def test_a_result_that_lies_otherwise_than_recorded_is_copied(caplog):
    """As where a library chooses another layout on the device than for the stand-ins."""
    calls = []

    def transposed(x):
        calls.append(x)
        return (x + 1).t().contiguous().t()

    lines = [
        program_text._Line(transposed, "t0", [], ["t0"], ["t1"], True, [(3, 1)]),
        program_text._Line(lambda x: (x * 2, None), "t1", [], ["t1"], ["t2", "_"], False, [(3, 1), None]),
    ]
    program = program_text._function(["t0"], lines, "t1, t2", {"t0", "t1", "t2"})
    x = torch.arange(6.0).view(2, 3)
    with caplog.at_level(logging.DEBUG, logger="annnet_kernels"):
        for _ in range(3):
            first, second = program(x)
            assert torch.equal(first, x + 1)
            assert torch.equal(second, 2 * x + 2)
            assert first.stride() == second.stride() == (3, 1)
    assert len(calls) == 3
    assert len([record for record in caplog.records if "copied into the layout" in record.message]) == 1


def test_the_graph_behaves_as_autograds_own():
    block, maps = build("APNB")[0].eval(), draw("APNB")
    out = block(*maps)
    first = torch.autograd.grad(out.sum(), maps, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), maps), first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(out.sum(), maps)
    (gradient,) = torch.autograd.grad(block(*maps).square().sum(), maps, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
    out = block(*maps)
    with torch.no_grad():
        block.stages[0].f_query[0].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, monkeypatch):
    block, maps = build("AFNB")[0], draw("AFNB")
    expected = ordinary(monkeypatch, lambda: torch.autograd.grad(block(*maps).square().sum(), maps))
    out = checkpoint(block, *maps, use_reentrant=reentrant)  # records inside: hooks of its own see no stand-ins
    for x in maps:
        x.grad = None
    out.square().sum().backward()
    torch.testing.assert_close([x.grad for x in maps], list(expected))


class Listener(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_whoever_looks_on_gets_the_ordinary_forward():
    block, maps = build("APNB")[0].eval(), draw("APNB")
    with Listener():
        block(*maps)
    with torch.autograd.profiler.profile():
        block(*maps)
    torch.func.vjp(block, *maps)
    assert not programs._programs
    block(*maps)
    assert len(known()) == 1


@pytest.mark.parametrize("reason", ["parametrized", "tied", "recomputed"])
def test_other_blocks_run_the_ordinary_forward(reason):
    block, maps = build("APNB")[0].eval(), draw("APNB")
    if reason == "parametrized":
        torch.nn.utils.parametrizations.weight_norm(block.stages[0].f_value)
    elif reason == "tied":
        block.stages[0].f_value.bias = block.stages[0].f_query[0].bias = torch.nn.Parameter(torch.zeros(10).double())
        block.stages[0].f_value.weight = torch.nn.Parameter(torch.randn(10, 20, 1, 1).double())
        block.stages[0].f_value.out_channels = block.stages[0].value_channels = 10
        block.stages[0].W = torch.nn.Conv2d(10, block.stages[0].W.out_channels, 1).double()
    else:
        block.recompute = True
    block(*maps).sum().backward()
    assert not known()


def test_a_recording_that_fails_is_told_and_costs_nothing_else(monkeypatch, caplog):
    block, maps = build("APNB")[0].eval(), draw("APNB")
    expected = ordinary(monkeypatch, lambda: block(*maps))

    def fail(*_):
        raise NotImplementedError("no such call")

    monkeypatch.setattr(programs, "Program", fail)
    with caplog.at_level(logging.DEBUG, logger="annnet_kernels"):
        found = [block(*maps) for _ in range(2)]
    assert [record.message for record in caplog.records if "no such call" in record.message] != []
    assert len([record for record in caplog.records if "no such call" in record.message]) == 1
    for out in found:
        torch.testing.assert_close(out, expected)


def test_they_can_be_turned_off():
    code = """
import torch, annnet_kernels as ak
from annnet_kernels.blocks import programs
from annnet_kernels.ops import registration
registration.launches = lambda _: True
ak.APNB(8, 8, 4, 4)(torch.randn(1, 8, 5, 5))
print(len(programs._programs))
"""
    assert [fresh.python(code, ANNNET_PROGRAMS=value).stdout.strip() for value in ("0", "1")] == ["0", "1"]


def test_programs_are_bounded(monkeypatch):
    monkeypatch.setattr(programs, "MOST_PROGRAMS", 3)
    block = build("APNB")[0].eval()
    with torch.no_grad():
        for height in range(2, 9):
            block(torch.randn(1, 20, height, 5, dtype=torch.float64))
    assert len(programs._programs) == 3


def bytes_kept(block, maps):
    """Of all memory that autograd keeps for the backward pass of one call."""
    kept = {}

    def pack(x):
        assert type(x) is not FakeTensor
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = block(*maps)
    assert out.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", MAPS)
def test_it_keeps_no_more_than_the_ordinary_forward(kind, monkeypatch):
    block, maps = build(kind, dropout=0.5)[0], draw(kind)
    expected = ordinary(monkeypatch, lambda: bytes_kept(block, maps))
    assert bytes_kept(block, maps) <= expected
    assert len(known()) == 1
