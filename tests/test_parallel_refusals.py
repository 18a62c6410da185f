"""Row shards that cannot go on, that other tools wrap, that are undone, or that are refused."""

import copy
import pickle

import fresh
import pytest
import torch
import torch.distributed as dist
from row_shards_rule import (
    CLASSES,
    assert_close,
    bands,
    build,
    draw,
    joined,
    step,
    uneven,
)
from torch import nn

import annnet_kernels as ak
from annnet_kernels.parallel import row_shards
from annnet_kernels.reference import PlainAPNB


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
    output = fresh.python(code)
    assert output.returncode == 0, output.stderr
