"""Pasted blocks that nest convolution, norm and activation otherwise than published, or leave some of them out."""

import copy

import published
import pytest
import torch
from block_rule import assert_same, results
from checkpoint_states import randomised
from replacement_rule import randomise_output
from torch import nn

import annnet_kernels as ak

pytestmark = pytest.mark.usefixtures("one_thread")

LOW, HIGH, OUT, KEY, VALUE = 6, 10, 12, 8, 5
MAPS = {"AFNB": [(2, LOW, 9, 8), (2, HIGH, 11, 12)], "APNB": [(2, HIGH, 11, 12)]}


class ConvNormAct(nn.Module):
    """One class for all three, as many repositories have it."""

    def __init__(self, inputs, outputs, norm=nn.BatchNorm2d, act=nn.ReLU):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=norm is None)
        self.bn = None if norm is None else norm(outputs)
        self.act = None if act is None else act()

    def forward(self, x):
        x = self.conv(x)
        x = x if self.bn is None else self.bn(x)
        return x if self.act is None else self.act(x)


class ActNormConv(nn.Module):
    """Defines its modules in another order than it calls them in."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.act = nn.ReLU()
        self.bn = nn.BatchNorm2d(outputs)
        self.conv = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class Swish(nn.Module):
    """An activation of somebody else's."""

    def forward(self, x):
        return x * x.sigmoid()


class FunctionalAct(ConvNormAct):
    """Its activation is no module."""

    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, act=None)

    def forward(self, x):
        return super().forward(x).relu()


