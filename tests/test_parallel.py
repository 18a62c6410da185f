"""Row shards over gloo processes equal the unsplit published block: outputs, gradients, statistics, bytes."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
from helpers import assert_as_accurate_as_plain
from row_shards_rule import (
    CANCELLED,
    CLASSES,
    Messages,
    assert_close,
    bands,
    build,
    draw,
    joined,
    sharded_step,
    step,
    uneven,
)

import annnet_kernels as ak
from annnet_kernels.parallel.row_shards import Band

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
