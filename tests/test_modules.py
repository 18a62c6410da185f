"""What people do with a module, done to the blocks: our own, and those of an existing model after replacement."""

import copy
import io
import pickle

import pytest
import torch
from block_rule import CLASSES, HIGH, KEY, MAPS, OUT, VALUE, assert_same, build, draw_maps, output_weights, results
from torch import nn

import annnet_kernels as ak
from annnet_kernels.reference import PlainAPNB
from annnet_kernels.reference.blocks import AttentionStage

pytestmark = pytest.mark.usefixtures("one_thread")

OURS = {f"{kind}, {way}": (kind, way) for kind in CLASSES for way in ("own", "replaced")}


@pytest.fixture(params=OURS)
def pair(request):
    """A fused block, its plain twin with the same parameters, both in float64, and the kind of both."""
    kind, way = OURS[request.param]
    fused, plain = build(kind)
    if way == "replaced":
        fused = copy.deepcopy(plain)
        assert ak.replace_blocks(fused).replaced
    assert "collapsed" in repr(fused)
    return fused, plain, kind


def assert_equal_steps(fused, plain, kind):
    """Output, gradients and buffers of one call, in float64."""
    maps, weights = draw_maps(kind), output_weights(kind)
    assert_same(results(fused, maps, weights), results(plain, maps, weights))


# ------------------------------------------------------------------------------------------------------------- copies


def through_save(block):
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda block: pickle.loads(pickle.dumps(block)), "save": through_save}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_a_block_of_its_own(pair, way):
    fused, plain, kind = pair
    twin = COPIES[way](fused)
    assert type(twin) is type(fused)
    assert "collapsed" in repr(twin)
    before = {name: value.clone() for name, value in fused.state_dict().items()}
    assert_equal_steps(twin, plain, kind)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
    assert_same(fused.state_dict(), before, tolerance=0)


def test_an_apnb_keeps_one_projection_in_its_copies():
    block = build("APNB")[0]
    for make in COPIES.values():
        twin = make(block)
        assert twin.stages[0].f_query is twin.stages[0].f_key


# --------------------------------------------------------------------------------------------- state and its transport


def test_the_state_dict_makes_the_round_trip_strictly(pair):
    fused, plain, kind = pair
    assert list(fused.state_dict()) == list(plain.state_dict())
    file = io.BytesIO()
    torch.save(fused.state_dict(), file)
    file.seek(0)
    others = build(kind)
    for other in others:
        matched = other.load_state_dict(torch.load(file), strict=True)
        assert not matched.missing_keys
        assert not matched.unexpected_keys
        file.seek(0)
    assert_equal_steps(*others, kind)
    assert_equal_steps(fused, plain, kind)


def test_a_state_dict_that_does_not_fit_is_refused(pair):
    fused, _, _ = pair
    state = fused.state_dict()
    renamed = {name.replace("f_value", "value"): value for name, value in state.items()}
    with pytest.raises(RuntimeError, match=r"Missing key.*f_value.weight[\s\S]*Unexpected key.*stages.0.value"):
        fused.load_state_dict(renamed)
    with pytest.raises(RuntimeError, match=r"size mismatch for stages\.0\.W\.weight"):
        fused.load_state_dict(state | {"stages.0.W.weight": torch.ones(2, 2, 1, 1)})


