"""Host time of a call with launches stubbed: kernels of this package end in the stand-in driver, library calls compute.

What they compute takes time that on a GPU the device would spend. So each library call is timed alone, that time is
taken off, and a launch of a library call counts as :data:`LIBRARY_LAUNCH` microseconds instead, alike on both sides.
Memory that is freed is kept, as PyTorch's allocator on a GPU keeps it; else the C library would give larger tensors
back to the system, and ask for them again.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Sequence

import torch

from .counting import Calls, LibraryCall

LIBRARY_LAUNCH = 8.0
"""Microseconds of host time that a launch of a library call counts as."""

_REPEATS, _STEPS = 15, 8
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Of ``mallopt``, see malloc.h."""


def host_milliseconds(sides: Sequence[tuple[Callable[[], object], Calls]]) -> list[float]:
    """Host time of each side's call, in ms: the median of interleaved rounds, library calls at their fixed price."""
    _keep_memory()
    computed = [sum(map(_microseconds_of, calls.library)) for _, calls in sides]
    priced = [sum(call.launches for call in calls.library) * LIBRARY_LAUNCH for _, calls in sides]
    rounds: list[list[float]] = [[] for _ in sides]
    for _ in range(_REPEATS):
        for (call, _), times in zip(sides, rounds, strict=True):
            start = time.thread_time_ns()
            for _ in range(_STEPS):
                call()
            times.append((time.thread_time_ns() - start) / 1e3 / _STEPS)
    measured = map(statistics.median, rounds)
    return [(m - c + p) / 1e3 for m, c, p in zip(measured, computed, priced, strict=True)]


def _keep_memory() -> None:
    """Ask glibc to keep what is freed; other C libraries do as they like."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            set_option(option, 2**30)


def _microseconds_of(call: LibraryCall) -> float:
    """CPU time of a library call alone, less what calling an operator from Python costs."""
    return max(0.0, _fastest(lambda: call.operator(*call.arguments, **call.keywords)) - _calling_cost())


def _calling_cost() -> float:
    x = torch.empty(1)
    return _fastest(lambda: torch.ops.aten.alias.default(x))


def _fastest(call: Callable[[], object]) -> float:
    times = []
    with torch.no_grad():
        for _ in range(_REPEATS):
            start = time.thread_time_ns()
            for _ in range(_STEPS):
                call()
            times.append((time.thread_time_ns() - start) / 1e3 / _STEPS)
    return statistics.median(times)
