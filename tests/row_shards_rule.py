"""Blocks on row shards and unsplit, and what one step of each leaves behind."""

import pytest
import torch
import torch.distributed as dist
from gloo_pool import Pool
from torch import nn

import annnet_kernels as ak
from annnet_kernels.reference import PlainAFNB, PlainAPNB

CLASSES = {"AFNB": (ak.AFNB, PlainAFNB, (5, 6, 7)), "APNB": (ak.APNB, PlainAPNB, (6, 7))}
CANCELLED = ("f_key.0.bias", "f_query.0.bias", "f_value.bias", "W.bias", "conv_bn_dropout.0.bias")
"""Ahead of batch statistics: their gradients are zero."""


@pytest.fixture(scope="session")
def pool(tmp_path_factory):
    """Four processes, started once for all who ask."""
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
