"""Where the time of one training step goes: kernel by kernel, ours and plain, with the floor of ours where it is known.

PyTorch's profiler reads the GPU's own clock. Where a machine refuses it, every launch is timed between two events; that
is longer by what the events cost.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode

from annnet_kernels.kernels.launch import Launch
from annnet_kernels.ops.calls import each_planned_anew
from benchmarks import features, machine
from benchmarks.cases import Case
from benchmarks.measure import Call, synchronize
from benchmarks.problem import Contestant, Problem
from benchmarks.providers import OURS, PLAIN, providers
from benchmarks.runner import first_line

from .measuring import DEVICE, block_case
from .store import RESULT, UNFINISHED

STEPS = 5
"""Profiled after as many that warm up."""
TOLERANCE = 1.1
"""A kernel that only reads may be somewhat faster than the copy that a floor is reckoned with."""

Kernels = dict[str, tuple[int, float]]
"""Calls and microseconds of all ``STEPS`` by name."""


def run(place: Path, seconds: float, device: torch.device = DEVICE, cases: list[Case] | None = None) -> int:
    """Profile both blocks, ours and plain, APNB first; each table is written down before the next is made."""
    until = time.monotonic() + seconds
    cases = cases or [block_case(block, training=True) for block in ("APNB", "AFNB")]
    dtype = getattr(torch, cases[0].dtype)
    limits = machine.limits(device, (dtype,))
    source = features.Features(features.find_pictures(None), device)
    found: dict[str, Any] = {}
    failed = False
    for case in cases:
        problem = Problem(case, source)
        for provider in providers(case, "quick"):
            if provider.name not in (OURS, PLAIN):
                continue
            if time.monotonic() >= until:
                return UNFINISHED
            tables = found.setdefault(case.name, {})
            try:
                tables[provider.name] = _table(Contestant(provider, problem).calls()[0], device, limits)
            except Exception as error:
                tables[provider.name] = {"error": first_line(error)}
                failed |= provider.name == OURS
            (place / RESULT).write_text(json.dumps({"profile": found, "limits": limits}))
            print(f"{case.name}, {provider.name}: {_summary(tables[provider.name])}")
    return 1 if failed else 0


def _summary(table: dict[str, Any]) -> str:
    if "error" in table:
        return str(table["error"])
    lines = [f"{table['device_us']:.0f} µs on the device, {table['host_us']:.0f} µs on the host ({table['source']})"]
    lines += [f"  {row['us']:9.1f} µs {row['calls']:5.1f} × {row['kernel']}" for row in table["kernels"]]
    return "\n".join(lines)


def _table(step: Call, device: torch.device, limits: dict[str, Any]) -> dict[str, Any]:
    for _ in range(STEPS):
        step()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    host = time.perf_counter() - start
    synchronize(device)
    both = time.perf_counter() - start
    kernels, source = _by_profiler(step, device), "profiler"
    if not kernels:
        kernels, source = _by_events(step, device), "events around every launch"
    floors = {name: size / limits["copy_bytes_per_s"] * 1e6 for name, size in operand_bytes(step).items()}
    rows = []
    for name, (calls, microseconds) in sorted(kernels.items(), key=lambda item: -item[1][1]):
        row: dict[str, Any] = {"kernel": name, "calls": calls / STEPS, "us": microseconds / STEPS}
        if name in floors:
            row["floor_us"] = floors[name]
            if row["us"] * TOLERANCE < floors[name]:
                row["error"] = "faster than this machine can move its operands: a measurement error"
        rows.append(row)
    return {
        "source": source,
        "device_us": sum(row["us"] for row in rows),
        "host_us": host / STEPS * 1e6,
        "step_us": both / STEPS * 1e6,
        "kernels": rows,
    }


def _by_profiler(step: Call, device: torch.device) -> Kernels:
    """Kernels by PyTorch's profiler; nothing where it is refused."""
    if device.type != "cuda":
        return {}
    try:
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(STEPS):
                step()
            synchronize(device)
        averages = profiler.key_averages()
    except Exception as error:
        print(f"the profiler is refused: {first_line(error)}")
        return {}
    on_device = [e for e in averages if e.device_type.name == "CUDA"]
    return {e.key: (e.count, float(e.self_device_time_total)) for e in on_device}


def _by_events(step: Call, device: torch.device) -> Kernels:
    """Every launch of ours, and every other operator, between two events."""
    spans: list[tuple[str, Any, Any]] = []

    def timed(name: str, call: Callable[[], Any]) -> Any:
        start = _mark(device)
        result = call()
        spans.append((name, start, _mark(device)))
        return result

    class EveryOperator(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            def call() -> Any:
                return function(*args, **(kwargs or {}))

            ours = function.namespace == "annnet"  # its launches are timed one by one
            return call() if ours or function.is_view else timed(str(function), call)

    with _each_launch(lambda launch, run: timed(launch.kernel.__name__, run)), EveryOperator():  # type: ignore[no-untyped-call]
        for _ in range(STEPS):
            step()
    synchronize(device)
    calls: Counter[str] = Counter(name for name, *_ in spans)
    total: dict[str, float] = {}
    for name, start, end in spans:
        total[name] = total.get(name, 0.0) + _microseconds(start, end)
    return {name: (calls[name], total[name]) for name in calls}


def _mark(device: torch.device) -> Any:
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _microseconds(start: Any, end: Any) -> float:
    return float((end - start) * 1e6 if isinstance(start, float) else start.elapsed_time(end) * 1e3)


def operand_bytes(step: Call) -> Counter[str]:
    """Bytes of all operands of our kernels in one step, by kernel: what it must read or write at least once."""
    found: Counter[str] = Counter()

    def count(launch: Launch, run: Callable[[], None]) -> None:
        found[launch.kernel.__name__] += sum({x.data_ptr(): _bytes(x) for x in _tensors(launch.arguments)}.values())
        run()

    with _each_launch(count):
        step()
    return found


@contextmanager
def _each_launch(around: Callable[[Launch, Callable[[], None]], Any]) -> Iterator[None]:
    """``around(launch, run)`` in the place of every launch of ours; known calls are planned anew for it."""
    original = Launch.run
    Launch.run = lambda self: around(self, lambda: original(self))  # type: ignore[method-assign]
    try:
        with each_planned_anew():
            yield
    finally:
        Launch.run = original  # type: ignore[method-assign]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)


def _bytes(x: Tensor) -> int:
    """Of the elements that differ in their place."""
    distinct = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        distinct *= size if stride else 1
    return distinct * x.element_size() if x.numel() else 0
