"""AFNB and APNB against the plain blocks, and the plain blocks against the float64 truth."""

import copy
import itertools
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from block_rule import (
    CLASSES,
    HIGH,
    KEY,
    MAPS,
    OUT,
    VALUE,
    assert_same,
    build,
    draw_maps,
    output_weights,
    randomise,
    results,
)
from helpers import FACTOR, FLOOR, assert_as_accurate_as_plain
from torch import nn

import annnet_kernels as ak
from annnet_kernels.reference import truth

pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------------------------------- plain against truth


@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["AFNB", "APNB", "NonLocalBlock"])
def test_plain_block_computes_the_equations(kind, training, bottleneck):
    if kind == "NonLocalBlock":
        plain, maps = ak.NonLocalBlock(HIGH, OUT, KEY, VALUE, dropout=0.0, bottleneck=bottleneck).double(), None
        randomise(plain)
        maps, pool = draw_maps("APNB"), None
    else:
        _, plain = build(kind, bottleneck=bottleneck, psp_size=(1, 3, 6, 8))
        maps, pool = draw_maps(kind), ((1, 3, 6, 8), (1, 3, 6, 8))
    plain.train(training)
    state = {k: v.detach().clone().requires_grad_(v.is_floating_point()) for k, v in plain.state_dict().items()}
    if kind != "AFNB":  # two keys, one tensor
        state |= {k.replace("f_key", "f_query"): v for k, v in state.items() if "f_key" in k}
    inputs = [x.clone().requires_grad_() for x in maps]
    weights = torch.randn(2, OUT, *maps[-1].shape[2:], dtype=torch.float64)
    out, running = truth.block(state, inputs[0], inputs[-1], training=training, relu=kind != "AFNB", pool=pool)
    (out * weights).sum().backward()
    expected = {"out": out.detach()}
    expected |= {f"grad input {i}": x.grad for i, x in enumerate(inputs)}
    expected |= {f"grad {n}": state[n].grad for n, _ in plain.named_parameters()}
    got = results(plain, maps, weights)
    for name, value in running.items():
        assert torch.allclose(got.pop(name), value, rtol=1e-10, atol=1e-12), name
    assert_same({k: v for k, v in got.items() if k in expected}, expected)
    if training:
        calls = 1 if kind == "AFNB" else 2
        assert plain.stages[0].f_key[1][0].num_batches_tracked == calls


# -------------------------------------------------------------------------------------------- the algebra, in float64


def no_conv_bias(block):
    for module in block.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = None


def freeze_norms(block):
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def freeze_weights(block):
    for name, parameter in block.named_parameters():
        parameter.requires_grad_("f_value" in name or "f_key.1" in name)


SETTINGS = {
    "published": ({}, None),
    "no bottleneck": ({"bottleneck": False}, None),
    "no convolution bias": ({}, no_conv_bias),
    "no convolution bias, no bottleneck": ({"bottleneck": False}, no_conv_bias),
    "other pool sizes": ({"psp_size": (2, (3, 5), 12)}, None),
    "one token": ({"psp_size": (1,)}, None),
    "momentum 0.3": ({"norm_layer": partial(nn.BatchNorm2d, momentum=0.3)}, None),
    "cumulative average": ({"norm_layer": partial(nn.BatchNorm2d, momentum=None)}, None),
    "no affine": ({"norm_layer": partial(nn.BatchNorm2d, affine=False)}, None),
    "no running statistics": ({"norm_layer": partial(nn.BatchNorm2d, track_running_stats=False)}, None),
    "GroupNorm": ({"norm_layer": lambda channels: nn.GroupNorm(2, channels)}, None),
    "InstanceNorm": ({"norm_layer": nn.InstanceNorm2d}, None),
    "InstanceNorm, tracking": ({"norm_layer": partial(nn.InstanceNorm2d, track_running_stats=True)}, None),
    "no norm": ({"norm_layer": lambda channels: nn.Identity()}, None),
    "frozen norms": ({}, freeze_norms),
    "frozen weights": ({}, freeze_weights),
}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", CLASSES)
def test_collapse_is_exact(kind, setting, training):
    options, change = SETTINGS[setting]
    blocks = build(kind, **options)
    maps, weights = draw_maps(kind), output_weights(kind)
    for block in blocks:
        block.train(training)
        if change is not None:
            change(block)
    assert "collapsed" in blocks[0].extra_repr()
    got, want = (results(block, maps, weights) for block in blocks)
    assert_same(got, want)


@pytest.mark.parametrize("kind", CLASSES)
def test_two_training_steps_leave_the_published_counters(kind):
    fused, plain = build(kind)
    maps = draw_maps(kind)
    for _ in range(2):
        for block in (fused, plain):
            block(*maps)
    assert_same(dict(fused.named_buffers()), dict(plain.named_buffers()))
    assert fused.stages[0].f_key[1][0].num_batches_tracked == (2 if kind == "AFNB" else 4)


