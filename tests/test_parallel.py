"""Row shards over gloo processes equal the unsplit published block: outputs, gradients, statistics, errors, bytes."""

import io
import multiprocessing
import traceback
from datetime import timedelta

import pytest
import torch
from torch import nn

import annnet_kernels as ak
from annnet_kernels.reference import PlainAFNB, PlainAPNB
from helpers import FACTOR, FLOOR, SEEDS, relative_error

CLASSES = {"AFNB": (ak.AFNB, PlainAFNB, (5, 6, 7)), "APNB": (ak.APNB, PlainAPNB, (6, 7))}
ANSWER_SECONDS = 60


class Group:
    """Gloo processes that run functions of this module; they start once for all tests of a size."""

    def __init__(self, size, folder):
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(size)]
        self.pipes = [mine for mine, _ in pipes]
        arguments = [(rank, size, f"{folder}/store", theirs) for rank, (_, theirs) in enumerate(pipes)]
        self.processes = [context.Process(target=serve, args=given, daemon=True) for given in arguments]
        for process in self.processes:
            process.start()

    def run(self, function, *arguments):
        """What ``function(rank, *arguments)`` returns in each process."""
        for pipe in self.pipes:
            pipe.send_bytes(packed((function.__name__, arguments)))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(ANSWER_SECONDS), f"rank {rank} of {function.__name__} does not answer"
            answers.append(unpacked(pipe.recv_bytes()))
        for rank, (error, _) in enumerate(answers):
            assert error is None, f"rank {rank}: {error}"
        return [result for _, result in answers]

    def close(self):
        for process in self.processes:
            process.terminate()
            process.join()


def packed(value):
    memory = io.BytesIO()
    torch.save(value, memory)
    return memory.getvalue()


def unpacked(data):
    return torch.load(io.BytesIO(data), weights_only=False)


def serve(rank, size, store, pipe):
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=ANSWER_SECONDS)
    )
    while True:
        name, arguments = unpacked(pipe.recv_bytes())
        try:
            answer = None, globals()[name](rank, *arguments)
        except Exception:
            answer = traceback.format_exc(), None
        pipe.send_bytes(packed(answer))


@pytest.fixture(scope="module", params=[2, 3])
def group(request, tmp_path_factory):
    processes = Group(request.param, tmp_path_factory.mktemp("group"))
    processes.size = request.param
    yield processes
    processes.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    processes = Group(2, tmp_path_factory.mktemp("pair"))
    yield processes
    processes.close()


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


def bands(maps, rows, rank):
    """The part of each map that ``rank`` holds; ``rows`` are the bands of each."""
    return [x.split(heights, dim=2)[rank] for x, heights in zip(maps, rows, strict=True)]


def step(block, maps, weights, autocast=None):
    """Output and gradients of one training step, and the buffers after it."""
    inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in maps]
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        out = block(*inputs)
    (out * weights).sum().backward()
    gradients = {f"grad {name}": p.grad for name, p in block.named_parameters()}
    found = {"out": out.detach()} | {f"input {i}": x.grad for i, x in enumerate(inputs)} | gradients
    return found | {name: b.clone() for name, b in block.named_buffers()}


def sharded_step(rank, kind, options, maps, weights, rows, autocast=None, seed=0):
    block = ak.parallel.shard_rows(build(kind, fused=True, **options).to(maps[0].dtype))
    assert "row shards" in repr(block)
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
            for part in parts:
                assert torch.equal(part[name], first), f"{name} differs between processes"
            whole[name] = first
    return whole


def uneven(height, size):
    """Bands of a map, all different where that can be: the first has a single row."""
    sizes = [1, height - 1] if size == 2 else [1, height // 2 + 1, height - height // 2 - 2]
    return sizes


def draw(kind, dtype=torch.float64, low=(19, 10), high=(13, 9), batch=2):
    """Maps of both levels, and the weights of the loss."""
    channels, sizes = CLASSES[kind][2], {"AFNB": (low, high), "APNB": (high,)}[kind]
    maps = [torch.randn(batch, c, *size, dtype=torch.float64).to(dtype) for c, size in zip(channels, sizes)]
    return maps, torch.randn(batch, 7, *high, dtype=torch.float64).to(dtype)


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
    "synchronised": {"norm": "sync"},
    "dropout": {"dropout": 0.5},
    "frozen, dropout": {"norm": "frozen", "dropout": 0.5},
    "recompute": {"recompute": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", CLASSES)
def test_row_shards_train_as_the_unsplit_block(kind, case, group):
    options = CASES[case]
    maps, weights = draw(kind)
    rows = [uneven(x.shape[2], group.size) for x in maps]
    found = joined(group.run(sharded_step, kind, options, maps, weights, rows, None, 11))
    plain = build(kind, fused=False, **{k: v for k, v in options.items() if k != "recompute"}).double()
    torch.manual_seed(11)
    assert_close(found, step(plain, maps, weights))
