"""replace_blocks and restore_blocks: what they change, what they leave alone, what they refuse."""

import copy
import io
import pickle
import random

import numpy as np
import published
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from replacement_rule import assert_round_trip, assert_same_state, randomise_output, train
from torch import nn

import annnet_kernels as ak
from annnet_kernels import backends, recognition, replace
from annnet_kernels.reference import PlainAFNB, PlainAPNB

FUSION_MAPS, PYRAMID_MAPS = [(2, 6, 9, 8), (2, 10, 11, 12)], [(2, 10, 11, 12)]
BLOCKS = {
    "plain AFNB": (lambda: PlainAFNB(6, 10, 12, 8, 5, dropout=0.0), FUSION_MAPS),
    "plain APNB": (lambda: PlainAPNB(10, 10, 8, 5, dropout=0.0), PYRAMID_MAPS),
    "MendelXu AFNB": (lambda: published.AFNB(6, 10, 12, 8, 5, dropout=0.0), FUSION_MAPS),
    "MendelXu APNB": (lambda: published.APNB(10, 7, 8, 5, dropout=0.0, psp_size=(1, 4)), PYRAMID_MAPS),
    "simple fusion": (lambda: published.AFNPBlock(12, 8, 5), [(2, 6, 9, 8), (2, 12, 11, 12)]),
    "simple pyramid": (lambda: published.APNBBlock(10, 7, 8, 5, pool_sizes=(1, 4)), PYRAMID_MAPS),
}
COMPARED = [kind for kind in BLOCKS if not kind.startswith("plain")]


