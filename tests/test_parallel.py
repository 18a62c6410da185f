"""Row shards over gloo processes equal the unsplit published block: outputs, gradients, statistics, errors, bytes."""

import copy
import pickle
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from gloo_pool import Pool
from helpers import assert_as_accurate_as_plain
from torch import nn

import annnet_kernels as ak
from annnet_kernels import row_shards
from annnet_kernels.reference import PlainAFNB, PlainAPNB
from annnet_kernels.row_shards import Band

CLASSES = {"AFNB": (ak.AFNB, PlainAFNB, (5, 6, 7)), "APNB": (ak.APNB, PlainAPNB, (6, 7))}
CANCELLED = ("f_key.0.bias", "f_query.0.bias", "f_value.bias", "W.bias", "conv_bn_dropout.0.bias")
"""Ahead of batch statistics: their gradients are zero."""


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    processes = Pool(tmp_path_factory.mktemp("pool"))
    yield processes
    processes.close()


@pytest.fixture
def alone():
    """A group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def build(kind, fused, dropout=0.0, norm="batch", key_channels=4, value_channels=3, **options):
    """A block with random parameters and running statistics, the same in every process."""
    fused_class, plain_class, channels = CLASSES[kind]
    state = torch.get_rng_state()
    torch.manual_seed(5)
    block = (fused_class if fused else plain_class)(*channels, key_channels, value_channels, dropout, **options)
    for name, parameter in block.named_parameters():
        if parameter.dim() == 1 or ".W." in name:
            nn.init.normal_(parameter)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            module.train(norm != "frozen")
    torch.set_rng_state(state)
    return nn.SyncBatchNorm.convert_sync_batchnorm(block) if norm == "sync" and fused else block


def draw(kind, dtype=torch.float64, low=(19, 10), high=(13, 9), batch=2):
    """Maps of both levels, and the weights of the loss."""
    shapes = {"AFNB": [(5, *low), (6, *high)], "APNB": [(6, *high)]}[kind]
    maps = [torch.randn(batch, *shape, dtype=torch.float64).to(dtype) for shape in shapes]
    return maps, torch.randn(batch, 7, *high, dtype=torch.float64).to(dtype)


def uneven(height, size):
    """As many heights as there are processes, the first 1."""
    rest = torch.tensor_split(torch.arange(height - 1), size - 1)
    sizes = [1, *(len(part) for part in rest)]
    if size > 2:
        sizes[1], sizes[2] = sizes[1] - 1, sizes[2] + 1
    return sizes


def bands(maps, rows, rank):
    """The part of each map that ``rank`` holds."""
    return [x.split(heights, dim=2)[rank] for x, heights in zip(maps, rows, strict=True)]


def step(block, maps, weights, autocast=None):
    """Output and gradients of one training step, and the buffers after it."""
    inputs = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in maps]
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        out = block(*inputs)
    (out * weights).sum().backward()
    found = {"out": out.detach()} | {f"input {i}": x.grad for i, x in enumerate(inputs)}
    found |= {f"grad {name}": p.grad for name, p in block.named_parameters()}
    return found | {name: b.clone() for name, b in block.named_buffers()}


def sharded_step(group, kind, options, maps, weights, rows, autocast=None, seed=0):
    rank = dist.get_rank(group)
    block = ak.parallel.shard_rows(build(kind, fused=True, **options).to(maps[0].dtype), group)
    torch.manual_seed(seed + rank)
    return step(block, bands(maps, rows, rank), bands([weights], rows[-1:], rank)[0], autocast)


def joined(parts):
    """The whole from what each process found: maps side by side, parameter gradients summed, statistics alike."""
    whole = {}
    for name, first in parts[0].items():
        if name == "out" or name.startswith("input"):
            whole[name] = torch.cat([part[name] for part in parts], dim=2)
        elif name.startswith("grad"):
            whole[name] = torch.stack([part[name] for part in parts]).sum(0)
        else:
            assert all(torch.equal(part[name], first) for part in parts), f"{name} differs between processes"
            whole[name] = first
    return whole


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


CASES = {
    "as published": {},
    "no bottleneck": {"bottleneck": False},
    "wide keys": {"key_channels": 9, "value_channels": 2},
    "few bins": {"psp_size": ((2, 3), 5)},
    "more bins than rows": {"psp_size": (1, 20)},
    "frozen": {"norm": "frozen"},
    "dropout": {"dropout": 0.5},
    "frozen, dropout": {"norm": "frozen", "dropout": 0.5},
    "recompute": {"recompute": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("kind", "size"), [("AFNB", 2), ("APNB", 3)])
def test_row_shards_train_as_the_unsplit_block(kind, size, case, pool):
    options = CASES[case]
    maps, weights = draw(kind)
    if size == 3:
        maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    rows = [uneven(x.shape[2], size) for x in maps]
    found = joined(pool.run(size, sharded_step, kind, options, maps, weights, rows, None, 11))
    plain = build(kind, fused=False, **{name: o for name, o in options.items() if name != "recompute"}).double()
    torch.manual_seed(11)  # the draw of the group's first process
    assert_close(found, step(plain, maps, weights))


@pytest.mark.parametrize(
    ("kind", "dtype", "autocast"),
    [
        ("AFNB", torch.float32, None),
        ("APNB", torch.float32, None),
        ("AFNB", torch.bfloat16, None),
        ("APNB", torch.float32, torch.bfloat16),
    ],
)
def test_row_shards_are_as_accurate_as_the_unsplit_block(kind, dtype, autocast, alone):
    """Of one process: rows are rounded and added up there too, and many draws take little time.

    Of 117 pixels a few lie within rounding of a ReLU's zero or none does, and medians of such errors scatter by 2.
    """

    def run(seed):
        maps, weights = draw(kind, dtype, low=(38, 20), high=(39, 27))
        ours = step(ak.parallel.shard_rows(build(kind, fused=True).to(dtype)), maps, weights, autocast)
        plain = step(build(kind, fused=False).to(dtype), maps, weights, autocast)
        exact = build(kind, fused=False).to(dtype).double()
        truth = step(exact, [x.double() for x in maps], weights.double())
        kept = [name for name in truth if not name.endswith(CANCELLED) and "num_batches" not in name]
        return tuple({name: found[name] for name in kept} for found in (ours, plain, truth))

    assert_as_accurate_as_plain(run, autocast or dtype, seeds=11)


def sharded_evaluation(group, kind, options, maps, rows):
    messages = []
    block = ak.parallel.shard_rows(build(kind, fused=True, **options).double().eval(), group)
    with Messages(messages), torch.inference_mode():
        out = block(*bands(maps, rows, dist.get_rank(group)))
    return out.clone(), messages


@pytest.mark.parametrize("bottleneck", [True, False])
@pytest.mark.parametrize("kind", CLASSES)
def test_evaluation_takes_one_message(kind, bottleneck, pool):
    maps, _ = draw(kind)
    rows = [uneven(x.shape[2], 3) for x in maps]
    answers = pool.run(3, sharded_evaluation, kind, {"bottleneck": bottleneck, "dropout": 0.5}, maps, rows)
    expected = build(kind, fused=False, bottleneck=bottleneck).double().eval()(*maps)
    torch.testing.assert_close(torch.cat([out for out, _ in answers], dim=2), expected.detach())
    assert [len(messages) for _, messages in answers] == [1, 1, 1]


class Messages:
    """Collects the bytes of every all-reduce."""

    def __init__(self, sizes):
        self.sizes = sizes

    def __enter__(self):
        self.real = dist.all_reduce

        def counted(tensor, *args, **kwargs):
            self.sizes.append(tensor.nbytes)
            return self.real(tensor, *args, **kwargs)

        dist.all_reduce = counted

    def __exit__(self, *_):
        dist.all_reduce = self.real


def counted_step(group, kind, options, dtype, maps, weights, rows):
    messages = []
    rank = dist.get_rank(group)
    with Messages(messages):
        sharded_step(group, kind, options, maps, weights, rows)
    block = build(kind, fused=True, **options).to(dtype)
    return messages, ak.parallel.traffic(block, len(maps[0])), rank


@pytest.mark.parametrize("options", [{}, {"norm": "frozen", "dropout": 0.1}, {"bottleneck": False}, {"dropout": 0.1}])
@pytest.mark.parametrize(("kind", "dtype"), [("AFNB", torch.float64), ("APNB", torch.float32)])
def test_the_bytes_of_a_step_are_those_of_the_formula_whatever_the_map(kind, dtype, options, pool):
    for scale, size in ((1, 2), (3, 3)):
        maps, weights = draw(kind, dtype, low=(8 * scale, 7 * scale), high=(9 * scale, 11 * scale))
        rows = [uneven(x.shape[2], size) for x in maps]
        for messages, expected, _ in pool.run(size, counted_step, kind, options, dtype, maps, weights, rows):
            assert (len(messages), sum(messages)) == expected


def test_the_bytes_of_the_published_blocks():
    assert ak.parallel.traffic(ak.AFNB(1024, 2048, 2048, 256, 256)) == (6, 1_196_056)
    assert ak.parallel.traffic(ak.APNB(512, 512, 256, 256)) == (6, 696_336)
    assert ak.parallel.traffic(ak.APNB(512, 512, 256, 256).eval(), 8, backward=False) == (1, 8 * 337_920)


def replicated_step(group, kind, norm, maps, weights, rows):
    """On a mesh of two replicas × two bands, in DDP over all four processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.nn.parallel import DistributedDataParallel

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "rows"))
    replica, rank = mesh.get_coordinate()
    block = ak.parallel.shard_rows(build(kind, fused=True, norm=norm).double(), mesh["rows"])
    wrapped = block if norm == "sync" else DistributedDataParallel(block)  # DDP refuses a SyncBatchNorm on a CPU
    mine = [x.chunk(2)[replica] for x in maps]
    found = step(wrapped, bands(mine, rows, rank), bands([weights.chunk(2)[replica]], rows[-1:], rank)[0])
    return {name.replace("module.", ""): value for name, value in found.items()}


