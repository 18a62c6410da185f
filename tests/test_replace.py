"""replace_blocks and restore_blocks: what they change and what they leave as it was."""

import copy
import io
import pickle
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from pasted_blocks import BLOCKS, build, call
from replacement_rule import assert_round_trip, assert_same_state, train
from torch import nn

import annnet_kernels as ak
from annnet_kernels.reference import PlainAPNB
from annnet_kernels.runtime import backends


def loss_on(maps):
    return lambda model: call(model, maps).square().mean()


@pytest.mark.parametrize("kind", BLOCKS)
def test_training_through_replacement_equals_never_having_replaced(kind):
    model, maps = build(kind)
    assert_round_trip(model, loss_on(maps), ["0"])


@pytest.mark.parametrize("kind", BLOCKS)
def test_replacement_runs_the_fused_operators_and_restoring_does_not(kind, monkeypatch):
    model, maps = build(kind)
    ran = {}
    monkeypatch.setattr(backends, "_last_used", ran)
    ak.replace_blocks(model)
    ran.clear()  # of what the comparison ran
    call(model, maps)
    assert any(operator.startswith("asymmetric_attention") for operator in ran), ran
    ak.restore_blocks(model)
    ran.clear()
    call(model, maps)
    assert not ran


@pytest.mark.parametrize("kind", BLOCKS)
def test_nothing_visible_changes(kind):
    model, maps = build(kind)
    block, original = model[0], type(model[0])
    seen = []
    block.register_forward_hook(lambda *_: seen.append(1))
    parameters = {name: id(p) for name, p in model.named_parameters()}
    keys, modules = list(model.state_dict()), [id(m) for m in model.modules()]
    before = {name: b.clone() for name, b in model.named_buffers()}
    attributes = set(vars(block))
    ak.replace_blocks(model)
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert list(model.state_dict()) == keys
    assert [id(m) for m in model.modules()] == modules
    assert isinstance(model[0], original)
    call(model, maps)
    assert seen == [1]
    ak.fold_for_inference(model.eval())
    block.recompute = True
    ak.restore_blocks(model)
    assert type(model[0]) is original
    assert set(vars(block)) == attributes


def generator_states():
    numpy_state = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), [part.tolist() for part in numpy_state[1:2]]


@pytest.mark.parametrize("kind", ["MendelXu AFNB", "simple pyramid"])
def test_comparing_leaves_every_random_generator_and_mode_alone(kind, monkeypatch):
    model, _ = build(kind)
    original = type(model[0]).forward

    def drawing(self, *maps):
        out = original(self, *maps)
        return out + 0 * (torch.rand(1).item() + random.random() + np.random.rand())  # noqa: NPY002

    monkeypatch.setattr(type(model[0]), "forward", drawing)
    model.eval()
    states = generator_states()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        report = ak.replace_blocks(model)
    assert "compared" in report.replaced["0"], str(report)
    assert generator_states() == states
    assert not model.training


def through_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": lambda model: nn.Sequential(copy.copy(model[0])),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_save,
    "EMA": lambda model: torch.optim.swa_utils.AveragedModel(model).module,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("kind", BLOCKS)
def test_copies_stay_replaced_and_can_be_restored(kind, way):
    model, maps = build(kind)
    before = COPIES[way](model)
    ak.replace_blocks(model)
    model.eval(), before.eval()
    expected = call(before, maps)
    twin = COPIES[way](model)
    assert type(twin[0]) is type(model[0])
    torch.testing.assert_close(call(twin, maps), expected)
    ak.restore_blocks(twin)
    assert type(twin[0]) is type(before[0])
    torch.testing.assert_close(call(twin, maps), expected)
    assert "collapsed" in repr(model)


@pytest.mark.parametrize("kind", ["MendelXu AFNB", "simple pyramid"])
def test_compiled_before_or_after(kind):
    model, maps = build(kind)
    expected = call(model.eval(), maps)
    compiled = torch.compile(model[0], backend="eager", fullgraph=True)  # Dynamo decides which forward it is
    torch.testing.assert_close(compiled(*maps), expected)
    report = ak.replace_blocks(compiled)
    assert list(report.replaced) == ["_orig_mod"]
    ran = []
    with torch.profiler.profile() as profile:
        torch.testing.assert_close(compiled(*maps), expected)
    ran = [event.key for event in profile.key_averages() if "asymmetric_attention" in event.key]
    assert ran, "the compiled block still runs the published forward"
    ak.restore_blocks(compiled)
    torch.testing.assert_close(compiled(*maps), expected)


@pytest.mark.parametrize("kind", ["MendelXu AFNB", "MendelXu APNB"])
def test_wrapped_in_ddp_before_or_after(kind, tmp_path):
    model, maps = build(kind)
    untouched = copy.deepcopy(model)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(model[0])
        assert list(ak.replace_blocks(wrapped).replaced) == ["module"]
        optimizer = train(lambda m: m(*maps).square().mean(), wrapped, 2)
        wrapped = nn.parallel.DistributedDataParallel(model[0])
        train(lambda m: m(*maps).square().mean(), wrapped, 1, optimizer)
        ak.restore_blocks(wrapped)
        train(lambda m: m(*maps).square().mean(), wrapped, 1, optimizer)
    finally:
        dist.destroy_process_group()
    train(loss_on(maps), untouched, 4)
    assert_same_state(model, untouched)


def test_maps_may_be_given_by_name():
    model, (low, high) = build("MendelXu AFNB")
    model.eval()
    expected = call(model, (low, high))
    ak.replace_blocks(model)
    torch.testing.assert_close(model[0](high_feats=high, low_feats=low), expected)
    torch.testing.assert_close(model[0](low, high_feats=high), expected)
    with pytest.raises(TypeError, match="high_feats"):
        model[0](low)
    with pytest.raises(TypeError, match="mask"):
        model[0](low, high, mask=None)


def test_blocks_that_are_fused_already_are_named():
    model = nn.Sequential(ak.APNB(10, 10, 8, 5), PlainAPNB(10, 10, 8, 5))
    ak.replace_blocks(model)
    report = ak.replace_blocks(model)
    assert set(report.skipped) == {"0", "1"}
    assert "runs collapsed already" in str(report)
    ak.restore_blocks(model)
    assert type(model[0]) is ak.APNB


def test_a_model_without_blocks_says_so_and_a_non_module_is_an_error():
    assert "No asymmetric non-local blocks" in str(ak.replace_blocks(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match=r"model: expected an instance of torch\.nn\.Module, got int"):
        ak.replace_blocks(3)
    with pytest.raises(TypeError, match=r"model: .*got the class Linear"):
        ak.restore_blocks(nn.Linear)
    with pytest.raises(TypeError, match="verify: expected a bool"):
        ak.replace_blocks(nn.Linear(2, 2), verify="yes")


def test_a_block_wrapped_since_is_not_restored():
    """Its class would be lost, and what that class does with it."""
    model = torch.nn.Sequential(PlainAPNB(8, 8, 4, 4), PlainAPNB(8, 8, 4, 4))
    ak.replace_blocks(model)
    fused = type(model[1])
    model[1].__class__ = type("Wrapped", (fused,), {})
    with pytest.raises(ValueError, match="model: 1 was wrapped after it was replaced; unwrap it first"):
        ak.restore_blocks(model)
    assert type(model[0]) is fused
    model[1].__class__ = fused
    ak.restore_blocks(model)
    assert type(model[0]) is type(model[1]) is PlainAPNB
