"""fold_for_inference: exact, borders included; undone by any change; never used where gradients are wanted."""

import copy
import pickle
from itertools import product

import pytest
import torch
from block_rule import CLASSES, build, draw_maps, randomise
from test_model import tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import annnet_kernels as ak
from annnet_kernels.blocks import folding
from annnet_kernels.reference import PlainAFNB


def model():
    """A small ANNNet in float64 evaluation mode with nothing left at zero or one, and a picture."""
    net = tiny(aux=False).double()
    for block in (net.fusion, net.context[2]):
        randomise(block)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return net.eval(), torch.randn(2, 3, 65, 49, dtype=torch.float64)


def runs_folded(module, monkeypatch, *maps):
    """Whether a call without gradients uses a fold."""
    used = []
    for name in ("block_forward", "merged_forward"):
        real = getattr(folding, name)
        monkeypatch.setattr(folding, name, lambda *a, real=real, name=name: used.append(name) or real(*a))
    with torch.no_grad():
        module(*maps)
    monkeypatch.undo()
    return used


@pytest.mark.parametrize("options", [{}, {"bottleneck": False}, {"psp_size": (2, (3, 5))}])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_folded_block_equals_the_unfolded(kind, options, monkeypatch):
    fused, _ = build(kind, **options)
    fused.eval()
    maps = draw_maps(kind)
    expected = fused(*maps).detach()
    report = ak.fold_for_inference(fused)
    assert str(report) == "folded (the model): alone"
    assert runs_folded(fused, monkeypatch, *maps) == ["block_forward"]
    with torch.inference_mode():
        torch.testing.assert_close(fused(*maps), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_folded_model_merges_the_convolution_exactly_borders_included(layout, monkeypatch):
    net, x = model()
    net = net.to(memory_format=layout)
    expected = net(x).detach()
    state = copy.deepcopy(net.state_dict())
    report = ak.fold_for_inference(net)
    assert report.folded == {"fusion": "merged with the convolution behind it", "context.2": "alone"}
    assert runs_folded(net, monkeypatch, x) == ["merged_forward", "block_forward"]
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected, rtol=1e-10, atol=1e-11)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def optimizer_step(net):
    with torch.no_grad():
        net.context[0].weight.mul_(1.5)


def load(net):
    net.load_state_dict({key: value * 1.25 if "W.weight" in key else value for key, value in net.state_dict().items()})


def train_and_back(net):
    net.train().eval()


def assign(net):
    net.load_state_dict({key: value * 1.25 for key, value in net.state_dict().items()}, assign=True)


def other_parameter(net):
    net.fusion.stages[0].W.weight = nn.Parameter(torch.randn_like(net.fusion.stages[0].W.weight))


def other_convolution(net):
    net.context[0] = nn.Conv2d(*net.context[0].weight.shape[1::-1], 3, padding=1).double()


def other_eps(net):
    net.fusion.conv_bn_dropout[1].eps = 0.3


def norm_in_training_mode(net):
    net.fusion.conv_bn_dropout[1].train()


@pytest.mark.parametrize(
    "change",
    [
        optimizer_step,
        load,
        train_and_back,
        assign,
        other_parameter,
        other_convolution,
        other_eps,
        norm_in_training_mode,
    ],
)
def test_a_change_undoes_the_fold(change, monkeypatch):
    net, x = model()
    ak.fold_for_inference(net)
    change(net)
    assert "merged_forward" not in runs_folded(net, monkeypatch, x)
    expected = copy.deepcopy(net)(x)
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected)


class Doubling(ak.AFNB):
    def forward(self, low, high):
        return 2 * super().forward(low, high)


class DoublingSequential(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def subclass_the_block(net):
    net.fusion.__class__ = Doubling


def subclass_the_container(net):
    net.context.__class__ = DoublingSequential


def double(module):
    own = module.forward
    module.forward = lambda *maps: 2 * own(*maps)


def double_the_block(net):
    double(net.fusion)


def double_the_convolution(net):
    double(net.context[0])


def double_the_container(net):
    double(net.context)


@pytest.mark.parametrize(
    ("change", "folded_before"),
    [
        (subclass_the_block, False),
        (subclass_the_container, False),
        *product((double_the_block, double_the_convolution, double_the_container), (False, True)),
    ],
)
def test_a_forward_that_is_not_the_published_one_is_called(change, folded_before):
    net, x = model()
    twin = copy.deepcopy(net)
    change(twin)
    expected = twin(x).detach()
    for act in (ak.fold_for_inference, change) if folded_before else (change, ak.fold_for_inference):
        act(net)
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected)


