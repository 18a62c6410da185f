"""Decode heads of other code bases, replaced: the same function, objects and keys, at lower cost, or left alone."""

import copy
import pickle

import decode_heads
import pytest
import torch
import torch.distributed as dist
from decode_heads import ALL, IMAGE, parameters
from helpers import assert_as_accurate_as_plain, relative_error
from replacement_rule import assert_same_state, train
from torch import nn

import annnet_kernels as ak
from annnet_kernels.decode_heads import algebra
from annnet_kernels.interop.replace_heads import DIALECTS, ReplacedHead

pytestmark = pytest.mark.usefixtures("one_thread", "frozen_imports")
EXACT = 1e-11
SIZES = {4: [((13, 11), (7, 6), (4, 3), (2, 2)), ((8, 8), (4, 4), (2, 2), (1, 2)), ((5, 3), (5, 3), (2, 1), (1, 2))]}
"""Of the levels: odd, even, and some that are equal or smaller than every pool but one."""
SIZES[1] = [((7, 5),), ((2, 3),), ((12, 12),)]
THREE = ("SegFormer, pasted", "UPerNet, mmseg", "PSPNet, smp")
"""One of each family and code base, for what depends on neither size nor spelling."""
TRACED = ("SegFormer, transformers", "PSPNet, mmseg")
"""One head with projections and one with a pyramid and taps: tracing takes seconds."""


def replaced(head, **options):
    """A replaced twin of ``head``."""
    twin = copy.deepcopy(head)
    report = ak.replace_blocks(twin, image_size=IMAGE, **options)
    assert list(report.replaced) == [""], str(report)
    return twin


def quickly_replaced(head):
    """Without the comparison, where a test is one itself."""
    return replaced(head, verify=False)


def results(head, maps, seed=0):
    """Output, gradients and buffers of a call, whose dropout draws from ``seed``."""
    torch.manual_seed(seed)
    head.zero_grad()
    for x in maps:
        x.grad = None
    out = head(list(maps))
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    out.backward(upstream)
    leaves = {f"input {i}": x for i, x in enumerate(maps)} | dict(head.named_parameters())
    gradients = {name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()}
    return {"output": out.detach()} | gradients | {name: buffer.clone() for name, buffer in head.named_buffers()}


