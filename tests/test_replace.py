"""replace_blocks and restore_blocks: what they change, what they leave alone, what they refuse."""

import copy
import pickle

import pytest
import torch
from published import AFNPBlock, APNBBlock, SharpenedAPNBBlock
from torch import nn

import annnet_kernels as ak
from annnet_kernels.reference import PlainAFNB, PlainAPNB

BLOCKS = {
    "plain AFNB": (lambda: PlainAFNB(6, 10, 12, 8, 5, dropout=0.0), [(2, 6, 9, 8), (2, 10, 11, 12)]),
    "plain APNB": (lambda: PlainAPNB(10, 10, 8, 5, dropout=0.0), [(2, 10, 11, 12)]),
    "simple fusion": (lambda: AFNPBlock(12, 8, 5), [(2, 6, 9, 8), (2, 12, 11, 12)]),
    "simple pyramid": (lambda: APNBBlock(10, 7, 8, 5, pool_sizes=(1, 4)), [(2, 10, 11, 12)]),
}


def build(kind):
    make, shapes = BLOCKS[kind]
    block = make().double()
    for name, parameter in block.named_parameters():
        if name.split(".")[-2] in ("W", "ConvOut", "Conv_Out"):
            nn.init.normal_(parameter)
    return nn.Sequential(block), [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def call(model, maps):
    return model[0](*maps)


def train(model, maps, steps, optimizer=None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        call(model, maps).square().mean().backward()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("kind", BLOCKS)
def test_training_through_replacement_equals_never_having_replaced(kind):
    model, maps = build(kind)
    untouched = copy.deepcopy(model)
    optimizer = train(model, maps, 2)
    report = ak.replace_blocks(model)
    assert list(report.replaced) == ["0"], str(report)
    train(model, maps, 2, optimizer)
    ak.restore_blocks(model)
    train(model, maps, 2, optimizer)
    train(untouched, maps, 6)
    for (name, got), want in zip(model.state_dict().items(), untouched.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", BLOCKS)
def test_replacement_runs_the_fused_operators_and_restoring_does_not(kind, monkeypatch):
    calls = []
    name = "asymmetric_attention_bn_relu"
    real = getattr(torch.ops.annnet, name)
    model, maps = build(kind)
    ak.replace_blocks(model)
    monkeypatch.setattr(torch.ops.annnet, name, lambda *a: calls.append(1) or real(*a))
    call(model, maps)
    assert calls == [1]
    ak.restore_blocks(model)
    call(model, maps)
    assert calls == [1]


@pytest.mark.parametrize("kind", BLOCKS)
def test_nothing_visible_changes(kind):
    model, maps = build(kind)
    block, original = model[0], type(model[0])
    seen = []
    block.register_forward_hook(lambda *_: seen.append(1))
    parameters = {name: id(p) for name, p in model.named_parameters()}
    keys, modules = list(model.state_dict()), [id(m) for m in model.modules()]
    before = {name: b.clone() for name, b in model.named_buffers()}
    state = torch.get_rng_state()
    ak.replace_blocks(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert list(model.state_dict()) == keys
    assert [id(m) for m in model.modules()] == modules
    assert isinstance(model[0], original)
    call(model, maps)
    assert seen == [1]
    ak.restore_blocks(model)
    assert type(model[0]) is original
    assert "annnet" not in repr(vars(model[0]))


@pytest.mark.parametrize("kind", BLOCKS)
def test_copies_and_pickles_stay_replaced(kind):
    model, maps = build(kind)
    ak.replace_blocks(model)
    model.eval()
    expected = call(model, maps)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(twin[0]) is type(model[0])
        torch.testing.assert_close(call(twin, maps), expected)
        ak.restore_blocks(twin)
        torch.testing.assert_close(call(twin, maps), expected)
    assert "collapsed" in repr(model)


def test_a_pasted_class_with_one_changed_operation_is_refused():
    model = nn.Sequential(SharpenedAPNBBlock(10, 7, 8, 5))
    report = ak.replace_blocks(model)
    assert not report.replaced
    assert "computes something else" in report.skipped["0"], str(report)
    assert type(model[0]) is SharpenedAPNBBlock
    assert ak.replace_blocks(model, verify=False).replaced


def test_a_block_with_a_hook_inside_is_left_alone_and_named():
    model = nn.Sequential(PlainAPNB(10, 10, 8, 5))
    model[0].stages[0].W.register_forward_hook(lambda *_: None)
    report = ak.replace_blocks(model)
    assert "Conv2d carries forward hooks" in report.skipped["0"]
    assert "skipped 0" in str(report)


def test_an_odd_structure_is_left_alone_and_named():
    block = APNBBlock(10, 7, 8, 5)
    block.Conv_Key = block.Conv_Query = nn.Sequential(nn.Conv2d(10, 8, 1), nn.ReLU())
    assert "not built as expected" in ak.replace_blocks(block).skipped[""]


def test_a_model_without_blocks_says_so_and_a_non_module_is_an_error():
    assert "No asymmetric non-local blocks" in str(ak.replace_blocks(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match=r"model: expected an instance of torch\.nn\.Module, got int"):
        ak.replace_blocks(3)
    with pytest.raises(TypeError, match=r"model: .*got the class Linear"):
        ak.restore_blocks(nn.Linear)
    with pytest.raises(TypeError, match="verify: expected a bool"):
        ak.replace_blocks(nn.Linear(2, 2), verify="yes")