class Copies(TorchDispatchMode):
    """How many tensors are copied to another dtype or device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._to_copy.default
        return func(*args, **(kwargs or {}))


def test_a_merge_makes_what_it_needs_where_it_needs_it():
    """On a GPU a copy from the CPU would wait for it, and no graph could be captured."""
    net, x = model()
    ak.fold_for_inference(net)
    with torch.no_grad(), Copies() as copies:
        net(x)
    assert copies.count == 0


def test_more_modules_behind_the_convolution_are_called(monkeypatch):
    net, x = model()
    net.context.append(nn.Tanh())
    expected = net(x).detach()
    ak.fold_for_inference(net)
    assert "merged_forward" in runs_folded(net, monkeypatch, x)
    with torch.no_grad():
        torch.testing.assert_close(net(x), expected)


def test_a_merged_block_still_returns_its_own_output():
    net, x = model()
    with torch.no_grad():
        low, high = net.backbone(x)
        expected = net.fusion(low, high)
        ak.fold_for_inference(net)
        torch.testing.assert_close(net.fusion(low, high), expected)


def test_parameters_handed_to_one_call_are_used():
    block, _ = build("AFNB")
    twin = copy.deepcopy(block)
    randomise(twin)
    maps = draw_maps("AFNB")
    ak.fold_for_inference(block.eval())
    with torch.no_grad():
        found = torch.func.functional_call(block, twin.state_dict(), tuple(maps))
        torch.testing.assert_close(found, twin.eval()(*maps))


def test_a_model_made_of_inference_tensors_folds():
    with torch.inference_mode():
        block = ak.APNB(4, 4, 4, 4).eval()
        x = torch.randn(1, 4, 5, 5)
        expected = block(x)
        ak.fold_for_inference(block)
        torch.testing.assert_close(block(x), expected)


def test_gradients_and_compiled_code_do_not_use_a_fold(monkeypatch):
    net, x = model()
    ak.fold_for_inference(net)
    net(x).sum().backward()
    assert net.fusion.stages[0].f_value.weight.grad.abs().sum() > 0
    torch._dynamo.reset()
    compiled = torch.compile(net.context[2], fullgraph=True, backend="eager")
    assert runs_folded(compiled, monkeypatch, torch.randn(2, 16, 5, 6, dtype=torch.float64)) == []


def test_a_watched_block_still_returns_its_own_output():
    net, x = model()
    seen = []
    net.fusion.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        expected = net(x)
        ak.fold_for_inference(net)
        torch.testing.assert_close(net(x), expected)
    torch.testing.assert_close(*seen)


def test_copies_are_not_folded_and_work(monkeypatch):
    net, x = model()
    ak.fold_for_inference(net)
    with torch.no_grad():
        expected = net(x)
        for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            assert runs_folded(twin, monkeypatch, x) == []
            torch.testing.assert_close(twin(x), expected)
            ak.fold_for_inference(twin)
            assert "merged_forward" in runs_folded(twin, monkeypatch, x)
    assert "merged_forward" in runs_folded(net, monkeypatch, x)


def test_replaced_blocks_fold_and_restoring_unfolds(monkeypatch):
    block = PlainAFNB(5, 6, 7, 4, 3).double()
    randomise(block)
    block.eval()
    maps = torch.randn(2, 5, 8, 7, dtype=torch.float64), torch.randn(2, 6, 6, 5, dtype=torch.float64)
    expected = block(*maps).detach()
    ak.replace_blocks(block)
    ak.fold_for_inference(block)
    assert "collapsed, folded" in repr(block)
    assert runs_folded(block, monkeypatch, *maps) == ["block_forward"]
    with torch.no_grad():
        torch.testing.assert_close(block(*maps), expected)
    ak.restore_blocks(block)
    assert type(block) is PlainAFNB
    assert "_fold" not in vars(block)


def test_an_active_dropout_is_not_folded_away():
    block = ak.AFNB(4, 4, 4, 4, 4, dropout=0.5).eval()
    block.conv_bn_dropout[-1].train()
    assert "Dropout2d is in training mode" in str(ak.fold_for_inference(block))


def test_what_cannot_be_folded_is_named():
    assert str(ak.fold_for_inference(nn.Linear(2, 2).eval())) == "No asymmetric non-local blocks found."
    report = ak.fold_for_inference(ak.APNB(4, 4, 4, 4, norm_layer=lambda channels: nn.GroupNorm(2, channels)).eval())
    assert report.skipped == {"": "GroupNorm is no batch norm"}
    with pytest.raises(ValueError, match="model: expected evaluation mode, got 1 in training mode"):
        ak.fold_for_inference(nn.Sequential(nn.ReLU(), ak.APNB(4, 4, 4, 4)))
    with pytest.raises(TypeError, match="model: expected an instance of torch"):
        ak.fold_for_inference("model")