def test_assigned_parameters_are_the_ones_that_run(pair):
    fused, plain, kind = pair
    state = {name: value.clone() for name, value in build(kind)[1].state_dict().items()}
    for block in (fused, plain):
        block.load_state_dict({name: value.clone() for name, value in state.items()}, assign=True)
    assert_equal_steps(fused, plain, kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_dtype_moves(pair, dtype):
    fused, plain, kind = pair
    maps = draw_maps(kind)
    expected = plain.eval()(*maps)
    out = fused.eval().to(dtype)(*(x.to(dtype) for x in maps))
    assert out.dtype == dtype
    assert "collapsed" in repr(fused)
    difference = (out.double() - expected).norm() / expected.norm()
    assert difference < 20 * torch.finfo(dtype).eps
    fused.double()
    assert fused(*maps).dtype == torch.float64


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_shapes_follow_without_data(pair, training):
    """On the meta device, for which PyTorch has no autocast to ask about."""
    fused, plain, kind = pair
    shapes = []
    for block in (fused, plain):
        block.to("meta").train(training)
        shapes.append(block(*(x.to("meta") for x in draw_maps(kind))).shape)
    assert shapes[0] == shapes[1]


def test_a_block_made_without_memory_is_filled_later(pair):
    fused, plain, kind = pair
    state = plain.state_dict()
    fused.to("meta").to_empty(device="cpu").load_state_dict(state)
    assert_equal_steps(fused, plain, kind)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_device_moves_and_comes_back(pair):
    fused, plain, kind = pair
    maps, weights = draw_maps(kind), output_weights(kind)
    expected = results(plain, maps, weights)
    got = results(fused.cuda(), [x.cuda() for x in maps], weights.cuda())
    assert all(value.is_cuda for value in got.values())
    assert_same({name: value.cpu() for name, value in got.items()}, expected)
    assert_equal_steps(fused.cpu(), plain, kind)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_the_memory_format_is_kept(pair, layout):
    fused, plain, kind = pair
    maps, weights = draw_maps(kind, layout), output_weights(kind, layout)
    got = results(fused.to(memory_format=layout), maps, weights)
    for name in ("out", *(name for name in got if name.startswith("grad input"))):
        assert got[name].is_contiguous(memory_format=layout), name
    assert_same(got, results(plain, maps, weights))


# ----------------------------------------------------------------------------------------- what is and is not learnt


def test_a_frozen_block_passes_gradients_on_and_takes_none(pair):
    fused, plain, kind = pair
    for block in (fused, plain):
        assert block.requires_grad_(False) is block
    maps, weights = draw_maps(kind), output_weights(kind)
    got = results(fused, maps, weights)
    assert all(parameter.grad is None for parameter in fused.parameters())
    assert_same(got, results(plain, maps, weights))
    for block in (fused, plain):
        assert not block(*maps).requires_grad
        block.requires_grad_(True)
    assert_equal_steps(fused, plain, kind)


def test_parameters_keep_their_order(pair):
    fused, plain, kind = pair
    expected = [name for name, _ in plain.named_parameters()]
    identities = [id(parameter) for parameter in fused.parameters()]
    assert [name for name, _ in fused.named_parameters()] == expected
    assert_equal_steps(fused, plain, kind)
    assert [id(parameter) for parameter in fused.parameters()] == identities
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fused.eval().train().float()):
        assert [name for name, _ in twin.named_parameters()] == expected
    ak.restore_blocks(fused)
    assert [name for name, _ in fused.named_parameters()] == expected


def new_weight_norm(block):
    nn.utils.parametrizations.weight_norm(block.stages[0].W)
    nn.utils.parametrizations.weight_norm(block.conv_bn_dropout[0])


def spectral_norm(block):
    torch.manual_seed(7)  # of the vectors that its power iteration starts from
    nn.utils.parametrizations.spectral_norm(block.stages[0].f_value)
    nn.utils.parametrizations.spectral_norm(block.stages[0].f_key[0])


@pytest.mark.parametrize("change", [new_weight_norm, spectral_norm])
def test_parametrizations_are_honoured(pair, change):
    """Their own parameters get their gradients, and their buffers move as often as in the plain block."""
    fused, plain, kind = pair
    if kind == "APNB" and change is spectral_norm:
        pytest.skip("the plain APNB projects twice and so iterates twice")
    for block in (fused, plain):
        change(block)
    assert "collapsed" in repr(fused)
    assert any("parametrizations" in name for name, _ in fused.named_parameters())
    for _ in range(2):
        assert_equal_steps(fused, plain, kind)


class Counted(nn.Module):
    calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight * 2


@pytest.mark.parametrize("name", ["f_value", "W"])
def test_a_parametrization_runs_once_a_forward(pair, name):
    block, _, kind = pair
    counted = Counted()
    nn.utils.parametrize.register_parametrization(getattr(block.stages[0], name), "weight", counted)
    counted.calls = 0
    block(*draw_maps(kind))
    assert counted.calls == 1


# --------------------------------------------------------------------------------- hooks, and modules not called


def test_hooks_of_the_block_see_and_change_what_passes(pair):
    fused, plain, kind = pair
    seen = []
    for block in (fused, plain):
        block.register_forward_pre_hook(lambda module, args: tuple(2 * x for x in args))
        block.register_forward_hook(lambda module, args, kwargs, out: out + args[-1].mean(), with_kwargs=True)
        block.register_full_backward_pre_hook(lambda module, grads: (3 * grads[0],))
        block.register_full_backward_hook(lambda module, grads, out_grads: seen.append((*grads, *out_grads)))
    assert "collapsed" in repr(fused)
    assert_equal_steps(fused, plain, kind)
    ours, published = seen
    torch.testing.assert_close(ours, published)
    assert len(ours) == len(MAPS[kind]) + 1


def hook(block):
    block.stages[0].f_value.register_forward_hook(lambda module, args, out: out * 2)


def pre_hook(block):
    block.stages[0].f_key.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def backward_hook(block):
    block.stages[0].W.register_full_backward_hook(lambda module, grads, out_grads: (grads[0] * 2,))


