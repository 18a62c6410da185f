"""AFNB and APNB against the plain blocks, and the plain blocks against the float64 truth."""

import copy
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from helpers import FACTOR, FLOOR, assert_as_accurate_as_plain
from torch import nn

import annnet_kernels as ak
from annnet_kernels.reference import PlainAFNB, PlainAPNB, truth
from annnet_kernels.reference.blocks import AttentionStage


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The maps are tiny: waking a second thread costs more than it computes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LOW, HIGH, OUT, KEY, VALUE = 12, 20, 16, 10, 6
MAPS = {"AFNB": [(2, LOW, 13, 9), (2, HIGH, 9, 17)], "APNB": [(2, HIGH, 9, 17)]}
CLASSES = {"AFNB": (ak.AFNB, PlainAFNB, (LOW, HIGH, OUT)), "APNB": (ak.APNB, PlainAPNB, (HIGH, OUT))}


def build(kind, dropout=0.0, **options):
    """A plain block with random values wherever a fresh one has zeros or ones, and its fused twin, in float64."""
    fused_class, plain_class, channels = CLASSES[kind]
    plain = plain_class(*channels, KEY, VALUE, dropout=dropout, **options).double()
    randomise(plain)
    fused = fused_class(*channels, KEY, VALUE, dropout=dropout, **options).double()
    fused.load_state_dict(plain.state_dict())
    return fused, plain


def randomise(block):
    """A published block starts with W = 0, which multiplies the attention away: nothing would be tested."""
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.5 + (1.0 if name.endswith("weight") else 0.0))
        for stage in block.stages:
            nn.init.normal_(stage.W.weight, std=VALUE**-0.5)
        for name, buffer in block.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)


def draw_maps(kind, layout=torch.contiguous_format, enlarge=1):
    shapes = [(b, c, enlarge * h, enlarge * w) for b, c, h, w in MAPS[kind]]
    return [torch.randn(shape, dtype=torch.float64).to(memory_format=layout) for shape in shapes]


def results(block, maps, weights):
    """Output, every gradient and every buffer of one call with a fixed weighting of the output."""
    inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in maps]
    block.zero_grad()
    out = block(*inputs)
    (out * weights.to(out.dtype)).sum().backward()
    found = {"out": out.detach()}
    found |= {f"grad input {i}": x.grad for i, x in enumerate(inputs)}
    found |= {f"grad {name}": p.grad for name, p in block.named_parameters() if p.grad is not None}
    found |= {name: b for name, b in block.named_buffers()}
    return found


def assert_same(got, want, tolerance=1e-9):
    assert got.keys() == want.keys()
    for name, expected in want.items():
        scale = max(float(expected.double().norm()), 1e-2)  # gradients that cancel to zero compare absolutely
        difference = float((got[name].double() - expected.double()).norm())
        assert difference <= tolerance * scale, f"{name}: differs by {difference:.2e}, norm {scale:.2e}"


def output_weights(kind, layout=torch.contiguous_format, enlarge=1):
    height, width = MAPS[kind][-1][2:]
    return torch.randn(2, OUT, enlarge * height, enlarge * width, dtype=torch.float64).to(memory_format=layout)


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


@pytest.mark.parametrize("bottleneck", [True, False], ids=["bottleneck", "context"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", CLASSES)
def test_as_accurate_as_plain(kind, precision, layout, bottleneck):
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


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "channels_last"])
def test_memory_format_is_kept(kind, layout):
    fused, _ = build(kind)
    fused.to(memory_format=layout)
    out = fused(*draw_maps(kind, layout))
    assert out.is_contiguous(memory_format=layout)


# ----------------------------------------------------------------------------------------------- being a good module


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


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", CLASSES)
def test_shapes_follow_without_data(kind, training):
    """On the meta device, for which PyTorch has no autocast to ask about."""
    fused, plain = build(kind)
    shapes = []
    for block in (fused, plain):
        block.to("meta").train(training)
        shapes.append(block(*(x.to("meta") for x in draw_maps(kind))).shape)
    assert shapes[0] == shapes[1]


def hook(block):
    block.stages[0].f_value.register_forward_hook(lambda module, args, out: out * 2)


def pre_hook(block):
    block.stages[0].f_key.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def old_weight_norm(block):
    torch.nn.utils.weight_norm(block.stages[0].W)


def other_class(block):
    block.stages[0].f_value = nn.Sequential(nn.Conv2d(*block.stages[0].f_value.weight.shape[1::-1], 1), nn.Tanh())


def other_forward(block):
    block.stages[0].W.forward = lambda x: torch.zeros(x.shape[0], OUT, *x.shape[2:], dtype=x.dtype)


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


@pytest.mark.parametrize(
    "change",
    [
        hook,
        pre_hook,
        old_weight_norm,
        other_class,
        other_forward,
        other_container,
        other_stage,
        longer_projection,
        longer_norm,
    ],
)
@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.filterwarnings("ignore:.*weight_norm")
def test_a_changed_inner_module_is_called_and_named(kind, change):
    fused, plain = build(kind)
    for block in (fused, plain):
        torch.manual_seed(1)
        change(block)
        block.double()
    assert "published forward, because of" in repr(fused)
    maps = draw_maps(kind)
    assert torch.equal(fused(*maps), plain(*maps))


class Counted(nn.Module):
    calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight * 2


@pytest.mark.parametrize("name", ["f_value", "W"])
def test_a_parametrization_runs_once_a_forward(name):
    block, _ = build("AFNB")
    counted = Counted()
    torch.nn.utils.parametrize.register_parametrization(getattr(block.stages[0], name), "weight", counted)
    counted.calls = 0
    block(*draw_maps("AFNB"))
    assert counted.calls == 1


@pytest.mark.parametrize("kind", CLASSES)
def test_parametrizations_are_honoured(kind):
    fused, plain = build(kind)
    for block in (fused, plain):
        torch.nn.utils.parametrizations.weight_norm(block.stages[0].W)
    plain.load_state_dict(fused.state_dict())
    assert "collapsed" in fused.extra_repr()
    maps = draw_maps(kind)
    torch.testing.assert_close(fused(*maps), plain(*maps))


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
