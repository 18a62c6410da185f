"""Print what a training step and an evaluation of each block launch, ours and plain, and the host time of both.

    python -m tools.launches [--json] [--dtype float32] [--verbose]

Launches are counted on maps of 8 × 97 × 97 pixels, as small maps hide the second pass of a reduction; host time, which
does not depend on the size, is measured on small ones. bfloat16 autocast on channels_last maps, unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import annnet_kernels as ak
from annnet_kernels.reference import PlainAFNB, PlainAPNB

from .. import standin
from .counting import Calls, calls_of
from .host import host_milliseconds

_WIDTHS = {"AFNB": (16, 32, 32, 16, 16), "APNB": (32, 32, 16, 16)}
_CLASSES: dict[tuple[str, str], Any] = {
    ("AFNB", "ours"): ak.AFNB,
    ("AFNB", "plain"): PlainAFNB,
    ("APNB", "ours"): ak.APNB,
    ("APNB", "plain"): PlainAPNB,
}
LARGE, SMALL = (8, 97, 97), (1, 9, 8)


class Steps(NamedTuple):
    """Calls of one block on maps of one size."""

    training: Callable[[], object]
    evaluation: Callable[[], object]
    folded: Callable[[], object] | None


def steps_of(kind: str, side: str, size: tuple[int, int, int], dtype: torch.dtype) -> Steps:
    """Steps of a block that trains, of its twin in evaluation, and of one that is folded."""
    batch, height, width = size
    widths = (16, 32) if kind == "AFNB" else (32,)
    maps = [torch.randn(batch, channels, height, width, dtype=dtype) for channels in widths]
    maps = [x.contiguous(memory_format=torch.channels_last) for x in maps]
    blocks = [_CLASSES[kind, side](*_WIDTHS[kind]) for _ in range(3)]
    inputs = [x.clone().requires_grad_() for x in maps]
    leaves = [*inputs, *blocks[0].parameters()]
    upstream = torch.randn_like(_forward(blocks[0], inputs))
    training = partial(_step, blocks[0], inputs, leaves, upstream)
    folded = None
    if side == "ours":
        ak.fold_for_inference(blocks[2].eval())
        folded = partial(_evaluate, blocks[2], maps)
    return Steps(training, partial(_evaluate, blocks[1].eval(), maps), folded)


def _forward(block: Any, maps: Sequence[Tensor]) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=maps[0].dtype == torch.bfloat16):
        out: Tensor = block(*maps)
    return out


def _step(block: Any, inputs: Sequence[Tensor], leaves: Sequence[Tensor], upstream: Tensor) -> None:
    torch.autograd.grad(_forward(block, inputs), leaves, upstream, allow_unused=True)


@torch.no_grad()
def _evaluate(block: Any, maps: Sequence[Tensor]) -> None:
    _forward(block, maps)


def count(recorder: standin.Recorder, steps: Steps) -> dict[str, Calls]:
    """What each call launches, once its plans are known."""
    counted = {}
    for name, call in steps._asdict().items():
        if call is not None:
            call()
            counted[name] = calls_of(recorder, call)
    return counted


def measure(recorder: standin.Recorder, dtype: torch.dtype, with_time: bool) -> dict[str, dict[str, Any]]:
    """Launches and, if asked for, host milliseconds of every block and side."""
    table: dict[str, dict[str, Any]] = {}
    for kind in _WIDTHS:
        small = {side: steps_of(kind, side, SMALL, dtype) for side in ("ours", "plain")}
        for side in small:
            counted = count(recorder, steps_of(kind, side, LARGE, dtype))
            row: dict[str, Any] = {"launches": counted["training"].launches}
            row["evaluation_launches"] = counted["evaluation"].launches
            if "folded" in counted:
                row["folded_launches"] = counted["folded"].launches
            row["calls"] = {name: _names(calls) for name, calls in counted.items()}
            table[f"{kind} {side}"] = row
        if not with_time:
            continue
        counted_small = {side: count(recorder, steps) for side, steps in small.items()}
        for field, key in (("training", "step_ms"), ("evaluation", "evaluation_ms")):
            pairs = [(getattr(small[side], field), counted_small[side][field]) for side in small]
            with recorder.unwatched():
                measured = host_milliseconds(pairs)
            for side, milliseconds in zip(small, measured, strict=True):
                table[f"{kind} {side}"][key] = round(milliseconds, 3)
    return table


def _names(calls: Calls) -> dict[str, int]:
    names = Counter(calls.kernels)
    for call in calls.library:
        names[str(call.operator).removeprefix("aten.").removesuffix(".default")] += call.launches
    return dict(names.most_common())


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and as the last line its JSON if asked for."""
    parser = argparse.ArgumentParser(prog="python -m tools.launches", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the table as one JSON line, too")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--count-only", action="store_true", help="compile nothing and measure no time")
    parser.add_argument("--verbose", action="store_true", help="name every launch")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recorder = standin.install("record" if chosen.count_only else "compile")
    table = measure(recorder, getattr(torch, chosen.dtype), not chosen.count_only)
    for name, row in table.items():
        calls = row.pop("calls")
        print(f"{name:11}", ", ".join(f"{key} {value}" for key, value in row.items()))
        if chosen.verbose:
            for step, names in calls.items():
                print(f"    {step}: {', '.join(f'{number} {launched}' for launched, number in names.items())}")
    if chosen.json:
        print(json.dumps(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
