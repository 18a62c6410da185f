"""``python -m tools.scaling``: row shards measured on this machine's gloo, and a model of many GPUs.

Measured: a training step of a block whose map 1, 2, 4, … processes share by rows. Modelled, from counted FLOP and
bytes and from assumptions that are arguments:

    time(R) = (FLOP of the map / R + FLOP of everyone) / rate + messages · latency + 2 (R − 1) / R · bytes / bandwidth

The first term alone shrinks with R, so a split pays until the others are what is left. A rate stands for all that a
process does: where memory and not arithmetic is the limit, give the rate that a step reaches there.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import annnet_kernels as ak
from benchmarks import machine
from benchmarks.counting import count
from benchmarks.records import save

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "AFNB": lambda: ak.AFNB(1024, 2048, 2048, 256, 256, dropout=0.0),
    "APNB": lambda: ak.APNB(512, 512, 256, 256, dropout=0.0),
}
CHANNELS = {"AFNB": (1024, 2048), "APNB": (512,)}
RANKS = (1, 2, 4, 8, 16, 32, 64)
MAPS = ((97, 97), (128, 256), (512, 512), (2048, 2048))
"""Heights and widths that the model is asked about, of feature maps: a picture has 8 times as many rows and columns."""
TOLERANCE = 1e-4
HALF = 0.5
SCHEMA = 1


@dataclass(frozen=True)
class Assumptions:
    """What the model takes for given. The defaults are round numbers for a current GPU, not measurements."""

    rate: float = 200e12
    """FLOP/s that a process reaches over a whole step."""
    latency: float = 30e-6
    """Seconds that a message takes however short it is."""
    bandwidth: float = 50e9
    """Bytes/s in and out of a process."""


@dataclass(frozen=True)
class Work:
    """A training step of a block: what grows with the map, what every process does, what is sent."""

    flop_per_pixel: float
    flop_everywhere: float
    messages: int
    bytes: int

    def seconds(self, pixels: int, ranks: int, given: Assumptions) -> float:
        """The model: time of a step of a map of ``pixels`` on ``ranks`` processes."""
        compute = (self.flop_per_pixel * pixels / ranks + self.flop_everywhere) / given.rate
        if ranks == 1:
            return compute
        return compute + self.messages * given.latency + 2 * (ranks - 1) / ranks * self.bytes / given.bandwidth

    def efficiency(self, pixels: int, ranks: int, given: Assumptions) -> float:
        """How much of ``ranks`` times the speed of one is reached."""
        return self.seconds(pixels, 1, given) / (ranks * self.seconds(pixels, ranks, given))

    def last_that_pays(self, pixels: int, given: Assumptions) -> int:
        """The most processes, of the powers of two, that are at least half used."""
        ranks = 1
        while ranks < 2**20 and self.efficiency(pixels, 2 * ranks, given) >= HALF:
            ranks *= 2
        return ranks


def work_of(kind: str, batch: int) -> Work:
    """Counted, not measured: FLOP are linear in the pixels, so two map sizes tell the slope and the rest."""
    sides = 16, 32
    flops = [count(partial(_step_of, kind, batch, side, side)).flop for side in sides]
    slope = (flops[1] - flops[0]) / (sides[1] ** 2 - sides[0] ** 2)
    sent = ak.parallel.traffic(BLOCKS[kind](), batch)
    return Work(slope, flops[0] - slope * sides[0] ** 2, sent.messages, sent.bytes)


def _step_of(kind: str, batch: int, height: int, width: int) -> Callable[[], Any]:
    block = BLOCKS[kind]()
    maps = [torch.randn(batch, channels, height, width, requires_grad=True) for channels in CHANNELS[kind]]
    return lambda: _step(block, maps)


def _step(block: nn.Module, maps: Sequence[Tensor]) -> Tensor:
    out: Tensor = block(*maps)
    torch.autograd.grad(out, [*maps, *block.parameters()], torch.ones_like(out))
    return out


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    kind: str
    batch: int
    height: int
    width: int
    threads: int
    steps: int


def measure(setting: Setting, processes: int) -> dict[str, Any]:
    """Seconds of every step, the slowest process's, and of the step's messages alone."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        receiver, sender = context.Pipe(duplex=False)
        arguments = [(rank, processes, f"{folder}/store", setting, sender) for rank in range(processes)]
        workers = [context.Process(target=_work, args=given, daemon=True) for given in arguments]
        for worker in workers:
            worker.start()
        while not receiver.poll(1):
            if any(worker.exitcode for worker in workers):
                raise OSError(f"{setting.kind}, {processes} processes: one of them failed, its error is above")
        measured: dict[str, Any] = receiver.recv()
        for worker in workers:
            worker.join()
    return {"processes": processes, **asdict(setting), **measured}