def build(kind):
    make, shapes = BLOCKS[kind]
    block = make().double()
    randomise_output(block)
    return nn.Sequential(block), [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def call(model, maps):
    return model[0](*maps)


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
    compiled = torch.compile(model[0], backend="aot_eager", fullgraph=True)
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


def test_a_pasted_class_with_one_changed_operation_is_refused():
    model = nn.Sequential(published.SharpenedAPNBBlock(10, 7, 8, 5))
    report = ak.replace_blocks(model)
    assert not report.replaced
    assert "computes something else: the output differs by" in report.skipped["0"], str(report)
    assert type(model[0]) is published.SharpenedAPNBBlock
    assert ak.replace_blocks(model, verify=False).replaced == {"0": "SharpenedAPNBBlock (simple, not compared)"}


def test_a_parameter_that_is_zero_at_first_hides_nothing():
    report = ak.replace_blocks(published.ReweightedAPNBBlock(10, 7, 8, 5))
    assert "computes something else" in report.skipped[""], str(report)


def test_a_dropout_inside_is_refused():
    report = ak.replace_blocks(published.DroppingAPNBBlock(10, 7, 8, 5))
    assert "in training mode" in report.skipped[""], str(report)


def drops_nothing(join, norm, drop, context, x):
    return norm(join(torch.cat([context, x], 1)))


def drops_the_context(join, norm, drop, context, x):
    return norm(join(torch.cat([drop(context), x], 1)))


def drops_ahead_of_the_norm(join, norm, drop, context, x):
    return norm(drop(join(torch.cat([context, x], 1))))


def drops_twice(join, norm, drop, context, x):
    return F.dropout2d(drop(norm(join(torch.cat([context, x], 1)))), 0.1, drop.training)


def drops_by_default(join, norm, drop, context, x):
    return F.dropout2d(norm(join(torch.cat([context, x], 1))), training=drop.training)


def drops_pixels(join, norm, drop, context, x):
    return F.dropout(norm(join(torch.cat([context, x], 1))), drop.p, drop.training)


def drops_always(join, norm, drop, context, x):
    return F.dropout2d(norm(join(torch.cat([context, x], 1))), drop.p)


@pytest.mark.parametrize("p", [0.0, 0.05])
@pytest.mark.parametrize(
    "bottleneck",
    [
        drops_nothing,
        drops_the_context,
        drops_ahead_of_the_norm,
        drops_twice,
        drops_by_default,
        drops_pixels,
        drops_always,
    ],
)
@pytest.mark.parametrize("kind", ["AFNB", "APNB"])
def test_a_dropout_that_is_applied_otherwise_is_refused(kind, bottleneck, p):
    class Block(PlainAFNB if kind == "AFNB" else PlainAPNB):
        def forward(self, *maps):
            return bottleneck(*self.conv_bn_dropout, self.stages[0](maps[0], maps[-1]), maps[-1])

    block = Block(6, 10, 12, 8, 5, dropout=p) if kind == "AFNB" else Block(10, 12, 8, 5, dropout=p)
    report = ak.replace_blocks(block)
    assert "computes something else" in report.skipped[""], str(report)


@pytest.mark.parametrize("drop", [nn.Dropout2d(0.1), nn.Dropout(0.1)], ids=repr)
@pytest.mark.parametrize("kind", ["MendelXu AFNB", "MendelXu APNB"])
def test_a_dropout_that_is_applied_as_published_is_replaced_and_draws_the_same(kind, drop):
    model, maps = build(kind)
    model[0].conv_bn_dropout[2] = drop
    twin = copy.deepcopy(model)
    report = ak.replace_blocks(model)
    assert "compared" in report.replaced["0"], str(report)
    assert drop.p == 0.1
    torch.manual_seed(3)
    expected = call(twin, maps)
    torch.manual_seed(3)
    torch.testing.assert_close(call(model, maps), expected)


def test_a_forward_that_raises_is_refused(monkeypatch):
    monkeypatch.setattr(published.APNB, "forward", lambda self, x: 1 / 0)
    report = ak.replace_blocks(published.APNB(10, 7, 8, 5, 0.0))
    assert "could not be compared: ZeroDivisionError" in report.skipped[""]


@pytest.mark.parametrize("sizes", [(2,), (1, 1)], ids=str)
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
def test_query_scales_other_than_one_are_refused(sizes, verify):
    report = ak.replace_blocks(published.AFNB(6, 10, 12, 8, 5, 0.0, sizes=sizes), verify=verify)
    expected = "stages.0.scale is 2, supported is 1" if sizes == (2,) else "2 stages (query_scales or sizes)"
    assert expected in report.skipped[""], str(report)


def test_another_activation_is_called_as_it_is():
    block = published.APNB(10, 7, 8, 5, 0.0).double()
    block.stages[0].f_key[1][1] = nn.Tanh()
    randomise_output(block)
    twin, x = copy.deepcopy(block), torch.randn(PYRAMID_MAPS[0], dtype=torch.float64)
    assert "compared" in ak.replace_blocks(block).replaced[""]
    torch.testing.assert_close(block(x), twin(x))


def test_a_block_with_a_hook_inside_is_left_alone_and_named():
    model = nn.Sequential(PlainAPNB(10, 10, 8, 5))
    model[0].stages[0].W.register_forward_hook(lambda *_: None)
    report = ak.replace_blocks(model)
    assert "Conv2d carries forward hooks" in report.skipped["0"]
    assert "skipped 0" in str(report)


def test_a_block_whose_forward_was_patched_is_left_alone():
    block = PlainAPNB(10, 10, 8, 5)
    block.forward = lambda x: x
    assert "has a forward of its own" in ak.replace_blocks(block).skipped[""]


def test_a_block_with_a_recompute_of_its_own_is_left_alone():
    block = published.APNB(10, 7, 8, 5, 0.0)
    block.recompute = "its own setting"
    assert "has a recompute of its own" in ak.replace_blocks(block).skipped[""]
    ak.restore_blocks(block)
    assert block.recompute == "its own setting"


def test_an_odd_structure_is_left_alone_and_named():
    block = published.APNBBlock(10, 7, 8, 5)
    block.Conv_Key = block.Conv_Query = nn.Sequential(nn.Conv2d(10, 8, 1), nn.Conv2d(8, 8, 1), nn.ReLU())
    expected = "not built as expected: Conv_Key holds Conv2d, Conv2d, ReLU; expected a convolution, then at most a norm"
    assert expected in ak.replace_blocks(block).skipped[""]


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


PASTED = """
import torch
import torch.nn.functional as F

def helper(x):
    return x

class Block(torch.nn.Module):
    def forward(self, x):
        parts = [F.relu(part) for part in x]
        return torch.cat(parts, 1)
"""


def fingerprint_of(source, tmp_path, edited=None):
    path = tmp_path / "pasted.py"
    path.write_text(source)
    namespace = {"__name__": "pasted"}
    exec(compile(source, str(path), "exec"), namespace)
    path.write_text(source if edited is None else edited)
    function = namespace["Block"].forward
    return recognition.fingerprint(function)


def test_a_fingerprint_sees_code_and_nothing_else(tmp_path):
    known = fingerprint_of(PASTED, tmp_path / "")
    assert known is not None
    layout = PASTED.replace("(self, x):", '(self, x: "Tensor") -> "Tensor":\n        """Words."""  # more words')
    assert fingerprint_of(layout, tmp_path) == known
    changed = PASTED.replace("F.relu", "F.gelu")
    assert fingerprint_of(changed, tmp_path) not in (known, None)
    assert fingerprint_of(PASTED.replace("F.relu(part)", "helper(part)"), tmp_path) is None
    assert fingerprint_of(PASTED.replace("functional as F", "init as F"), tmp_path) is None
    assert fingerprint_of(changed, tmp_path, edited=PASTED) is None
    assert fingerprint_of(PASTED.replace("    def", "    @torch.no_grad()\n    def"), tmp_path) is None
    assert recognition.fingerprint(torch.relu) is None


@pytest.fixture
def known_pasted_code(monkeypatch):
    """The pasted classes of these tests count as published; ``attend``, their helper, as PyTorch's."""
    monkeypatch.setattr(recognition, "_HARMLESS", (*recognition._HARMLESS, published.attend))
    forwards = {cls.forward for cls in (published.AFNPBlock, published.APNBBlock, published.PPMModule)}
    known = {recognition.fingerprint(forward) for forward in forwards}
    assert None not in known
    monkeypatch.setitem(recognition.PUBLISHED_CODE, "simple", known)

    def never(*_, **__):
        raise AssertionError("known code was compared")

    monkeypatch.setattr(replace, "difference", never)


def test_known_code_is_replaced_without_comparison(known_pasted_code):
    for block in (published.AFNPBlock(12, 8, 5), published.APNBBlock(10, 7, 8, 5)):
        block.key_channels = 8
        assert "known code" in ak.replace_blocks(block).replaced[""]


def other_scale(block):
    block.key_channels = 4


def other_activation(block):
    block.Conv_Key[2] = nn.LeakyReLU()


def stranger_inside(block):
    block.ppm.__class__ = type("PPM", (published.PPMModule,), {"forward": lambda self, x: 2 * x.flatten(2)})


def stranger_called(block):
    block.__class__ = type("Block", (published.APNBBlock,), {"__call__": lambda self, x: x})


def test_a_longer_projection_is_left_alone():
    block = published.APNBBlock(10, 7, 8, 5)
    block.Conv_Key.append(nn.Tanh())
    expected = (
        "Conv_Key holds Conv2d, BatchNorm2d, ReLU, Tanh; expected a convolution, then at most a norm and an activ"
    )
    assert expected in str(ak.replace_blocks(block))


@pytest.mark.parametrize("change", [other_scale, other_activation, stranger_inside, stranger_called])
def test_known_code_around_something_unknown_is_compared(known_pasted_code, change):
    block = published.APNBBlock(10, 7, 8, 5)
    block.key_channels = 8
    change(block)
    with pytest.raises(AssertionError, match="known code was compared"):
        ak.replace_blocks(block)


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
