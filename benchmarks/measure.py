"""Time and memory of a call. Knows no operator."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MIN_REPETITIONS = 5
MAX_REPETITIONS = 200
SHORT_CALL = 2e-4  # seconds; shorter calls are timed several at a time, or the clock's own cost would show

Call = Callable[[], Any]


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA has an exception for it, the CPU allocator a message."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Call, device: torch.device) -> float:
    """Wall time of one call, finished on the device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


@contextmanager
def _no_collection() -> Any:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _sample(call: Call, calls: int, device: torch.device) -> Callable[[], float]:
    """Start ``calls`` calls; the returned function gives the seconds of one of them once the device is done."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = (time.perf_counter() - begin) / calls
    return lambda: elapsed


def interleaved(
    calls: Sequence[Call],
    device: torch.device,
    seconds: float,
    progress: Callable[[float], None] = lambda fraction: None,
) -> list[list[float]]:
    """Seconds of every repetition of every call, in rounds, so that a drift of the machine meets them all.

    Each call gets an equal share of about ``seconds``, which decides how often it is repeated (``MIN_REPETITIONS`` to
    ``MAX_REPETITIONS``); a slow call sits out some rounds, spread evenly. The order within a round rotates. Calls are
    warm already. With little time (``seconds`` below what ``MIN_REPETITIONS`` take) there are fewer, at least three.
    """
    if not calls:
        return []
    once = [min(seconds_of(call, device) for _ in range(2)) for call in calls]
    repeats = [max(1, min(50, round(SHORT_CALL / t))) for t in once]
    share = seconds / len(calls)
    targets = [
        max(MIN_REPETITIONS, min(MAX_REPETITIONS, int(share / (t * n)))) for t, n in zip(once, repeats, strict=True)
    ]
    least = sum(t * n * MIN_REPETITIONS for t, n in zip(once, repeats, strict=True))
    if seconds < least:
        targets = [max(3, round(MIN_REPETITIONS * seconds / least))] * len(calls)
    rounds = max(targets)
    samples: list[list[float]] = [[] for _ in calls]
    with _no_collection():
        for turn in range(rounds):
            order = [(turn + i) % len(calls) for i in range(len(calls))]
            due = [i for i in order if (turn + 1) * targets[i] // rounds > turn * targets[i] // rounds]
            pending = [(i, _sample(calls[i], repeats[i], device)) for i in due]
            synchronize(device)
            for i, finish in pending:
                samples[i].append(finish())
            progress((turn + 1) / rounds)
    return samples


def replayed(call: Call, device: torch.device, repetitions: int, rotation: int = 1) -> list[float]:
    """Kernel time of one call: seconds per call of a CUDA graph that holds ``rotation`` calls, host overhead gone."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with _stream_kept(device), torch.cuda.graph(graph):
        for _ in range(rotation):
            call()
    graph.replay()
    pending = [_sample(graph.replay, 1, device) for _ in range(repetitions)]
    synchronize(device)
    return [finish() / rotation for finish in pending]


@contextmanager
def _stream_kept(device: torch.device) -> Iterator[None]:
    """Come back to the present stream whatever happens: a capture that fails leaves the process on its own stream."""
    stream = torch.cuda.current_stream(device)
    try:
        yield
    finally:
        torch.cuda.set_stream(stream)


def rotating(call: Callable[[Any], Any], inputs: Sequence[Any]) -> Call:
    """Calls with the next of ``inputs`` each time, so that no call finds its input in the cache."""
    turn = itertools.cycle(inputs)
    return lambda: call(next(turn))


@dataclass(frozen=True)
class Memory:
    """Bytes above what was allocated before: at the peak of a call, and still live when it returned."""

    peak: int
    live: int


def memory_of(call: Call, device: torch.device) -> Memory:
    """What the allocator handed out during ``call``, whose result is alive when ``live`` is read.

    On a GPU from PyTorch's caching allocator. On a CPU from the allocation events that PyTorch's allocator reports to
    the profiler, summed in order: exact bytes of every tensor and scratch buffer it handed out, not the process size.
    """
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = call()
        synchronize(device)
        live = torch.cuda.memory_allocated(device) - before
        del result
        return Memory(torch.cuda.max_memory_allocated(device) - before, live)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    totals = list(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))
    return Memory(max([0, *totals]), totals[-1] if totals else 0)


def quartiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, middle, high