@pytest.mark.parametrize("kind", CLASSES)
def test_data_parallel_over_replicas_and_rows(kind, pool):
    maps, weights = draw(kind)
    rows = [uneven(x.shape[2], 2) for x in maps]
    found = pool.run(4, replicated_step, kind, "batch", maps, weights, rows)
    plain = build(kind, fused=False).double()
    twins = plain, copy.deepcopy(plain)
    parts = [step(twin, [x.chunk(2)[i] for x in maps], weights.chunk(2)[i]) for i, twin in enumerate(twins)]
    for name, value in parts[0].items():
        if name.startswith("grad"):
            for process in found:
                torch.testing.assert_close(4 * process[name], value + parts[1][name], rtol=1e-8, atol=1e-10, msg=name)
        elif name == "out" or name.startswith("input"):
            for i, part in enumerate(parts):
                torch.testing.assert_close(torch.cat([found[2 * i][name], found[2 * i + 1][name]], dim=2), part[name])


@pytest.mark.parametrize("kind", CLASSES)
def test_a_synchronised_norm_asks_all_replicas(kind, pool):
    maps, weights = draw(kind)
    rows = [uneven(x.shape[2], 2) for x in maps]
    found = pool.run(4, replicated_step, kind, "sync", maps, weights, rows)
    expected = step(build(kind, fused=False).double(), maps, weights)
    for name, value in expected.items():
        if name.startswith("grad"):
            result = sum(process[name] for process in found)
        elif name == "out" or name.startswith("input"):
            result = torch.cat([torch.cat([found[i][name], found[i + 1][name]], dim=2) for i in (0, 2)])
        else:
            result = found[3][name]
        torch.testing.assert_close(result, value, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def wrong_calls(group):
    """What each process raises when one of them is not like the others, and that the next call works."""
    rank = dist.get_rank(group)
    block = ak.parallel.shard_rows(build("AFNB", fused=True), group)

    def maps(rows=4, batch=2, width=5, high_width=6, channels=5):
        return torch.randn(batch, channels, rows, width), torch.randn(batch, 6, 3, high_width)

    odd = rank == 1
    calls = {
        "width": lambda: block(*maps(width=5 + odd)),
        "high-level": lambda: block(*maps(high_width=5 + odd)),
        "batch": lambda: block(*maps(batch=2 + odd)),
        "no row": lambda: block(*maps(rows=0 if odd else 4)),
        "channels": lambda: block(*maps(channels=5 + odd)),
        "count": lambda: block(*maps()[: 1 if odd else 2]),
        "dtype": lambda: block(*(x.double() if odd else x for x in maps())),
        "gradients": lambda: call_without_gradients(block, maps(), odd),
        "mode": lambda: block.train(not odd)(*maps()),
        "dropout": lambda: call_with_dropout(block.train(), maps(), odd),
        "hook": lambda: call_with_hook(block.train(), maps(), odd),
        "broken": lambda: call_without_value(block.train(), maps(), odd),
    }
    errors = {}
    for name, call in calls.items():
        try:
            call()
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    return errors, block.train()(*maps()).shape


def call_without_gradients(block, maps, off):
    with torch.set_grad_enabled(not off):
        return block(*maps)


def call_with_dropout(block, maps, dropping):
    dropout = block.conv_bn_dropout[2]
    dropout.p = 0.5 * dropping
    try:
        return block(*maps)
    finally:
        dropout.p = 0.0


def call_with_hook(block, maps, hooked):
    handle = block.stages[0].f_value.register_forward_hook(lambda *_: None) if hooked else None
    try:
        return block(*maps)
    finally:
        if handle is not None:
            handle.remove()


def call_without_value(block, maps, broken):
    stage = block.stages[0]
    value = stage.f_value
    if broken:
        del stage.f_value
    try:
        return block(*maps)
    finally:
        stage.f_value = value


def test_maps_that_do_not_fit_raise_in_every_process(pool):
    (first, shape), (second, _) = pool.run(2, wrong_calls)
    assert shape == (2, 7, 3, 6)
    everywhere = {
        "width": "ValueError: width: expected the same on all processes of the group, got [5, 6]",
        "high-level": "ValueError: width of the high-level map: expected the same on all processes of the group",
        "batch": "ValueError: batch: expected the same on all processes of the group, got [2, 3]",
        "gradients": "ValueError: gradients: expected the same",
        "mode": "ValueError: mode: expected the same on all processes of the group, got [7, 0]",
        "dropout": "ValueError: mode: expected the same on all processes of the group, got [7, 15]",
    }
    own = {
        "no row": "ValueError: low: expected at least one channel, row and column",
        "channels": "ValueError: low: expected 5 channels, got 6",
        "count": "TypeError: missing a required argument: 'high'",
        "dtype": "TypeError: low: expected the dtype of the block's parameters",
        "hook": "ValueError: the block can no longer run on row shards, because of Conv2d carries forward hooks",
        "broken": "ValueError: the block can no longer run on row shards, because of ",
    }
    for name, message in everywhere.items():
        assert first[name].startswith(message), first[name]
        assert second[name].startswith(message), second[name]
    for name, message in own.items():
        assert second[name].startswith(message), second[name]
        assert first[name] == "RuntimeError: rank 1 of the group cannot go on; its own error says why"
    assert first.keys() == second.keys() == everywhere.keys() | own.keys()


def empty_batch(group):
    block = ak.parallel.shard_rows(build("APNB", fused=True), group)
    out = block(torch.randn(0, 6, 3, 4, requires_grad=True))
    out.sum().backward()
    return out, dict(block.named_buffers()), [p.grad for p in block.parameters()]


def test_a_batch_of_nothing_trains_as_published(pool):
    plain = build("APNB", fused=False)
    out = plain(torch.randn(0, 6, 3, 4, requires_grad=True))
    out.sum().backward()
    expected = out, dict(plain.named_buffers()), [p.grad for p in plain.parameters()]
    for found in pool.run(2, empty_batch):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", CLASSES)
def test_one_value_has_no_batch_statistics(kind, alone):
    maps = [torch.randn(1, channels, 1, 1) for channels in CLASSES[kind][2][:-1]]
    block = build(kind, fused=True)
    for module in (block, ak.parallel.shard_rows(block)):
        with pytest.raises(ValueError, match="expected more than one value per channel"):
            module(*maps)
    assert block.eval()(*maps).shape == (1, 7, 1, 1)


def fully_sharded_step(group, maps, weights, rows):
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    rank = dist.get_rank(group)
    block = ak.parallel.shard_rows(build("AFNB", fused=True).double(), group)
    fully_shard(block, mesh=DeviceMesh.from_group(group, "cpu"))
    found = step(block, bands(maps, rows, rank), bands([weights], rows[-1:], rank)[0])
    found = {name: value.full_tensor() if name.startswith("grad") else value for name, value in found.items()}
    with pytest.raises(ValueError, match="FSDPAFNB was wrapped after it was sharded"):
        ak.parallel.unshard_rows(block)
    return found


def test_fully_sharded_parameters(pool):
    maps, weights = draw("AFNB")
    rows = [uneven(x.shape[2], 2) for x in maps]
    found = joined(pool.run(2, fully_sharded_step, maps, weights, rows))
    assert_close(found, step(build("AFNB", fused=False).double(), maps, weights))  # a mean over two, summed twice


def compiled_step(group, maps, weights, rows):
    rank = dist.get_rank(group)
    block = ak.parallel.shard_rows(build("APNB", fused=True).double(), group)
    model = torch.compile(nn.Sequential(nn.ReLU(), block), backend="eager")
    return step(model, bands(maps, rows, rank), bands([weights], rows, rank)[0])


def test_compiled_code_leaves_a_sharded_block_alone(pool):
    maps, weights = draw("APNB")
    rows = [uneven(x.shape[2], 2) for x in maps]
    found = joined(pool.run(2, compiled_step, maps, weights, rows))
    expected = step(nn.Sequential(nn.ReLU(), build("APNB", fused=False).double()), maps, weights)
    assert_close({name.replace("_orig_mod.", ""): value for name, value in found.items()}, expected)


@pytest.mark.parametrize("sizes", [(1, 3, 6, 8), (2, 5), ((1, 4), (7, 2)), (20,)])
def test_bands_of_any_heights_add_up_to_the_tokens(sizes):
    height, width = (int(n) for n in torch.randint(3, 25, (2,)))
    heights, widths = zip(*(size if isinstance(size, tuple) else (size, size) for size in sizes), strict=True)
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    bad = [int(torch.randint(0, n, ())) for n in (height, width)]
    x[0, 0, bad[0], bad[1]] = torch.inf
    cuts = sorted({0, height, *torch.randint(1, height, (3,)).tolist()})
    total, spread = 0, []
    weights = torch.randn(2, 3, sum(h * w for h, w in zip(heights, widths, strict=True)), dtype=torch.float64)
    for top, bottom in pairwise(cuts):
        band = Band(top, bottom - top, height, heights, widths)
        lines = torch.ops.annnet.pyramid_pool(x[:, :, top:bottom], None, *band.row_sizes)
        total = total + band.add_rows(lines.transpose(1, 2))
        back = band.spread(weights.transpose(1, 2)).transpose(1, 2)
        spread.append(
            torch.ops.annnet.pyramid_pool_bwd(back, None, [bottom - top, width], *band.row_sizes, False, None)
        )
    whole = torch.ops.annnet.pyramid_pool(x, None, heights, widths)
    torch.testing.assert_close(total.transpose(1, 2), whole)
    assert whole.isinf().any()
    assert not whole.isinf().all() or heights == widths == (1,)
    expected = torch.ops.annnet.pyramid_pool_bwd(weights, None, [height, width], heights, widths, False, None)
    torch.testing.assert_close(torch.cat(spread, dim=2), expected)


def test_sharding_is_undone(alone):
    model = nn.Sequential(ak.APNB(6, 6, 4, 3), PlainAPNB(6, 6, 4, 3)).double()
    ak.replace_blocks(model)
    blocks, classes = list(model), [type(block) for block in model]
    state = copy.deepcopy(model.state_dict())
    x = torch.randn(1, 6, 5, 7, dtype=torch.float64)
    expected = model.eval()(x)
    assert ak.parallel.shard_rows(model) is model
    assert list(model) == blocks
    assert all(isinstance(block, kind) for block, kind in zip(blocks, classes, strict=True))
    assert all("collapsed, rank 0 of 1 row shards" in repr(block) for block in blocks)
    assert model.state_dict().keys() == state.keys()
    twin = copy.deepcopy(model)
    assert [type(block) for block in twin] == [type(block) for block in model] != classes
    torch.testing.assert_close(twin(x), expected)
    with pytest.raises(TypeError, match="not pickled: save its state dict"):
        pickle.dumps(model[0])
    with pytest.raises(ValueError, match="0 is sharded already"):
        ak.parallel.shard_rows(model)
    assert ak.parallel.unshard_rows(model) is model
    assert [type(block) for block in model] == classes
    assert "row shards" not in repr(model)
    assert not any("_rows" in vars(block) for block in model)
    torch.testing.assert_close(model(x), expected)


def test_a_fold_is_not_used(alone):
    block = ak.parallel.shard_rows(build("AFNB", fused=True).eval())
    ak.fold_for_inference(block)
    maps, _ = draw("AFNB", torch.float32)
    with torch.no_grad():
        before = block(*maps)
        assert block.current_fold() is None
        ak.parallel.unshard_rows(block)
        assert block.current_fold() is not None
        torch.testing.assert_close(block(*maps), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("recompute", "calls"), [(False, 1), (True, 2)])
def test_recomputing_attends_once_more(recompute, calls, alone, monkeypatch):
    made = []
    real = row_shards.Rows.attend
    monkeypatch.setattr(row_shards.Rows, "attend", lambda *operands: made.append(None) or real(*operands))
    block = ak.parallel.shard_rows(build("AFNB", fused=True, recompute=recompute))
    step(block, *draw("AFNB", torch.float32))
    assert len(made) == calls


def hooked():
    block = ak.APNB(6, 7, 4, 3)
    block.stages[0].W.register_forward_hook(lambda *_: None)
    return block


class OwnForward(ak.APNB):
    def forward(self, x):
        return 2 * super().forward(x)


def patched():
    block = ak.APNB(6, 7, 4, 3)
    block.forward = block.forward
    return block


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (lambda: nn.Conv2d(3, 3, 1), "expected an AFNB or APNB, or a module that holds one, got Conv2d"),
        (lambda: nn.Sequential(PlainAPNB(6, 7, 4, 3)), "0 runs PlainAPNB's own forward; replace_blocks first"),
        (
            lambda: ak.APNB(6, 7, 4, 3, norm_layer=lambda c: nn.GroupNorm(1, c)),
            "GroupNorm in the place of a batch norm",
        ),
        (hooked, "the module cannot be sharded, because of Conv2d carries forward hooks"),
        (lambda: OwnForward(6, 7, 4, 3), "the module cannot be sharded, because of a forward of its own"),
        (patched, "the module cannot be sharded, because of a forward of its own"),
    ],
)
def test_what_cannot_be_sharded_is_named(module, message, alone):
    with pytest.raises(ValueError, match=message):
        ak.parallel.shard_rows(module())