def assert_equal(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        close = relative_error(got[name], value) <= EXACT or (got[name] - value).abs().max() <= EXACT
        assert close, f"{name}: {relative_error(got[name], value):.1e}"


@pytest.mark.parametrize("head", parameters())
def test_everything_equals_the_original(head):
    plain = head.make()
    ours = replaced(plain)
    count = sum((height, width) != decode_heads.NO_SIZE for _, height, width in head.shapes)
    for sizes in [None] if count > 4 or head.shapes[0][1:] == (52, 44) else SIZES[count]:
        for training in (True, False):
            maps = head.maps(sizes=sizes)
            plain.train(training), ours.train(training)
            assert_equal(results(ours, maps), results(plain, maps))


@pytest.mark.parametrize("head", parameters())
def test_a_batch_of_one(head):
    """In training a pool of one pixel leaves batch norm a single value, which both refuse; PSPNet of smp has none."""
    plain, maps = head.make(), head.maps(batch=1)
    ours = quickly_replaced(plain)
    pools_to_one = any(isinstance(m, nn.AdaptiveAvgPool2d) and m.output_size in (1, (1, 1)) for m in plain.modules())
    if pools_to_one and any(isinstance(m, nn.BatchNorm2d) for m in plain.modules()) and head is not ALL["PSPNet, smp"]:
        for module in (plain, ours):
            with pytest.raises(ValueError, match="more than 1 value per channel"):
                module(list(maps))
    else:
        assert_equal(results(ours, maps), results(plain, maps))
    plain.eval(), ours.eval()
    ours.load_state_dict(plain.state_dict())
    assert_equal(results(ours, maps), results(plain, maps))


@pytest.mark.parametrize("head", parameters(*THREE))
@pytest.mark.parametrize("how", ["float32", "autocast"])
def test_as_accurate_as_plain(head, how):
    """In evaluation mode: behind a ReLU a gradient changes by chance, and the algebra has its own test."""

    def run(seed):
        exact = head.make().eval()
        plain = copy.deepcopy(exact).float()
        ours = quickly_replaced(plain)
        maps = [x.detach() for x in head.maps(dtype=torch.float32)]
        with torch.no_grad():
            truth = exact([x.double() for x in maps])
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
                found, expected = ours(list(maps)), plain(list(maps))
        assert found.dtype == expected.dtype
        return {"logits": found}, {"logits": expected}, {"logits": truth}

    assert_as_accurate_as_plain(run, torch.float32 if how == "float32" else torch.bfloat16)


@pytest.mark.parametrize("head", parameters(*THREE))
def test_a_whole_model_in_bfloat16(head):
    plain = head.make().eval().bfloat16()
    ours = quickly_replaced(plain)
    maps = [x.detach() for x in head.maps(dtype=torch.bfloat16)]
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()([x.double() for x in maps])
        assert relative_error(ours(list(maps)), exact) <= 1.5 * relative_error(plain(list(maps)), exact) + 1e-3


@pytest.mark.parametrize("head", parameters())
def test_training_through_replacement_equals_never_having_replaced(head):
    model, maps = nn.Sequential(head.make()), head.maps()
    untouched = copy.deepcopy(model)

    def loss(model):
        torch.manual_seed(1)
        return model(list(maps)).square().mean()

    state = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = train(loss, model, 1)
    assert list(ak.replace_blocks(model, verify=False, image_size=IMAGE).replaced) == ["0"]
    train(loss, model, 1, optimizer)
    assert list(ak.restore_blocks(model).replaced) == ["0"]
    train(loss, model, 1, optimizer)
    train(loss, untouched, 3)
    assert_same_state(model, untouched)
    ak.replace_blocks(model, verify=False, image_size=IMAGE)
    model.load_state_dict(state, strict=True)
    ak.restore_blocks(model)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


@pytest.mark.parametrize("head", parameters(*THREE))
def test_nothing_visible_changes(head):
    model = nn.Sequential(head.make())
    kind, seen = type(model[0]), []
    model[0].register_forward_hook(lambda *_: seen.append("head"))
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = {name: b.clone() for name, b in model.named_buffers()}
    objects = (
        [id(m) for m in model.modules()],
        {n: id(p) for n, p in model.named_parameters()},
        list(model.state_dict()),
    )
    attributes = set(vars(model[0]))
    state = torch.get_rng_state()
    ak.replace_blocks(model, image_size=IMAGE)
    assert torch.equal(torch.get_rng_state(), state)
    assert objects == (
        [id(m) for m in model.modules()],
        {n: id(p) for n, p in model.named_parameters()},
        list(model.state_dict()),
    )
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())
    assert isinstance(model[0], kind)
    assert type(model[0]) is not kind
    assert type(model[0]).__name__ == kind.__name__
    model(head.maps())
    assert seen == ["head"]
    assert all(norm.num_batches_tracked == 1 for norm in norms)
    ak.restore_blocks(model)
    assert type(model[0]) is kind
    assert set(vars(model[0])) == attributes


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("head", parameters("SegFormer, transformers", "PSPNet, mmseg"))
def test_copies_stay_replaced_and_can_be_restored(head, way):
    plain = head.make().eval()
    maps = head.maps()
    ours = quickly_replaced(plain)
    twin = way(ours)
    assert type(twin) is type(ours)
    torch.testing.assert_close(twin(list(maps)), plain(list(maps)))
    assert "at each level's resolution" in repr(twin)
    ak.restore_blocks(twin)
    assert type(twin) is type(plain)


def runs_plain(head, maps, monkeypatch):
    """Whether a replaced head runs its own forward."""
    called = []
    for name in ("_sum_of_resized",):
        original = getattr(algebra, name)
        monkeypatch.setattr(algebra, name, lambda *args, original=original: called.append(1) or original(*args))
    head(list(maps))
    monkeypatch.undo()
    return not called


def inner_convolution(head):
    """A module that the replacement reads without calling it."""
    dialect = next(dialect for dialect in DIALECTS if dialect.matches(head))
    return dialect.parts(head).join.conv


@pytest.mark.parametrize("head", parameters(*THREE))
def test_a_hook_inside_is_honoured(head, monkeypatch):
    plain, maps, seen = head.make().eval(), head.maps(), []
    inner_convolution(plain).register_forward_hook(lambda *_: seen.append(1))
    report = ak.replace_blocks(plain, image_size=IMAGE)
    assert "Conv2d carries forward hooks" in report.skipped[""], str(report)
    ours = quickly_replaced(head.make().eval())
    assert not runs_plain(ours, maps, monkeypatch)
    handle = inner_convolution(ours).register_forward_hook(lambda *_: seen.append(1))
    assert runs_plain(ours, maps, monkeypatch)
    assert seen == [1]
    assert "as written: Conv2d carries forward hooks" in repr(ours)
    handle.remove()
    assert not runs_plain(ours, maps, monkeypatch)


