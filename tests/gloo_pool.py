"""Gloo processes that start once and then run functions of the test modules, since starting them is what costs.

They are forked from a process that has imported what takes long, and has computed nothing.
"""

import importlib
import io
import multiprocessing
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

ANSWER_SECONDS = 60

groups = {}
"""In a process of the pool: the groups by size."""


def ranks_of(size, count):
    """The processes, of ``count``, in the group of this size: not always those whose ranks in it are their own."""
    first = count - 2 if size == 2 else 0
    return list(range(first, first + size))


class Pool:
    """Send a function to the processes of a group and collect what it returns."""

    def __init__(self, folder, count=4):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "torchvision", "annnet_kernels"])
        pipes = [context.Pipe() for _ in range(count)]
        self.pipes = [mine for mine, _ in pipes]
        arguments = [(rank, count, f"{folder}/store", theirs) for rank, (_, theirs) in enumerate(pipes)]
        self.processes = [context.Process(target=_serve, args=given, daemon=True) for given in arguments]
        for process in self.processes:
            process.start()

    def run(self, size, function, *arguments):
        """What ``function(group, *arguments)`` returns in each process of the group of this size."""
        ranks = ranks_of(size, len(self.pipes))
        for rank in ranks:
            self.pipes[rank].send_bytes(_packed((function.__module__, function.__name__, size, arguments)))
        answers = []
        for rank in ranks:
            assert self.pipes[rank].poll(ANSWER_SECONDS), f"process {rank} does not answer"
            answers.append(_unpacked(self.pipes[rank].recv_bytes()))
        for rank, (error, _) in zip(ranks, answers, strict=True):
            assert error is None, f"process {rank}: {error}"
        return [result for _, result in answers]

    def close(self):
        for process in self.processes:
            process.terminate()
            process.join()


def _packed(value):
    memory = io.BytesIO()
    torch.save(value, memory)
    return memory.getvalue()


def _unpacked(data):
    return torch.load(io.BytesIO(data), weights_only=False)


def _serve(rank, count, store, pipe):
    torch.set_num_threads(1)
    patience = timedelta(seconds=ANSWER_SECONDS)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=patience)
    groups.update({size: dist.new_group(ranks_of(size, count)) for size in range(2, count)})
    groups[count] = dist.group.WORLD
    while True:
        module, name, size, arguments = _unpacked(pipe.recv_bytes())
        try:
            answer = None, getattr(importlib.import_module(module), name)(groups[size], *arguments)
        except BaseException:  # a failed assertion of pytest is no Exception
            answer = traceback.format_exc(), None
        pipe.send_bytes(_packed(answer))
