"""Which pictures a step learns from: the same for any number of processes and workers, and from any step on."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from itertools import count, islice
from threading import Thread

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from .data import Pictures
from .distributed import Processes
from .errors import DataError
from .options import Options


class ResumableSampler(DistributedSampler):  # type: ignore[type-arg]
    """This process' share of an epoch as (epoch, index), from the picture ``start`` of that share on.

    Process r of R takes every R-th picture of the shuffled epoch, so batch k over all processes is the k-th slice of
    the epoch for every R.
    """

    start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]
        return ((self.epoch, index) for index in islice(super().__iter__(), self.start, None))

    def __len__(self) -> int:
        return self.num_samples - self.start


class Order:
    """The batches of a run, of this process, from any step on."""

    def __init__(self, pictures: Pictures, options: Options, processes: Processes) -> None:
        if options.batch_size % processes.count:
            raise DataError(f"--batch-size: {options.batch_size} does not divide among {processes.count} processes")
        self.steps_per_epoch = len(pictures) // options.batch_size
        if self.steps_per_epoch == 0:
            raise DataError(f"--batch-size: {options.batch_size} is more than the {len(pictures)} training pictures")
        self.batch = options.batch_size // processes.count
        self.sampler = ResumableSampler(
            pictures, processes.count, processes.rank, shuffle=True, seed=options.seed, drop_last=True
        )
        self.loader = DataLoader(
            pictures,
            self.batch,
            sampler=self.sampler,
            num_workers=options.workers,
            worker_init_fn=_start_worker,
            persistent_workers=options.workers > 0,
            pin_memory=processes.device.type == "cuda",
            drop_last=True,
            generator=torch.Generator(),  # else every epoch draws from the generator that dropout draws from
        )

    def batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pictures and labels of step, step + 1, and so on, without end."""
        first_epoch, position = divmod(step, self.steps_per_epoch)
        for epoch in count(first_epoch):
            self.sampler.set_epoch(epoch)
            self.sampler.start = position * self.batch
            yield from islice(self.loader, self.steps_per_epoch - position)
            position = 0


def _start_worker(_: int) -> None:
    """A worker ends when the training process says so, and not by a signal to both that tells that one to save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        Thread(target=_obey_parent, daemon=True).start()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
