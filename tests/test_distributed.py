"""Two gloo processes equal one with the joined batch: SyncBatchNorm, the same under FSDP2, DDP, and finer sharding."""

import contextlib

import pytest
import torch
from gloo_pool import Pool
from torch import nn

import annnet_kernels as ak
from annnet_kernels.reference import PlainAFNB, PlainAPNB
from annnet_kernels.runtime import backends

MAPS = {"AFNB": [(4, 5, 8, 7), (4, 6, 6, 5)], "APNB": [(4, 6, 6, 5)]}
CLASSES = {"AFNB": (ak.AFNB, PlainAFNB, (5, 6, 7)), "APNB": (ak.APNB, PlainAPNB, (6, 7))}


def build(kind, fused):
    torch.manual_seed(5)
    block = CLASSES[kind][0 if fused else 1](*CLASSES[kind][2], 4, 3, dropout=0.0).double()
    for name, parameter in block.named_parameters():
        if parameter.dim() == 1 or ".W." in name:
            nn.init.normal_(parameter)
    return block


def step(block, maps, rank=0):
    """Output and gradients of one training step, and the running statistics after it."""
    inputs = [x.clone().requires_grad_() for x in maps]
    out = block(*inputs)
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out) + rank
    (out * weights).sum().backward()
    return {"out": out.detach(), "weights": weights} | {f"input {i}": x.grad for i, x in enumerate(inputs)}


WITHOUT_SYNCHRONISATION = ("ddp", "fsdp, finer")


def freeze_statistics(block):
    """DDP and the published forward refuse a SyncBatchNorm on a CPU; without one, only running statistics are alike."""
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def reduced_gradients(block, wrap, processes):
    """Summed over processes; DDP and FSDP average."""
    import torch.distributed as dist

    gradients = {name: parameter.grad for name, parameter in block.named_parameters()}
    if wrap == "ddp":
        return {name: gradient * processes for name, gradient in gradients.items()}
    if wrap.startswith("fsdp"):
        return {name: gradient.full_tensor() * processes for name, gradient in gradients.items()}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    return gradients


@contextlib.contextmanager
def counted_reductions():
    """The shapes of what is summed over all processes within."""
    import torch.distributed as dist

    shapes, real = [], dist.all_reduce
    dist.all_reduce = lambda tensor, *args, **kwargs: (
        shapes.append(tuple(tensor.shape)) or real(tensor, *args, **kwargs)
    )
    try:
        yield shapes
    finally:
        dist.all_reduce = real


def step_of_two(group, kind, wrap, split, maps):
    """In one of two processes: its part of the step, and the gradients of both."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    backends._last_used.clear()  # what earlier tests ran in this process
    rank = dist.get_rank(group)
    block = build(kind, fused=True)
    if wrap in WITHOUT_SYNCHRONISATION:
        freeze_statistics(block)
    else:
        block = nn.SyncBatchNorm.convert_sync_batchnorm(block)
    assert "collapsed" in block.extra_repr()
    part = slice(0, split) if rank == 0 else slice(split, None)
    wrapped = DistributedDataParallel(block) if wrap == "ddp" else block
    if wrap.startswith("fsdp"):
        mesh = init_device_mesh("cpu", (2,))
        if wrap == "fsdp, finer":
            fully_shard(block.stages[0].f_value, mesh=mesh)
        fully_shard(block, mesh=mesh)
    with counted_reductions() as reductions:
        found = step(wrapped, [x[part] for x in maps], rank)
    if wrap == "fsdp, finer":
        assert "published forward, because of FSDPConv2d in the place of Conv2d" in repr(block)
        assert ak.last_backend("batch_norm_update") is None
    else:
        assert block.extra_repr() == "collapsed"
        made = "batch_norm_table" if wrap in WITHOUT_SYNCHRONISATION else "batch_norm_update"
        assert ak.last_backend(made) is not None  # the collapsed forward ran
    # Statistics ahead and gradients behind: of the tail, of the query, and in an AFNB of the key.
    assert len(reductions) == (0 if wrap in WITHOUT_SYNCHRONISATION else 6 if kind == "AFNB" else 4), reductions
    found |= {f"grad {name}": gradient for name, gradient in reduced_gradients(block, wrap, 2).items()}
    found |= dict(block.named_buffers())
    return found


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    processes = Pool(tmp_path_factory.mktemp("pool"), count=2)
    yield processes
    processes.close()


@pytest.fixture
def single_process_mesh():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", CLASSES)
def test_a_sharded_parameter_is_left_to_the_published_forward(kind, single_process_mesh):
    from torch.distributed.tensor import distribute_tensor

    block = build(kind, fused=True)
    value = block.stages[0].f_value
    value.weight = nn.Parameter(distribute_tensor(value.weight.detach(), single_process_mesh))
    assert "published forward, because of Conv2d holds a sharded weight (DTensor)" in repr(block)


@pytest.mark.parametrize(
    ("kind", "wrap", "split"),
    [
        ("AFNB", "none", 2),
        ("AFNB", "none", 1),
        ("APNB", "none", 1),
        ("AFNB", "ddp", 2),
        ("APNB", "ddp", 1),
        ("AFNB", "fsdp", 1),
        ("APNB", "fsdp", 2),
        ("AFNB", "fsdp, finer", 2),
        ("APNB", "fsdp, finer", 1),
    ],
)
def test_two_processes_equal_one(kind, wrap, split, two_processes):
    maps = [torch.randn(shape, dtype=torch.float64) for shape in MAPS[kind]]
    first, second = two_processes.run(2, step_of_two, kind, wrap, split, maps)
    plain = build(kind, fused=False)
    if wrap in WITHOUT_SYNCHRONISATION:
        freeze_statistics(plain)
    inputs = [x.clone().requires_grad_() for x in maps]
    out = plain(*inputs)
    (out * torch.cat([first["weights"], second["weights"]])).sum().backward()
    torch.testing.assert_close(torch.cat([first["out"], second["out"]]), out.detach())
    for i, x in enumerate(inputs):
        torch.testing.assert_close(torch.cat([first[f"input {i}"], second[f"input {i}"]]), x.grad)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(first[f"grad {name}"], parameter.grad, rtol=1e-7, atol=1e-9, msg=name)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(first[name], buffer, msg=name)
        torch.testing.assert_close(second[name], buffer, msg=name)