@pytest.mark.parametrize("kind", CLASSES)
def test_dropout_draws_as_published(kind):
    fused, plain = build(kind, dropout=0.5)
    maps, weights = draw_maps(kind), output_weights(kind)
    found = []
    for block in (fused, plain):
        torch.manual_seed(3)
        found.append(results(block, maps, weights))
    assert_same(*found)
    dropped = (found[0]["out"].flatten(2) == 0).all(dim=2)
    assert dropped.any()
    assert not dropped.all()


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("kind", CLASSES)
def test_small_batches(kind, batch):
    fused, plain = build(kind)
    maps = [x[:batch] for x in draw_maps(kind)]
    for block in (fused, plain):
        block.train(batch > 0)
    torch.testing.assert_close(fused(*maps), plain(*maps))


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (3, 2)])
@pytest.mark.parametrize("kind", CLASSES)
def test_maps_smaller_than_the_pyramid(kind, size):
    fused, plain = build(kind)
    maps = [torch.randn(2, shape[1], *size, dtype=torch.float64) for shape in MAPS[kind]]
    weights = torch.randn(2, OUT, *size, dtype=torch.float64)
    assert_same(results(fused, maps, weights), results(plain, maps, weights), tolerance=1e-7)


# --------------------------------------------------------------------------------------------- rounding, in every dtype

SEEDS = 9
SEEDS_16_BIT = 25
PRECISIONS = {
    "float32": (torch.float32, nullcontext),
    "bfloat16": (torch.bfloat16, nullcontext),
    "float16": (torch.float16, nullcontext),
    "autocast bfloat16": (torch.float32, partial(torch.autocast, "cpu", dtype=torch.bfloat16)),
}


LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
PRECISION_CASES = [
    *itertools.product(PRECISIONS, LAYOUTS, ["bottleneck"]),
    *(("float32", layout, "context") for layout in LAYOUTS),
    ("bfloat16", "channels_last", "context"),
]
"""Precision, layout and what ends the block: without a bottleneck, fewer steps round."""


@pytest.mark.parametrize("case", PRECISION_CASES, ids="-".join)
@pytest.mark.parametrize("kind", CLASSES)
def test_as_accurate_as_plain(kind, case):
    precision, layout, bottleneck = case[0], LAYOUTS[case[1]], case[2] == "bottleneck"
    dtype, context = PRECISIONS[precision]
    computed = torch.bfloat16 if "autocast" in precision else dtype
    # Rounding in 16 bit flips ReLU inputs in every draw: with many pixels their share is stable. In float32 flips are
    # rare, and a small map keeps them so.
    enlarge = 1 if computed == torch.float32 else 3
    zero_gradients = []

    def run(seed):
        fused, plain = build(kind, bottleneck=bottleneck)
        maps, weights = draw_maps(kind, layout, enlarge), output_weights(kind, layout, enlarge)
        expected = results(copy.deepcopy(plain), maps, weights)
        with context():
            got, baseline = (results(b.to(dtype), [x.to(dtype) for x in maps], weights) for b in (fused, plain))
        for name in list(expected):
            if name.endswith(".bias") and is_zero_gradient(name, expected):
                weight = expected[name.replace("bias", "weight")].norm()
                zero_gradients.append((name, got[name].double().norm(), baseline[name].double().norm(), weight))
                for found in (got, baseline, expected):
                    del found[name]
        return got, baseline, expected

    assert_as_accurate_as_plain(run, computed, seeds=SEEDS if computed == torch.float32 else SEEDS_16_BIT)
    assert len(zero_gradients) >= SEEDS  # at least one per draw: the convolution bias ahead of a batch norm
    medians = {}
    for name, mine, theirs, weight in zero_gradients:
        medians.setdefault(name, []).append((float(mine), FACTOR * float(theirs) + FLOOR[computed] * float(weight)))
    for name, pairs in medians.items():
        mine, bound = (sorted(column)[len(column) // 2] for column in zip(*pairs, strict=True))
        assert mine <= bound, f"{name}: zero gradient of norm {mine:.2e}, bound {bound:.2e}"


def is_zero_gradient(name, expected):
    """A bias that only shifts what a batch norm with batch statistics reads: its gradient cancels exactly."""
    weight = name.replace("bias", "weight")
    return weight in expected and float(expected[name].norm()) < 1e-9 * float(expected[weight].norm())


# --------------------------------------------------------------------------------------- compiled, keys and bad input


@pytest.mark.parametrize("kind", CLASSES)
def test_compiles_as_one_graph_for_every_size(kind):
    torch._dynamo.reset()
    fused, _ = build(kind)
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(fused, fullgraph=True, dynamic=True, backend=backend)
    for extra in range(4):
        maps = [torch.randn(2 + extra, s[1], s[2] + extra, s[3] + extra, dtype=torch.float64) for s in MAPS[kind]]
        torch.testing.assert_close(compiled(*maps), copy.deepcopy(fused)(*maps))
    assert len(graphs) == 1


@pytest.mark.parametrize(("kind", "training"), [("AFNB", False), ("APNB", True)])
def test_compiles_without_gradients(kind, training):
    """By inductor, which must see that some operators write in place; in training it moves the running statistics."""
    torch._dynamo.reset()
    fused, _ = build(kind)
    fused.train(training)
    twin, maps = copy.deepcopy(fused), draw_maps(kind)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fused, fullgraph=True)(*maps), twin(*maps))
    torch.testing.assert_close(dict(fused.named_buffers()), dict(twin.named_buffers()))