@pytest.mark.parametrize("head", parameters(*THREE))
def test_an_exchanged_module_is_called(head, monkeypatch):
    class Doubling(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    ours = quickly_replaced(head.make().eval())
    inner_convolution(ours).__class__ = Doubling
    assert runs_plain(ours, head.maps(), monkeypatch)


def test_tools_that_want_to_see_every_module_do():
    head = ALL["SegFormer, pasted"]
    plain = head.make().eval()
    ours, maps = quickly_replaced(plain), [x.detach() for x in head.maps()]
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module)))
    try:
        ours(list(maps))
    finally:
        handle.remove()
    assert seen.count(decode_heads.Projection) == 4
    traced = torch.jit.trace(ours, (maps,), check_trace=False)
    torch.testing.assert_close(traced(maps), plain(list(maps)))
    assert "upsample_bilinear2d" in str(traced.inlined_graph)
    stacked = [torch.stack([x, 2 * x]) for x in maps]
    torch.testing.assert_close(torch.vmap(lambda *x: ours(list(x)))(*stacked)[0], plain(list(maps)))


def test_other_arguments_reach_the_original_forward():
    head = ALL["SegFormer, pasted"]
    plain = head.make().eval()
    ours, maps = quickly_replaced(plain), head.maps()
    torch.testing.assert_close(ours(maps=list(maps)), plain(list(maps)))
    with pytest.raises(TypeError, match="forward"):
        ours()
    with pytest.raises(TypeError, match="other"):
        ours(list(maps), other=1)
    with pytest.raises(RuntimeError, match=r"dtype|type"):
        ours([x.float() for x in maps])


