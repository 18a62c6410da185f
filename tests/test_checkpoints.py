"""Checkpoints of every code base into our blocks and back."""

import re

import numpy as np
import published
import pytest
import torch
from checkpoint_states import (
    CONTAINERS,
    PADDLE_FUSION,
    PADDLE_HEAD,
    PADDLE_PYRAMID,
    assert_same,
    changed,
    net,
    paddle_state,
    randomised,
    save,
    save_paddle,
    unchanged,
    without,
)
from test_model import TinyBackbone
from torch import nn

import annnet_kernels as ak
from annnet_kernels.reference import PlainAPNB

BLOCKS = {
    "fusion": (lambda: ak.AFNB(8, 12, 12, 5, 5, 0.0), lambda: published.AFNB(8, 12, 12, 5, 5, 0.0)),
    "pyramid": (lambda: ak.APNB(6, 6, 5, 5, 0.0), lambda: published.APNB(6, 6, 5, 5, 0.0)),
    "simple fusion": (
        lambda: ak.AFNB(6, 12, 12, 5, 4, bottleneck=False),
        lambda: published.AFNPBlock(12, 5, 4),
    ),
    "simple pyramid": (
        lambda: ak.APNB(6, 7, 5, 4, bottleneck=False),
        lambda: published.APNBBlock(6, 7, 5, 4),
    ),
}