def test_state_dict_has_the_published_keys():
    stage = ["f_key.0.weight", "f_key.0.bias", "f_key.1.0.weight", "f_key.1.0.running_var", "f_value.bias", "W.weight"]
    for kind, tail in (("AFNB", "conv_bn_dropout.1.running_mean"), ("APNB", "conv_bn_dropout.1.0.running_mean")):
        keys = build(kind)[0].state_dict().keys()
        expected = {f"stages.0.{name}" for name in stage} | {f"stages.0.{n.replace('key', 'query')}" for n in stage}
        assert expected | {tail, "conv_bn_dropout.0.weight"} <= keys
        assert not any("conv_bn_dropout" in key for key in build(kind, bottleneck=False)[0].state_dict())
    assert ak.AFNB(1024, 2048, 2048, 256, 256).stages[0].W.weight.abs().sum() == 0
    assert sum(p.numel() for p in ak.AFNB(1024, 2048, 2048, 256, 256).parameters()) == 9_971_456
    assert sum(p.numel() for p in ak.APNB(512, 512, 256, 256).parameters()) == 920_576


BAD = [
    (lambda: ak.AFNB(0, 8, 8, 4, 4), ValueError, "low_in_channels: expected a positive integer, got 0"),
    (lambda: ak.APNB(8, 8.0, 4, 4), TypeError, "out_channels: expected a positive integer, got 8.0"),
    (lambda: ak.NonLocalBlock(8, 8, True, 4), TypeError, "key_channels: expected a positive integer, got True"),
    (lambda: ak.APNB(8, 8, 4, 4, sizes=(1, 2)), ValueError, r"sizes: expected \(1,\), got \(1, 2\)"),
    (lambda: ak.APNB(8, 8, 4, 4, dropout=2), ValueError, "dropout: expected a probability from 0 to 1, got 2"),
    (lambda: ak.APNB(8, 8, 4, 4, dropout="no"), TypeError, "dropout: expected a probability"),
    (lambda: ak.APNB(8, 8, 4, 4, norm_layer=3), TypeError, "norm_layer: expected a callable"),
    (lambda: ak.APNB(8, 8, 4, 4, psp_size=()), ValueError, "psp_size: expected at least one pool size"),
    (lambda: ak.APNB(8, 8, 4, 4, psp_size=(1, 0)), ValueError, r"psp_size\[1\]: expected a positive integer, got 0"),
    (lambda: ak.APNB(8, 8, 4, 4)(torch.zeros(2, 8, 3)), ValueError, r"x: expected a feature map of shape \(B, C, H"),
    (lambda: ak.APNB(8, 8, 4, 4)(torch.zeros(2, 7, 3, 3)), ValueError, "x: expected 8 channels, got 7"),
    (lambda: ak.APNB(8, 8, 4, 4)(torch.zeros(2, 8, 0, 3)), ValueError, "x: expected at least one channel, row and"),
    (lambda: ak.APNB(8, 8, 4, 4)(torch.zeros(2, 8, 3, 3).double()), TypeError, "x: expected the dtype of the block"),
    (lambda: ak.APNB(8, 8, 4, 4)(torch.zeros(2, 8, 3, 3, device="meta")), ValueError, "x: expected the device of"),
    (lambda: ak.APNB(8, 8, 4, 4)([[1]]), TypeError, r"x: expected a torch\.Tensor, got list"),
    (
        lambda: ak.AFNB(4, 8, 8, 4, 4)(torch.zeros(2, 4, 3, 3), torch.zeros(3, 8, 3, 3)),
        ValueError,
        "high: expected the batch of low, 2, got 3",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD, ids=[message[:40] for _, _, message in BAD])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