def backward_pre_hook(block):
    block.conv_bn_dropout[0].register_full_backward_pre_hook(lambda module, grads: (grads[0] * 2,))


def old_weight_norm(block):
    nn.utils.weight_norm(block.stages[0].W)


def old_spectral_norm(block):
    torch.manual_seed(7)
    nn.utils.spectral_norm(block.stages[0].W)


def other_class(block):
    block.stages[0].f_value = nn.Sequential(nn.Conv2d(*block.stages[0].f_value.weight.shape[1::-1], 1), nn.Tanh())


def other_forward(block):
    block.stages[0].W.forward = lambda x: x.mean(1, keepdim=True).expand(-1, OUT, -1, -1)


class Residual(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + x[:, :OUT]


class DoubledStage(AttentionStage):
    def forward(self, low, high):
        return 2 * super().forward(low, high)


def other_container(block):
    block.conv_bn_dropout = Residual(*block.conv_bn_dropout.children())


def other_stage(block):
    block.stages[0].__class__ = DoubledStage


def longer_projection(block):
    block.stages[0].f_query.append(nn.Hardtanh(0, 0.1))


def longer_norm(block):
    block.stages[0].f_query[1].append(nn.Hardtanh(0, 0.1))


CHANGES = {
    hook: "Conv2d carries forward hooks",
    pre_hook: "Sequential carries forward pre hooks",
    backward_hook: "Conv2d carries backward hooks",
    backward_pre_hook: "Conv2d carries backward pre hooks",
    old_weight_norm: "Conv2d carries forward pre hooks",
    old_spectral_norm: "Conv2d carries forward pre hooks",
    other_class: "Sequential in the place of Conv2d",
    other_forward: "Conv2d with a forward of its own",
    other_container: "Residual in the place of",
    other_stage: "DoubledStage in the place of",
    longer_projection: "Hardtanh in a Sequential",
    longer_norm: "Hardtanh in a Sequential",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_changed_inner_module_is_called_and_named(pair, change):
    fused, plain, kind = pair
    for block in (fused, plain):
        torch.manual_seed(1)
        change(block)
        block.double()
    assert f"published forward, because of {CHANGES[change]}" in repr(fused)
    maps, weights = draw_maps(kind), output_weights(kind)
    got, expected = (results(block, maps, weights) for block in (fused, plain))
    assert_same(got, expected, tolerance=0)


def test_the_collapse_returns_with_the_last_hook(pair):
    fused, _, _ = pair
    handle = fused.stages[0].W.register_forward_hook(lambda *_: None)
    assert "published forward, because of Conv2d carries forward hooks" in repr(fused)
    handle.remove()
    assert "collapsed" in repr(fused)


# ------------------------------------------------------------------------------------------------- repr and subclasses


def test_the_repr_says_how_the_block_runs(pair):
    fused, _, _ = pair
    assert fused.extra_repr() == "collapsed"
    ak.fold_for_inference(fused.eval())
    assert fused.extra_repr() == "collapsed, folded"


class Gated(ak.APNB):
    """A user's subclass: one more parameter, and the block's forward inside its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gate = nn.Parameter(torch.full((1,), 0.5))

    def forward(self, x):
        return self.gate * super().forward(x)


def test_a_subclass_runs_collapsed_inside_its_own_forward():
    _, plain = build("APNB")
    block = Gated(HIGH, OUT, KEY, VALUE, dropout=0.0).double()
    missing = block.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["gate"]
    assert "collapsed" in repr(block)
    maps, weights = draw_maps("APNB"), output_weights("APNB")
    got, expected = (results(b, maps, w) for b, w in ((block, weights), (plain, weights / 2)))
    torch.testing.assert_close(got.pop("grad gate"), (expected["out"] * weights).sum().view(1))
    torch.testing.assert_close(got.pop("out"), expected.pop("out") / 2)
    assert_same(got, expected)
    assert "runs collapsed already" in ak.replace_blocks(block).skipped[""]
    assert type(pickle.loads(pickle.dumps(block))) is Gated


class Renamed(PlainAPNB):
    """A user's subclass of published code."""

    def describe(self):
        return f"{type(self).__name__}, {self.extra_repr()}"


def test_a_replaced_subclass_keeps_its_class_and_methods():
    block = Renamed(HIGH, OUT, KEY, VALUE)
    assert "PlainAPNB" not in ak.replace_blocks(block).replaced[""]
    assert isinstance(block, Renamed)
    assert block.describe() == "Renamed, collapsed"
    ak.restore_blocks(block)
    assert type(block) is Renamed
    assert block.describe() == "Renamed, "