def test_a_refused_block_leaves_the_others_as_they_were(alone):
    model = nn.Sequential(ak.APNB(6, 6, 4, 3), hooked())
    with pytest.raises(ValueError, match="1 cannot be sharded"):
        ak.parallel.shard_rows(model)
    assert type(model[0]) is ak.APNB


def test_a_group_is_asked_for():
    with pytest.raises(RuntimeError, match="there is no process group; call"):
        ak.parallel.shard_rows(ak.APNB(6, 7, 4, 3))


def test_what_is_no_group_is_named(alone):
    from torch.distributed.device_mesh import init_device_mesh

    block = ak.APNB(6, 7, 4, 3)
    with pytest.raises(ValueError, match="expected a one-dimensional mesh"):
        ak.parallel.shard_rows(block, init_device_mesh("cpu", (1, 1)))
    with pytest.raises(TypeError, match="expected a ProcessGroup, a DeviceMesh or None, got int"):
        ak.parallel.shard_rows(block, 1)
    with pytest.raises(ValueError, match="this process is not in it"):
        ak.parallel.shard_rows(block, dist.GroupMember.NON_GROUP_MEMBER)


def foreign_norm(group):
    """A SyncBatchNorm that asks only a part of the processes that share a map."""
    own = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    block = nn.SyncBatchNorm.convert_sync_batchnorm(build("APNB", fused=True), own)
    with pytest.raises(ValueError, match="a SyncBatchNorm that leaves out processes of the group"):
        ak.parallel.shard_rows(block, group)


def test_a_norm_of_fewer_processes_is_refused(pool):
    pool.run(2, foreign_norm)


def test_importing_the_package_does_not_import_this():
    code = (
        "import sys, annnet_kernels as ak; assert 'annnet_kernels.parallel' not in sys.modules; ak.parallel.shard_rows"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