def maps_for(block):
    query = block.stages[0].f_query[0]
    low, high = torch.randn(2, block.stages[0].f_value.in_channels, 9, 8), torch.randn(2, query.in_channels, 9, 8)
    return [high] if isinstance(block, PlainAPNB) else [low, high]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_mendelxu_and_the_simple_variant_load(kind, container, tmp_path):
    ours, theirs = (randomised(make()).eval() for make in BLOCKS[kind])
    report = ak.load_checkpoint(ours, save(CONTAINERS[container](theirs.state_dict()), tmp_path / "block.pth"))
    assert report.dialect == ("simple" if kind.startswith("simple") else "mendelxu")
    assert set(report.loaded) == set(ours.state_dict())
    assert not report.unused + list(report.folded) + list(report.initialised)
    maps = maps_for(ours)
    torch.testing.assert_close(ours(*maps), theirs(*maps), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", ["fusion", "pyramid"])
def test_blocks_of_paddleseg_load(kind, protocol, tmp_path):
    source, target = (randomised(BLOCKS[kind][0]()) for _ in range(2))
    parts = PADDLE_FUSION if kind == "fusion" else PADDLE_PYRAMID
    file = save_paddle(paddle_state(source.state_dict(), parts), tmp_path / "block.pdparams", protocol)
    target.stages[0].f_key[1][0].num_batches_tracked.fill_(7)
    report = ak.load_checkpoint(target, file)
    assert report.dialect == "paddleseg"
    assert report.loaded["stages.0.f_value.weight"] == "stages.0.f_value.weight"
    assert_same(target.state_dict(), source.state_dict())


def test_networks_of_paddleseg_load(tmp_path):
    source, target = net(), net()
    arrays = paddle_state(source.state_dict(), PADDLE_HEAD) | {"backbone.conv1_1._conv.weight": np.ones((3, 3))}
    check = unchanged(target.backbone)
    report = ak.load_checkpoint(target, save_paddle(arrays, tmp_path / "net.pdparams"))
    check()
    assert_same(target.fusion.state_dict(), source.fusion.state_dict())
    assert_same(target.context.state_dict(), source.context.state_dict())
    assert_same(target.cls.state_dict(), source.cls.state_dict())
    assert_same(target.dsn.state_dict(), source.dsn.state_dict())
    assert report.unused == ["backbone.conv1_1._conv.weight"]
    assert set(report.initialised) == {f"backbone.{key}" for key in target.backbone.state_dict()}
    assert report.loaded["context.1.0.running_var"] == "head.context.0._batch_norm._variance"
    assert "context.1.0.running_var <- head.context.0._batch_norm._variance" in str(report)
    with pytest.raises(ValueError, match=r"backbone\.high\.bias.*stay as initialised"):
        ak.load_checkpoint(target, tmp_path / "net.pdparams", strict=True)


@pytest.mark.parametrize("kind", ["fusion", "pyramid"])
def test_a_block_takes_its_part_of_a_networks_file(kind, tmp_path):
    source = net()
    block = randomised(BLOCKS[kind][0]())
    report = ak.load_checkpoint(block, save({"state_dict": source.state_dict()}, tmp_path / "net.pth"))
    assert_same(block.state_dict(), (source.fusion if kind == "fusion" else source.context[2]).state_dict())
    assert "cls.weight" in report.unused


class Holding(nn.Module):
    """A network as an attribute, as trainers keep it."""

    def __init__(self, held):
        super().__init__()
        self.net = held


class Beside(nn.Module):
    """The head as one attribute, the backbone as another."""

    def __init__(self, held):
        super().__init__()
        self.backbone, held.backbone = held.backbone, nn.Module()
        self.head = held


WRAPPERS = {
    "bare": lambda held: held,
    "compiled": torch.compile,
    "DataParallel": nn.DataParallel,
    "attribute": Holding,
    "attributes": lambda held: Holding(Holding(held)),
    "beside": Beside,
    "mmseg": lambda held: held,
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("around_model", [name for name in WRAPPERS if name != "mmseg"])
@pytest.mark.parametrize("around_file", WRAPPERS)
def test_a_network_is_loaded_with_its_backbone_whatever_holds_it(around_file, around_model, strict, tmp_path):
    source, target = net(), net()
    expected = dict(source.state_dict())
    state = WRAPPERS[around_file](source).state_dict()
    file = save(ak.to_dialect(state, "mmseg") if around_file == "mmseg" else state, tmp_path / "net.pth")
    if around_file != "beside":
        made = ak.ANNNet.from_checkpoint(file, backbone=TinyBackbone(), strict=True)
        assert_same(made.backbone.state_dict(), source.backbone.state_dict())
    if around_file == "mmseg":  # it has no biases ahead of norms
        expected = {key: x for key, x in expected.items() if key.startswith(("backbone.", "cls."))}
    holder = WRAPPERS[around_model](target)
    report = ak.load_checkpoint(holder, file, strict=strict)
    assert set(report.loaded) == set(holder.state_dict())
    assert not report.initialised
    assert not report.unused
    if around_model == "beside":
        target.backbone = holder.backbone
    got = target.state_dict()
    assert_same({key: got[key] for key in expected}, expected)


def test_a_part_that_only_the_models_head_has_is_reported_and_strictly_refused(tmp_path):
    file = save(net().state_dict(), tmp_path / "net.pth")
    target = net()
    target.fusion.extra = nn.Linear(2, 2)
    report = ak.load_checkpoint(target, file)
    assert set(report.initialised) == {"fusion.extra.weight", "fusion.extra.bias"}
    assert "kept as initialised: fusion.extra.bias, fusion.extra.weight (the file's head has no such part)" in str(
        report
    )
    with pytest.raises(ValueError, match=r"fusion\.extra\.bias.*would stay as initialised"):
        ak.load_checkpoint(target, file, strict=True)


@pytest.mark.parametrize("dropped", ["stages.0.f_query", "stages.0.f_key"])
def test_one_copy_of_a_shared_projection_is_enough(dropped, tmp_path):
    source, target = randomised(ak.APNB(6, 6, 5, 5)), randomised(ak.APNB(6, 6, 5, 5))
    ak.load_checkpoint(target, save(without(source.state_dict(), dropped), tmp_path / "block.pth"))
    assert_same(target.state_dict(), source.state_dict())


@pytest.mark.parametrize("key", ["stages.0.f_query.0.weight", "stages.0.f_query.1.0.running_var"])
def test_two_copies_of_a_shared_projection_must_agree(key, tmp_path):
    target = randomised(ak.APNB(6, 6, 5, 5))
    state = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    state[key].view(-1)[0] += 1
    check = unchanged(target)
    twin = re.escape(key.replace("f_query", "f_key"))
    with pytest.raises(ValueError, match=f"path: {twin} and {re.escape(key)} differ"):
        ak.load_checkpoint(target, save(state, tmp_path / "block.pth"))
    check()
    with pytest.raises(ValueError, match=r"state_dict: .* differ"):
        ak.to_dialect(net().state_dict() | {f"context.2.{name}": tensor for name, tensor in state.items()}, "mmseg")


ALIKE = {
    "ours": lambda: ak.AFNB(12, 12, 12, 5, 5),
    "published": lambda: published.AFNB(12, 12, 12, 5, 5, 0.0),
    "no bottleneck": lambda: ak.AFNB(12, 12, 12, 5, 5, bottleneck=False),
    "compiled": lambda: torch.compile(ak.AFNB(12, 12, 12, 5, 5)),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_equal_weights_of_query_and_key_make_no_pyramid_block(kind, tmp_path):
    source, target = randomised(ALIKE[kind]()), ALIKE[kind]()
    with torch.no_grad():
        for parameter in target.parameters():
            parameter.fill_(0.25)
    for _ in range(2):  # the second time query and key differ already
        ak.load_checkpoint(target, save(source.state_dict(), tmp_path / "block.pth"))
        assert_same(target.state_dict(), source.state_dict())


@pytest.mark.parametrize("dialect", ["mmseg", "mendelxu", "paddleseg"])
def test_there_and_back_again(dialect, tmp_path):
    source, target = net(), net()
    state = ak.to_dialect(source.state_dict(), dialect)
    wrapped = {f"module.{key}": tensor for key, tensor in source.state_dict().items()}
    assert_same(ak.to_dialect({"state_dict": wrapped}, dialect), state)
    if dialect == "paddleseg":
        expected = paddle_state(source.state_dict(), PADDLE_HEAD) | dict(source.backbone.state_dict(prefix="backbone."))
        assert state.keys() == expected.keys()
        file = save_paddle({key: x.numpy() for key, x in state.items()}, tmp_path / "net.pdparams")
    else:
        file = save({"state_dict": state}, tmp_path / "net.pth")
    report = ak.load_checkpoint(target, file, strict=True)
    x = torch.randn(2, 3, 65, 49)
    for training in (True, False):
        for got, expected in zip(target.train(training)(x), source.train(training)(x), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    if dialect == "mendelxu":
        assert all(key == origin for key, origin in report.loaded.items())


def test_a_block_goes_through_every_dialect():
    source = randomised(ak.AFNB(8, 12, 12, 5, 5))
    state = source.state_dict()
    for dialect in ("paddleseg", "mmseg", "paddleseg", "mendelxu", "mmseg", "mendelxu"):
        state = ak.to_dialect(state, dialect)
    target = ak.AFNB(8, 12, 12, 5, 5)
    target.load_state_dict(state)
    maps = maps_for(target)
    torch.testing.assert_close(target.eval()(*maps), source.eval()(*maps), rtol=1e-4, atol=1e-4)


def test_dialects_refuse_what_they_cannot_hold():
    wide = ak.AFNB(8, 12, 12, 5, 7).state_dict()
    with pytest.raises(ValueError, match="mmseg has one width for keys and values, the fusion block has 5 and 7"):
        ak.to_dialect(wide, "mmseg")
    assert ak.to_dialect(wide, "paddleseg")
    with pytest.raises(ValueError, match="the pyramid block has no bottleneck"):
        ak.to_dialect(ak.APNB(6, 6, 5, 5, bottleneck=False).state_dict(), "paddleseg")
    with pytest.raises(ValueError, match="dialect: expected one of mmseg, mendelxu, paddleseg, got 'gluon'"):
        ak.to_dialect(wide, "gluon")
    with pytest.raises(ValueError, match="state_dict: expected one block or a whole head, got no asymmetric non-local"):
        ak.to_dialect(nn.Linear(2, 2).state_dict(), "mmseg")
    with pytest.raises(TypeError, match="state_dict: expected a state dict of tensors, got list"):
        ak.to_dialect([1], "mmseg")


@pytest.mark.parametrize(
    "norm_layer",
    [
        lambda c: nn.GroupNorm(1, c),
        lambda c: nn.InstanceNorm2d(c),
        lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    ],
    ids=["GroupNorm", "InstanceNorm", "BatchNorm"],
)
def test_a_bias_that_no_running_mean_can_take_is_never_dropped(norm_layer, tmp_path):
    source = randomised(ak.APNB(6, 6, 5, 5, norm_layer=norm_layer))
    for dialect in ("mendelxu", "paddleseg"):
        assert len(ak.to_dialect(source.state_dict(), dialect)) == len(source.state_dict())
    with pytest.raises(ValueError, match=r"state_dict: stages\.0\.f_key\.0\.bias has no place in mmseg"):
        ak.to_dialect(source.state_dict(), "mmseg")
    target = randomised(ak.APNB(6, 6, 5, 5, norm_layer=norm_layer))
    ak.load_checkpoint(target, save(source.state_dict(), tmp_path / "block.pth"), strict=True)
    assert_same(target.state_dict(), source.state_dict())


WRONG = {
    "missing": ({"stages__0__W__weight": None}, r"stages\.0\.W\.weight is not in the file"),
    "missing norm": ({"conv_bn_dropout__1__running_var": None}, r"conv_bn_dropout\.1\.running_var is not in the file"),
    "unknown": ({"stages__0__extra__weight": torch.ones(2)}, r"stages\.0\.extra\.weight has no place in the model"),
    "second stage": ({"stages__1__W__weight": torch.ones(2)}, r"stages\.1\.W\.weight has no place in the model"),
    "shape": (
        {"stages__0__f_value__weight": torch.ones(5, 9, 1, 1)},
        r"stages\.0\.f_value\.weight has \(5, 9, 1, 1\), expected \(5, 8, 1, 1\)",
    ),
    "scalar": ({"stages__0__W__bias": torch.tensor(1.0)}, r"stages\.0\.W\.bias has \(\), expected \(12,\)"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_checkpoint_names_the_key_and_changes_nothing(kind, tmp_path):
    block = randomised(ak.AFNB(8, 12, 12, 5, 5))
    changes, message = WRONG[kind]
    file = save(changed(randomised(ak.AFNB(8, 12, 12, 5, 5)).state_dict(), **changes), tmp_path / "block.pth")
    check = unchanged(block)
    with pytest.raises(ValueError, match=f"path: .*{message}"):
        ak.load_checkpoint(block, file)
    check()


def test_a_bias_that_does_not_fit_its_norm_is_named(tmp_path):
    state = changed(ak.AFNB(8, 12, 12, 5, 5).state_dict(), stages__0__f_key__0__bias=torch.ones(3))
    with pytest.raises(ValueError, match=r"stages\.0\.f_key\.0\.bias has \(3,\), expected \(5,\)"):
        ak.to_dialect(state, "mmseg")


@pytest.mark.parametrize("key", ["context.3.weight", "cls.extra", "fusion.stages.0.g.weight"])
def test_a_key_of_the_head_that_the_model_lacks_is_named(key, tmp_path):
    target = net()
    check = unchanged(target)
    with pytest.raises(ValueError, match=re.escape(f"path: {key} has no place in the model")):
        ak.load_checkpoint(target, save(net().state_dict() | {key: torch.ones(2)}, tmp_path / "net.pth"))
    state = ak.to_dialect(net().state_dict(), "mmseg") | {"decode_head.extra.weight": torch.ones(2)}
    state |= {"auxiliary_head.convs.1.conv.weight": torch.ones(2), "ema.decay": torch.ones(())}
    with pytest.raises(ValueError, match=r"path: decode_head\.extra\.weight has no place in the model$"):
        ak.load_checkpoint(target, save(state, tmp_path / "mmseg.pth"))
    check()
    del state["decode_head.extra.weight"]
    report = ak.load_checkpoint(target, save(state, tmp_path / "mmseg.pth"))
    assert report.unused == ["auxiliary_head.convs.1.conv.weight", "ema.decay"]
    arrays = paddle_state(target.state_dict(), PADDLE_HEAD) | {"head.auxlayer.more.weight": np.ones(2)}
    report = ak.load_checkpoint(target, save_paddle(arrays, tmp_path / "net.pdparams"))
    assert report.unused == ["head.auxlayer.more.weight"]


MODELS = {
    "no block": (lambda: nn.Linear(2, 2), "block_or_model: expected one block or a whole head, got no asymmetric"),
    "two blocks": (
        lambda: nn.ModuleList([ak.APNB(6, 6, 5, 5), ak.APNB(6, 6, 5, 5)]),
        r"block_or_model: .* got 2 blocks \(0, 1\) and no head around them",
    ),
    "a head": (net, "path: expected the weights of a whole head, got those of a single block"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_the_file_is_not_for_is_refused(kind, tmp_path):
    make, message = MODELS[kind]
    model = make()
    check = unchanged(model)
    with pytest.raises(ValueError, match=message):
        ak.load_checkpoint(model, save(ak.APNB(6, 6, 5, 5).state_dict(), tmp_path / "block.pth"))
    check()


@pytest.mark.parametrize("dialect", ["mmseg", "mendelxu", "paddleseg"])
def test_a_network_is_made_from_a_checkpoint_of_every_dialect(dialect, tmp_path):
    source = net(classes=7)
    state = without(ak.to_dialect(source.state_dict(), dialect), "backbone.")
    if dialect == "paddleseg":
        file = save_paddle({key: x.numpy() for key, x in state.items()}, tmp_path / "net.pdparams")
    else:
        file = save({"state_dict": state}, tmp_path / "net.pth")
    made = ak.ANNNet.from_checkpoint(file, backbone=source.backbone, dropout=0.0)
    assert made.cls.out_channels == 7
    assert made.dsn is not None
    assert {key.partition(".")[0] for key in made.checkpoint_report.initialised} == {"backbone"}
    x = torch.randn(2, 3, 65, 49)
    torch.testing.assert_close(made.eval()(x), source.eval()(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"backbone\..*the file's backbone is another.*would stay as initialised"):
        ak.ANNNet.from_checkpoint(file, backbone=TinyBackbone(), strict=True)


def test_an_auxiliary_head_of_another_width_is_left_out(tmp_path):
    source = net()
    state = changed(
        ak.to_dialect(source.state_dict(), "mmseg"),
        auxiliary_head__convs__0__conv__weight=torch.ones(3, 8, 3, 3),
        auxiliary_head__convs__0__bn__weight=torch.ones(3),
        auxiliary_head__convs__0__bn__bias=torch.ones(3),
        auxiliary_head__convs__0__bn__running_mean=torch.ones(3),
        auxiliary_head__convs__0__bn__running_var=torch.ones(3),
        auxiliary_head__conv_seg__weight=torch.ones(4, 3, 1, 1),
    )
    file = save({"state_dict": state}, tmp_path / "net.pth")
    made = ak.ANNNet.from_checkpoint(file, backbone=TinyBackbone())
    assert made.dsn is None
    assert "auxiliary_head.conv_seg.weight" in made.checkpoint_report.unused
    target = net()
    check = unchanged(target.dsn)
    report = ak.load_checkpoint(target, file)
    check()
    assert {key for key in report.initialised if key.startswith("dsn")} == {f"dsn.{k}" for k in target.dsn.state_dict()}
    assert "auxiliary_head.convs.0.conv.weight has (3, 8, 3, 3)" in str(report)


def test_a_backbone_is_loaded_only_if_it_is_torchvisions(tmp_path):
    pytest.importorskip("torchvision", reason="needs torchvision's ResNet")
    source = ak.ANNNet(3, channels=8, key_channels=4, value_channels=4)
    state = {f"module.{key}": x for key, x in randomised(source).state_dict().items()}
    made = ak.ANNNet.from_checkpoint(save(state, tmp_path / "ours.pth"), strict=True)
    assert_same(made.state_dict(), source.state_dict())
    foreign = {key.replace("conv1.weight", "prefix.conv1.weight"): x for key, x in source.state_dict().items()}
    file = save(foreign, tmp_path / "theirs.pth")
    made = ak.ANNNet.from_checkpoint(file)
    assert len(made.checkpoint_report.initialised) == len(made.backbone.state_dict())
    assert "kept as initialised: backbone.bn1.bias, " in str(made.checkpoint_report)
    with pytest.raises(ValueError, match=r"backbone\.bn1\.bias.*would stay as initialised"):
        ak.ANNNet.from_checkpoint(file, strict=True)
    deep = {key.replace("layer3.5.", "layer3.22."): x for key, x in source.state_dict().items()}
    assert len(ak.ANNNet.from_checkpoint(save(deep, tmp_path / "deep.pth")).backbone.layer3) == 23


def test_from_checkpoint_names_what_tells_no_width(tmp_path):
    file = save(changed(net().state_dict(), cls__weight=None), tmp_path / "net.pth")
    with pytest.raises(ValueError, match=r"path: the file has no cls\.weight"):
        ak.ANNNet.from_checkpoint(file)
    with pytest.raises(ValueError, match="path: expected the weights of a whole head, got those of a single block"):
        ak.ANNNet.from_checkpoint(save(ak.APNB(6, 6, 5, 5).state_dict(), tmp_path / "block.pth"))


def test_checkpoints_undo_a_fold_and_load_into_replaced_blocks(tmp_path):
    source, target = (randomised(published.APNB(6, 6, 5, 5, 0.0)).eval() for _ in range(2))
    assert ak.replace_blocks(target).replaced
    ak.fold_for_inference(target)
    x = torch.randn(2, 6, 9, 8)
    with torch.no_grad():
        target(x)
        ak.load_checkpoint(target, save(source.state_dict(), tmp_path / "block.pth"))
        torch.testing.assert_close(target(x), source(x), rtol=1e-4, atol=1e-4)


def test_random_start_is_no_hidden_agreement():
    """The rule of these tests: what they load differs from what was there."""
    one, other = net().state_dict(), net().state_dict()
    assert not any(torch.equal(one[key], other[key]) for key in one if not key.endswith("num_batches_tracked"))
