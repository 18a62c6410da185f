"""A run over several cases: its record, written after each case, and the progress that a reader watches."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import features, machine, upsampled
from .cases import MODEL, PAIR, Case
from .heads import HEADS
from .runner import NO_TIME, CaseRun, Options, first_line

SCHEMA = 1
RECORD = "benchmark.json"
DEFINITIONS = {
    "times_s": "seconds of every repetition of one call, all providers interleaved; CUDA events on a GPU",
    "graph_times_s": "the same from a CUDA graph that replays one call per copy of the inputs: no host overhead",
    "peak_bytes": "allocated during one call at most, above inputs and parameters; gradients included",
    "kept_bytes": "still allocated after the forward of a training step, its outputs not counted",
    "traffic": "bytes that the call's operators read and write, each operator its operands once",
    "flop": "2 per multiply-add, counted from the operators",
    "minimal_bytes": "inputs and parameters read once, outputs written once; twice that in training, for the gradients",
    "check": "error relative to float64; the tensor nearest to its bound",
}
_WEIGHTS = {"pyramid_pool": 1.0, "asymmetric_attention": 1.5, "APNB": 2.0, "AFNB": 3.0, PAIR: 1.5, MODEL: 3.5}
_WEIGHTS |= dict.fromkeys(HEADS, 2.0) | dict.fromkeys(upsampled.SUBJECTS, 1.0)


class Session:
    """Runs cases on one device and keeps one record of them.

    Args:
        out: folder for the record.
        device: where to run.
        pictures: photographs that the feature maps are made from.
        console: for the progress bar and messages.
    """

    def __init__(self, out: Path, device: torch.device, pictures: list[Path], console: Console) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / RECORD
        self.device = device
        self.console = console
        self.features = features.Features(pictures, device)
        self.record = new_record(device, pictures)

    def measure_limits(self, dtypes: Iterable[str]) -> None:
        """Copy bandwidth and the fastest large product, in each of these dtypes."""
        self.record["limits"] = machine.limits(self.device, tuple(getattr(torch, name) for name in dtypes))
        self.save()

    def run(self, cases: Sequence[Case], options: Options) -> None:
        """Run the cases in order; past ``options.until`` the rest is named in the record as not run."""
        columns = (TextColumn("{task.fields[case]}"), BarColumn(), TextColumn("{task.fields[doing]}"))
        with Progress(*columns, TimeElapsedColumn(), console=self.console, transient=True) as progress:
            bar = progress.add_task("", total=len(cases), case="", doing="")
            for index, case in enumerate(cases):
                progress.update(bar, completed=index, case=case.name)
                gc.collect()
                gc.freeze()  # what was imported since: going over it took 0.2 s per memory probe
                if time.monotonic() >= options.until:
                    self.record["not_run"].append({"name": case.name, "reason": NO_TIME})
                    continue
                try:
                    run = CaseRun(
                        case,
                        self.features,
                        replace(options, share=_share(cases[index:])),
                        lambda doing, part, done=index: progress.update(bar, completed=done + part, doing=doing),
                    )
                    self.record["cases"].append(run.run())
                except Exception as error:  # such as inputs that do not fit; the other cases go on
                    self.record["not_run"].append({"name": case.name, "reason": first_line(error)})
                self.save()
        self.save()

    def save(self) -> None:
        """Write the record as it stands."""
        save(self.record, self.path)


def new_record(device: torch.device, pictures: Sequence[Path]) -> dict[str, Any]:
    """A record without cases: the environment, the input, what the numbers mean."""
    return {
        "schema": SCHEMA,
        "environment": machine.environment(device),
        "limits": {},
        "input": {"pictures": [p.name for p in pictures], "features": features.NOTE},
        "definitions": DEFINITIONS,
        "cases": [],
        "not_run": [],
    }


def _share(cases: Sequence[Case]) -> float:
    """Of the time left for these cases, the part of the first; a compilation counts like the case itself."""
    weights = [_WEIGHTS[case.subject] * (2 if case.compiled else 1) for case in cases]
    return weights[0] / sum(weights)


def save(record: dict[str, Any], path: Path) -> None:
    """Write a record; a reader never meets half a file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    temporary.replace(path)


def load(path: Path) -> dict[str, Any]:
    """A record from a file or from the folder that holds it."""
    file = path / RECORD if path.is_dir() else path
    record: dict[str, Any] = json.loads(file.read_text())
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{file}: expected a record of schema {SCHEMA}, got {record.get('schema')!r}")
    return record
