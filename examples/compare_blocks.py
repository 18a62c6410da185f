"""Does the fused network learn what the plain one learns, and how much faster?

    python examples/compare_blocks.py --data CAMVID --width-small --steps 40 --out runs/compare

Trains alike, from the same weights and in the same order: plain; plain again with sums in other orders; fused. Rounding
makes the plain runs part from each other, step by step; the fused run agrees if it parts from the first no further.
Takes the options of ``train.py``; prints images per second, peak memory on a GPU and the final mIoU of each.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from segmentation.distributed import Processes, joined
from segmentation.errors import UserError
from segmentation.monitor import Monitor, peak_memory
from segmentation.options import Options, parse
from segmentation.signals import StopRequest
from segmentation.training import Training, train
from torch import Tensor

RUNS = ("plain", "plain, other order", "plain, another order", "fused")


class Run(NamedTuple):
    """One run's losses (steps), its speed, memory in bytes (0 on a CPU) and score."""

    losses: Tensor
    images_per_second: float
    memory: int
    mean_iou: float


def variant(options: Options, name: str) -> Options:
    """The options of one of RUNS."""
    folder = options.out / name.replace(", ", "-").replace(" ", "-")
    return dataclasses.replace(options, out=folder, blocks=name.split(",")[0], resume=None, save_every=options.steps)


def reorder(training: Training, name: str) -> None:
    """Permute the channels of queries and keys, and of values: the same function, and sums in another order."""
    if "order" not in name:
        return
    generator = torch.Generator().manual_seed(RUNS.index(name))
    network = training.network
    for stage in (network.fusion.stages[0], network.context[2].stages[0]):
        keys = torch.randperm(stage.key_channels, generator=generator)
        values = torch.randperm(stage.value_channels, generator=generator)
        for projection in {stage.f_key, stage.f_query}:
            for parameter in projection.parameters():
                parameter.data = parameter.data[keys.to(parameter.device)]
        for parameter in stage.f_value.parameters():
            parameter.data = parameter.data[values.to(parameter.device)]
        stage.W.weight.data = stage.W.weight.data[:, values.to(stage.W.weight.device)]


def run(options: Options, name: str, processes: Processes, score: bool = True) -> Run:
    """Train one of RUNS; ``score`` evaluates it as well."""
    options = variant(options, name)
    training = Training(options, processes)
    reorder(training, name)
    if processes.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with Monitor(options, 0, processes.leads) as monitor, StopRequest() as stop:
        monitor.say(f"{name}:")
        start = time.perf_counter()
        if train(training, monitor, stop):
            raise KeyboardInterrupt
        losses = training.loss_history()  # waits for the GPU
        speed = options.steps * options.batch_size / (time.perf_counter() - start)
        memory = peak_memory() if processes.device.type == "cuda" else 0
        return Run(losses, speed, memory, training.evaluate(monitor).mean if score else float("nan"))


def distances(runs: dict[str, Run]) -> tuple[Tensor, Tensor]:
    """Up to each step: how far two plain runs have parted at most, and how far the fused one from the first plain."""
    plain = [runs[name].losses for name in RUNS[:-1]]
    noise = torch.stack([(a - b).abs() for i, a in enumerate(plain) for b in plain[:i]]).amax(0)
    return noise.cummax(0).values, (runs["fused"].losses - plain[0]).abs().cummax(0).values


def main(arguments: Sequence[str] | None = None) -> int:
    from segmentation import pictures

    try:
        options = parse(arguments)
        with joined(options.device) as processes:
            runs = {name: run(options, name, processes) for name in RUNS}
    except UserError as error:
        print(f"compare_blocks.py: {error}", file=sys.stderr)
        return 2
    if processes.leads:
        for name, (losses, speed, memory, score) in runs.items():
            held = f"{memory / 2**30:6.2f} GiB  " if memory else ""
            print(f"{name:21} {speed:7.2f} images/s  {held}last loss {losses[-1]:.6f}  mIoU {score:.2%}")
        noise, fused = distances(runs)
        print(f"largest difference of losses: among plain runs {noise[-1]:.2e}, fused from plain {fused[-1]:.2e}")
        curves = {name: run.losses.tolist() for name, run in runs.items()}
        print(f"wrote {pictures.save(pictures.loss_curves(curves), options.out / 'losses.png')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
