"""One process or many: what torchrun started, what they agree on, and how they share a network."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .errors import UserError
from .norms import synchronise

_RESTARTS, _MAY_RESTART = "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS"
# Unless told otherwise torchrun keeps one store for all its restarts, and new processes find the addresses of dead ones
# in it: with torch 2.14.1 and gloo, three restarts of four then ended with "Connection refused".
_KEEPS_STORE, _FRESH_STORE = "TORCHELASTIC_USE_AGENT_STORE", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"


@dataclass(frozen=True)
class Processes:
    """This process among all of a run."""

    device: torch.device
    rank: int = 0
    count: int = 1
    restarted: bool = False  # by torchrun, after a failure

    @property
    def leads(self) -> bool:
        """Whether it is this one that prints, logs and saves."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(value)
        return value

    def any(self, value: int) -> int:
        """The largest value of all processes; travels by the CPU, so no GPU waits."""
        agreed = torch.tensor(value)
        if self.count > 1:
            dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return int(agreed)

    def gather(self, value: Any) -> list[Any]:
        """The value of every process, by rank."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        self.any(0)


@contextmanager
def joined(device: str) -> Iterator[Processes]:
    """The process group of torchrun, or this process alone."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError("--device: this machine has no CUDA device that torch can use")
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Processes(torch.device(device))
        return
    here = torch.device(device)
    if here.type == "cuda":
        here = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(here)
    dist.init_process_group("cpu:gloo,cuda:nccl" if here.type == "cuda" else "gloo")
    processes = Processes(here, dist.get_rank(), dist.get_world_size(), int(os.environ[_RESTARTS]) > 0)
    if processes.leads and os.environ[_MAY_RESTART] != "0" and os.environ[_KEEPS_STORE] == "True":
        print(f"torchrun will not restart reliably; set {_FRESH_STORE} where it starts")
    yield processes
    dist.destroy_process_group()  # not after an error: the others may never get there


def shared(network: nn.Module, parallel: str, sync_bn: bool, processes: Processes) -> nn.Module:
    """The network as DDP or FSDP2 runs it; itself for one process. Parameters are those of ``network``."""
    if processes.count == 1:
        return network
    if parallel == "fsdp":
        if sync_bn:
            synchronise(network, processes.device)
        return _sharded(network, processes)
    from torch.nn.parallel import DistributedDataParallel

    on_cpu = processes.device.type == "cpu"
    if sync_bn and not on_cpu:
        synchronise(network, processes.device)
    device_ids = None if on_cpu else [processes.device]
    wrapped = DistributedDataParallel(network, device_ids=device_ids, gradient_as_bucket_view=True)
    if sync_bn and on_cpu:  # DDP refuses to wrap a SyncBatchNorm on a CPU, where the blocks' works nevertheless
        synchronise(network, processes.device)
    return wrapped


def _sharded(network: nn.Module, processes: Processes) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    network.to(memory_format=torch.contiguous_format)  # FSDP2 takes no other; the layout of maps is the pictures'
    mesh = init_device_mesh(processes.device.type, (processes.count,))
    heads = [child for name, child in network.named_children() if name != "backbone"]
    for part in (*network.backbone.children(), *heads):  # type: ignore[union-attr, operator]
        if any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)
    return fully_shard(network, mesh=mesh)


@contextmanager
def whole(network: nn.Module) -> Iterator[None]:
    """Within, each process holds all of an FSDP2 network, and calls of it need no other process."""
    from torch.distributed.fsdp import FSDPModule

    shards = [module for module in network.modules() if isinstance(module, FSDPModule)]
    for shard in shards:
        shard.set_reshard_after_forward(False, recurse=False)
        shard.unshard()
    yield
    for shard in shards:
        shard.reshard()
        shard.set_reshard_after_forward(shard is not network, recurse=False)