class FrozenNorm(nn.Module):
    """As torchvision and detectron2 freeze a batch norm: buffers only."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1.5), ("bias", 0.1), ("running_mean", 0.2), ("running_var", 2.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def conv(inputs, outputs, bias=True):
    return nn.Conv2d(inputs, outputs, 1, bias=bias)


def flat(*behind, bias=True):
    return lambda i, o: nn.Sequential(conv(i, o, bias), *(make(o) for make in behind))


def norm(channels):
    return nn.BatchNorm2d(channels)


def relu(channels):
    return nn.ReLU(inplace=True)


NESTINGS = {
    "flat": flat(norm, relu),
    "flat, no bias": flat(norm, relu, bias=False),
    "norm beside convolution": lambda i, o: nn.Sequential(nn.Sequential(conv(i, o), norm(o)), relu(o)),
    "deep": lambda i, o: nn.Sequential(
        nn.Sequential(nn.Sequential(conv(i, o)), nn.Sequential(nn.Sequential(norm(o)), relu(o)))
    ),
    "identities": lambda i, o: nn.Sequential(
        conv(i, o), nn.Identity(), nn.Sequential(norm(o), nn.Identity()), nn.Identity(), relu(o)
    ),
    "ReLU6": flat(norm, lambda o: nn.ReLU6()),
    "LeakyReLU in place": flat(norm, lambda o: nn.LeakyReLU(0.1, inplace=True)),
    "PReLU": flat(norm, lambda o: nn.PReLU()),
    "no activation": flat(norm),
    "no norm": flat(relu),
    "convolution alone": flat(),
    "GroupNorm": flat(lambda o: nn.GroupNorm(2, o), relu),
    "InstanceNorm": flat(lambda o: nn.InstanceNorm2d(o, affine=True, track_running_stats=True), relu),
    "frozen norm": flat(FrozenNorm, relu),
    "own activation": flat(norm, lambda o: Swish()),
    "one class": ConvNormAct,
    "one class, defined in another order": ActNormConv,
    "one class, no norm": lambda i, o: ConvNormAct(i, o, norm=None),
}


def build(kind, nesting):
    """A published block whose three convolutions with norms are nested otherwise."""
    pasted = (
        published.AFNB(LOW, HIGH, OUT, KEY, VALUE, 0.0)
        if kind == "AFNB"
        else published.APNB(HIGH, OUT, KEY, VALUE, 0.0)
    )
    stage = pasted.stages[0]
    stage.f_key = nesting(LOW if kind == "AFNB" else HIGH, KEY)
    stage.f_query = nesting(HIGH, KEY) if kind == "AFNB" else stage.f_key
    join = nesting(OUT + HIGH, OUT)
    pasted.conv_bn_dropout = nn.Sequential(*(join if type(join) is nn.Sequential else [join]), nn.Dropout2d(0.0))
    pasted.double()
    randomise_output(pasted)
    return pasted


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("kind", MAPS)
def test_any_nesting_is_replaced_trains_as_before_and_loads_its_checkpoints(kind, nesting, tmp_path):
    block = build(kind, NESTINGS[nesting])
    twin = copy.deepcopy(block)
    report = ak.replace_blocks(block)
    assert report.replaced == {"": f"{kind} (mendelxu, compared)"}, str(report)
    assert "collapsed" in repr(block)
    maps = [torch.randn(shape, dtype=torch.float64) for shape in MAPS[kind]]
    weights = torch.randn(2, OUT, *maps[-1].shape[2:], dtype=torch.float64)
    for training in (True, False):
        got, expected = (results(b.train(training), maps, weights) for b in (block, twin))
        assert_same(got, expected)
    torch.save(twin.state_dict(), tmp_path / "block.pth")
    for model in (block, build(kind, NESTINGS[nesting])):
        loaded = ak.load_checkpoint(randomised(model), tmp_path / "block.pth", strict=True)
        assert not loaded.unused
        assert_same(model.state_dict(), twin.state_dict(), tolerance=0)
    assert ak.restore_blocks(block).replaced
    assert_same(results(block, maps, weights), results(twin, maps, weights))


@pytest.mark.parametrize("kind", MAPS)
def test_a_flat_copys_checkpoint_loads_into_our_block_and_ours_into_the_copy(kind):
    ours = (ak.AFNB(LOW, HIGH, OUT, KEY, VALUE) if kind == "AFNB" else ak.APNB(HIGH, OUT, KEY, VALUE)).double().eval()
    theirs = build(kind, NESTINGS["flat"]).eval()
    if kind == "AFNB":  # has no ReLU at its end
        theirs.conv_bn_dropout = nn.Sequential(conv(OUT + HIGH, OUT), norm(OUT), nn.Dropout2d(0.0)).double().eval()
    maps = [torch.randn(shape, dtype=torch.float64) for shape in MAPS[kind]]
    for source, target in ((theirs, ours), (ours, theirs)):
        report = ak.load_checkpoint(target, randomised(source).state_dict(), strict=True)
        assert not report.unused
        torch.testing.assert_close(target(*maps), source(*maps))
    assert report.loaded["stages.0.f_key.1.running_mean"] == "stages.0.f_key.1.0.running_mean"


REFUSED = {
    "two convolutions": (
        flat(lambda o: conv(o, o), relu),
        "stages.0.f_key holds Conv2d, Conv2d, ReLU; expected a convolution",
    ),
    "dropout": (flat(norm, relu, lambda o: nn.Dropout2d(0.1)), "holds Conv2d, BatchNorm2d, ReLU, Dropout2d; expected"),
    "functional activation": (FunctionalAct, "computes something else: the output differs by"),
    "grouped": (lambda i, o: nn.Conv2d(i, o, 1, groups=2), "Conv2d is no plain 1 × 1 convolution"),
}


@pytest.mark.parametrize("nesting", REFUSED)
@pytest.mark.parametrize("kind", MAPS)
def test_what_computes_something_else_is_left_alone_with_what_differs(kind, nesting):
    make, reason = REFUSED[nesting]
    block = build(kind, make)
    report = ak.replace_blocks(block)
    assert not report.replaced
    assert reason in report.skipped[""], str(report)


def test_a_projection_that_is_wrapped_or_normalised_is_read_or_named():
    block = build("APNB", NESTINGS["flat"])
    block.stages[0].f_value = nn.Sequential(block.stages[0].f_value)
    assert ak.replace_blocks(copy.deepcopy(block)).replaced
    block.stages[0].W = nn.Sequential(block.stages[0].W, nn.BatchNorm2d(OUT)).double()
    expected = "stages.0.W holds Conv2d, BatchNorm2d; expected one convolution"
    assert expected in ak.replace_blocks(block).skipped[""]


def test_a_change_of_the_nesting_after_the_replacement_is_seen():
    block = build("APNB", NESTINGS["flat"])
    ak.replace_blocks(block)
    twin = ak_free(block)
    for changed in (block, twin):
        changed.stages[0].f_key[1] = nn.Sequential(nn.BatchNorm2d(KEY), nn.Hardtanh(0, 0.1)).double()
    x = torch.randn(MAPS["APNB"][0], dtype=torch.float64)
    torch.testing.assert_close(block(x), twin(x))


def ak_free(block):
    twin = copy.deepcopy(block)
    ak.restore_blocks(twin)
    return twin
