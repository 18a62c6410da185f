"""Host time of a call with launches stubbed: kernels of this package end in the stand-in driver, library calls compute.

What they compute takes time that on a GPU the device would spend. So a step's library calls are repeated by themselves,
one after the other, their time is taken off, and a launch of a library call counts as :data:`LIBRARY_LAUNCH`
microseconds instead, alike on both sides. Both are measured in turns: the machine may be faster at one time than at
another. (Timed one by one, in a loop each, library calls take half as long as in a step, where nothing is in a cache.)
Memory that is freed is kept, as PyTorch's allocator on a GPU keeps it; else the C library would give larger tensors
back to the system, and ask for them again.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from .counting import Calls, LibraryCall

LIBRARY_LAUNCH = 8.0
"""Microseconds of host time that a launch of a library call counts as."""

_REPEATS, _STEPS = 25, 8
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of ``mallopt``, see malloc.h."""


def host_milliseconds(sides: Sequence[tuple[Callable[[], object], Calls]]) -> list[float]:
    """Host time of each side's call, in ms: the median of interleaved rounds, library calls at their fixed price."""
    _keep_memory()
    rounds: list[list[float]] = [[] for _ in sides]
    for _ in range(_REPEATS):
        for (call, calls), times in zip(sides, rounds, strict=True):
            times.append(_microseconds_of(call) - _microseconds_of(partial(_repeat, calls.library)))
    priced = [sum(call.launches for call in calls.library) * LIBRARY_LAUNCH for _, calls in sides]
    return [(statistics.median(times) + price) / 1e3 for times, price in zip(rounds, priced, strict=True)]


def _keep_memory() -> None:
    """Ask glibc to keep what is freed; other C libraries do as they like."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            set_option(option, 2**30)


@torch.no_grad()
def _repeat(library: Sequence[LibraryCall]) -> None:
    for call in library:
        call.operator(*call.arguments, **call.keywords)


def _microseconds_of(call: Callable[[], object]) -> float:
    start = time.thread_time_ns()
    for _ in range(_STEPS):
        call()
    return (time.thread_time_ns() - start) / 1e3 / _STEPS