def _work(rank: int, size: int, store: str, setting: Setting, sender: Any) -> None:
    """One process: the unsplit block for comparison, then its rows, timed."""
    torch.set_num_threads(setting.threads)
    machine.keep_large_blocks()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    torch.manual_seed(0)
    block = BLOCKS[setting.kind]()
    nn.init.normal_(block.stages[0].W.weight)  # type: ignore[union-attr, index]
    whole = [torch.randn(setting.batch, c, setting.height, setting.width) for c in CHANNELS[setting.kind]]
    maps = [x.tensor_split(size, dim=2)[rank].clone().requires_grad_() for x in whole]
    error = 0.0
    if size > 1:
        with torch.no_grad():
            expected = block(*whole).tensor_split(size, dim=2)[rank]
        ak.parallel.shard_rows(block)
        error = float((_step(block, maps).detach() - expected).norm() / expected.norm())
        if error > TOLERANCE:
            raise ValueError(f"rank {rank}: differs from the unsplit block by {error:.1e}")
    del whole
    sent = ak.parallel.traffic(block, setting.batch)
    message = torch.zeros(max(1, sent.bytes // sent.messages // 4))

    def talk() -> None:
        for _ in range(sent.messages):
            dist.all_reduce(message)

    steps = _timed(lambda: _step(block, maps), setting.steps)
    messages = _timed(talk, 4 * setting.steps) if size > 1 else []
    if rank == 0:
        found = {"seconds": steps, "message_seconds": messages, "messages": sent.messages, "bytes": sent.bytes}
        sender.send({**found, "error": error})
    dist.destroy_process_group()


def _timed(call: Callable[[], Any], repetitions: int) -> list[float]:
    """Seconds of each call, all processes starting together, of the slowest."""
    seconds = []
    for _ in range(repetitions + 1):
        dist.barrier()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    slowest = torch.tensor(seconds[1:])
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return slowest.tolist()


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Measure, model, print and record."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--map", nargs=2, type=int, default=[48, 96], metavar=("HEIGHT", "WIDTH"), help="measured map")
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--steps", type=int, default=7)
    for name, default in asdict(Assumptions()).items():
        parser.add_argument(f"--{name}", type=float, default=default, help=f"assumed (default {default:g})")
    parser.add_argument("--out", type=Path, default=Path("bench-results/scaling.json"), help="the record")
    chosen = parser.parse_args(arguments)
    height = chosen.map[0]
    if min(chosen.processes) < 1 or height < max(chosen.processes):
        parser.error(f"--processes: expected from 1 to the {height} rows of the map, got {chosen.processes}")
    return _run(chosen, console or Console())


def _run(chosen: argparse.Namespace, console: Console) -> int:
    height, width = chosen.map
    given = Assumptions(chosen.rate, chosen.latency, chosen.bandwidth)
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "environment": machine.environment(torch.device("cpu")),
        "definitions": {
            "seconds": "of a training step, the slowest process's; 1 process runs the unsplit block",
            "message_seconds": "of as many all-reduces of the same total size, alone",
            "model": "(flop_per_pixel · pixels / R + flop_everywhere) / rate + messages · latency"
            " + 2 (R - 1) / R · bytes / bandwidth; rate, latency and bandwidth are assumed",
        },
        "load_before": os.getloadavg()[0],
        "measured": [],
        "assumptions": asdict(given),
        "model": [],
    }
    for kind in chosen.blocks:
        setting = Setting(kind, chosen.batch, height, width, chosen.threads, chosen.steps)
        rows = [measure(setting, processes) for processes in chosen.processes]
        record["measured"] += rows
        work = work_of(kind, chosen.batch)
        record["model"].append(
            {"block": kind, "batch": chosen.batch, **asdict(work), "times": _predictions(work, given)}
        )
        console.print(_measured_table(rows), _model_table(kind, chosen.batch, work, given))
    cores = os.cpu_count() or 1
    if max(chosen.processes) * chosen.threads > cores:
        console.print(
            f"{max(chosen.processes)} processes of {chosen.threads} threads share {cores} cores: they cannot be faster "
            f"than {cores} threads, and are measured to show that nothing breaks."
        )
    if record["load_before"] > cores / 4:
        console.print(
            f"Others used this machine: its load was {record['load_before']:.1f} before; times are theirs too."
        )
    console.print(f"The model assumes {given.rate:g} FLOP/s, {given.latency:g} s and {given.bandwidth:g} bytes/s.")
    save(record, chosen.out)
    console.print(f"Written: {chosen.out}")
    return 0


def _predictions(work: Work, given: Assumptions) -> list[dict[str, Any]]:
    return [
        {
            "map": [height, width],
            "seconds": {str(ranks): work.seconds(height * width, ranks, given) for ranks in RANKS},
            "last_that_pays": work.last_that_pays(height * width, given),
        }
        for height, width in MAPS
    ]


def _measured_table(rows: Sequence[dict[str, Any]]) -> Table:
    first = rows[0]
    shape = f"{first['batch']}×{first['height']}×{first['width']}"
    table = Table(box=box.SIMPLE_HEAD, title=f"{first['kind']} {shape}, training step, gloo on this machine")
    for heading in ("processes", "step, ms", "faster", "messages", "bytes", "messages alone, ms"):
        table.add_column(heading, justify="right")
    alone = statistics.median(first["seconds"])
    for row in rows:
        median = statistics.median(row["seconds"])
        talk = row["message_seconds"]
        table.add_row(
            str(row["processes"]),
            f"{median * 1e3:.1f}",
            f"{alone / median:.2f}",
            *((f"{row['messages']}", f"{row['bytes']:,}", f"{statistics.median(talk) * 1e3:.2f}") if talk else ()),
        )
    return table


def _model_table(kind: str, batch: int, work: Work, given: Assumptions) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{kind}, batch {batch}, modelled: ms per training step, and efficiency, by processes",
    )
    for heading in ("map", *(f"{ranks}" for ranks in RANKS), "half used to"):
        table.add_column(heading, justify="right", no_wrap=heading == "map")
    for height, width in MAPS:
        pixels = height * width
        cells = [
            f"{work.seconds(pixels, ranks, given) * 1e3:.3g}\n{work.efficiency(pixels, ranks, given):.0%}"
            for ranks in RANKS
        ]
        table.add_row(f"{height}×{width}", *cells, str(work.last_that_pays(pixels, given)))
    return table


if __name__ == "__main__":
    sys.exit(main())