REFUSED = {
    "nearest": decode_heads.NearestSegFormerHead,
    "align_corners": decode_heads.AlignedSegFormerHead,
    "an activation": decode_heads.ActivatedSegFormerHead,
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_copy_that_differs_is_left_alone_with_the_number(kind):
    head = REFUSED[kind]()
    report = ak.replace_blocks(head, image_size=IMAGE)
    assert "computes something else: the output differs by" in report.skipped[""], str(report)
    assert type(head) is REFUSED[kind]


def test_levels_in_another_order_are_refused():
    head = decode_heads.ReversedSegFormerHead()
    head.linear_c2, head.linear_c3 = (decode_heads.Projection(9, 16) for _ in range(2))
    assert "computes something else" in ak.replace_blocks(head, image_size=IMAGE).skipped[""]


def test_a_head_that_gains_nothing_is_left_alone():
    head = decode_heads.PastedSegFormerHead(width=4)
    report = ak.replace_blocks(head, image_size=(512, 512))
    assert "gains nothing: " in report.skipped[""], str(report)
    assert "GFLOP at 512×512" in report.skipped[""]


def test_heads_can_be_left_alone():
    head = decode_heads.PastedSegFormerHead()
    assert "no heads that could be replaced" in str(ak.replace_blocks(head, heads=False))
    assert type(head) is decode_heads.PastedSegFormerHead
    with pytest.raises(TypeError, match="heads: expected a bool"):
        ak.replace_blocks(head, heads=1)
    with pytest.raises(ValueError, match=r"image_size\[1\]: expected a positive integer, got 0"):
        ak.replace_blocks(head, image_size=(512, 0))
    with pytest.raises(TypeError, match="image_size: expected a pair"):
        ak.replace_blocks(head, image_size=512)


def test_an_odd_structure_is_left_alone_and_named():
    head = decode_heads.PastedSegFormerHead()
    head.linear_fuse.conv = nn.Conv2d(64, 16, 3, padding=1, dilation=1, padding_mode="reflect")
    assert "no convolution over zeros that keeps the size" in ak.replace_blocks(head, image_size=IMAGE).skipped[""]
    head.linear_fuse = nn.Identity()
    assert "left" not in str(ak.replace_blocks(head, image_size=IMAGE).replaced)
    assert "Identity in the place of Conv2d" in ak.replace_blocks(head, image_size=IMAGE).skipped[""]


def test_the_report_counts_operations_as_derived_by_hand():
    head = decode_heads.PastedSegFormerHead(width=16, classes=5)
    report = ak.replace_blocks(nn.Sequential(head), verify=False, image_size=(64, 32))
    pixels = [16 * 8, 8 * 4, 4 * 2, 2 * 1]
    plain = sum(n * inputs * 16 for n, inputs in zip(pixels, decode_heads.WIDTHS, strict=True))
    plain += pixels[0] * 16 * (4 * 16 + 5)
    assert f"{2 * plain / 1e9:.3g} → " in report.replaced["0"]
    assert report.replaced["0"].endswith("GFLOP at 64×32)")


@pytest.mark.parametrize("name", ["SegFormer, pasted", "SegFormer, transformers 4"])
def test_memory_kept_for_backward(name):
    """At most 40 % of what the original keeps, at widths where its concatenation weighs as in practice."""
    head = ALL[name]
    plain = head.build(width=64).train()
    ours = quickly_replaced(plain)
    maps = [x.detach() for x in head.maps(dtype=torch.float32, sizes=((32, 32), (16, 16), (8, 8), (4, 4)))]

    def kept(module):
        own = {p.untyped_storage().data_ptr() for p in module.parameters()} | {
            x.untyped_storage().data_ptr() for x in maps
        }
        storages = {}

        def pack(x):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = module(list(maps))
        del out
        return sum(size for address, size in storages.items() if address not in own)

    assert kept(ours) <= 0.4 * kept(plain)


@pytest.mark.parametrize("head", parameters(*THREE, "SegFormer, smp", "SegFormer, transformers"))
def test_channels_last_comes_out_as_from_the_original(head):
    plain = head.make().eval()
    plain = plain.to(memory_format=torch.channels_last)
    ours = quickly_replaced(plain)
    maps = head.maps(layout=torch.channels_last)
    expected, got = plain(list(maps)), ours(list(maps))
    torch.testing.assert_close(got, expected)
    assert got.stride() == expected.stride()


@pytest.mark.parametrize("head", parameters(*TRACED))
def test_compiles_as_one_graph(head):
    ours = quickly_replaced(head.make())
    maps = head.maps()
    expected = results(copy.deepcopy(ours), maps)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    assert_equal({k.removeprefix("_orig_mod."): v for k, v in results(compiled, maps).items()}, expected)


@pytest.mark.parametrize("head", parameters(*TRACED))
def test_exports(head):
    ours = quickly_replaced(head.make().eval())
    maps = [x.detach() for x in head.maps()]
    program = torch.export.export(ours, (maps,))
    torch.testing.assert_close(program.module()(maps), ours(maps))


@pytest.mark.parametrize("head", parameters(*TRACED))
def test_exports_to_onnx(head, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    ours = quickly_replaced(head.make().eval().float())
    maps = [x.detach() for x in head.maps(dtype=torch.float32)]
    path = tmp_path / "head.onnx"
    torch.onnx.export(ours, (maps,), path, verbose=False)
    session = runtime.InferenceSession(str(path))
    feed = {given.name: x.numpy() for given, x in zip(session.get_inputs(), maps, strict=True)}
    (found,) = session.run(None, feed)
    torch.testing.assert_close(torch.from_numpy(found), ours(maps), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", parameters(*THREE))
def test_wrapped_in_ddp_with_synchronised_norms(head, tmp_path):
    """SyncBatchNorm runs on a CPU in evaluation only, where a process group exists; DDP trains ordinary norms."""
    plain, maps = head.make(), head.maps()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        ours = nn.parallel.DistributedDataParallel(quickly_replaced(plain))
        assert_equal(
            {k.removeprefix("module."): v for k, v in results(ours, maps).items()},
            results(plain, maps),
        )
    finally:
        dist.destroy_process_group()
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(plain))
    report = ak.replace_blocks(synchronised, image_size=IMAGE)
    assert list(report.replaced) == [""], str(report)
    plain.eval(), synchronised.eval()
    assert_equal(results(synchronised, maps), results(plain, maps))
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(quickly_replaced(plain))
    assert isinstance(converted, ReplacedHead)
    assert_equal(results(converted, maps), results(plain, maps))


@pytest.mark.parametrize("head", [ALL["SegFormer, transformers 4"], *parameters("SegFormer, transformers")])
def test_a_last_stage_left_as_tokens(head):
    """transformers' ``reshape_last_stage=False``: the side of the map is the root of the channel count, as it is."""
    plain = head.make().eval()
    if hasattr(plain, "config"):
        plain.config.reshape_last_stage = False
    plain = copy.deepcopy(plain)
    levels = plain.linear_c if hasattr(plain, "linear_c") else plain.linear_projections
    levels[3].proj = nn.Linear(16, levels[3].proj.out_features).double()
    maps = [*(x.detach() for x in head.maps()[:3]), torch.randn(2, 16, 16, dtype=torch.float64)]
    torch.testing.assert_close(quickly_replaced(plain)(list(maps)), plain(list(maps)), rtol=EXACT, atol=EXACT)


@pytest.mark.skipif(not decode_heads.installed("mmseg"), reason="mmsegmentation is not installed")
def test_mmsegmentations_segformer_head_is_left_alone():
    head = decode_heads._mmseg("SegformerHead", list(decode_heads.WIDTHS), [0, 1, 2, 3])
    assert "a norm and an activation per level" in ak.replace_blocks(head).skipped[""]
    concatenating = decode_heads._mmseg("PSPHead", [8, 12], [0, 1], input_transform="resize_concat")
    assert "input_transform is 'resize_concat'" in ak.replace_blocks(concatenating).skipped[""]


def test_every_dialect_has_a_head_here():
    covered = {head.dialect for head in ALL.values()}
    for dialect in DIALECTS:
        name = f"{dialect.family}, {dialect.code}"
        assert any(name.startswith(known) for known in covered) or name == "SegFormer, mmsegmentation", name
