"""A run over several cases: its record, written after each case, and the progress that a reader watches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import features, machine, plausible, upsampled
from .cases import MODEL, PAIR, Case
from .heads import HEADS
from .records import DEFINITIONS, RECORD, SCHEMA, save
from .runner import NO_TIME, CaseRun, Options, first_line

Watch = Callable[[str, float, str], None]
"""Called with the case that runs, the share of all cases that is done (0 to 1), and what is being done."""
_WEIGHTS = {"pyramid_pool": 1.0, "asymmetric_attention": 1.5, "APNB": 2.0, "AFNB": 3.0, PAIR: 1.5, MODEL: 3.5}
_WEIGHTS |= dict.fromkeys(HEADS, 2.0) | dict.fromkeys(upsampled.SUBJECTS, 1.0)


class Session:
    """Runs cases on one device and keeps one record of them.

    Args:
        out: folder for the record.
        device: where to run.
        pictures: photographs that the feature maps are made from.
        watch: is told of the progress.
    """

    def __init__(
        self, out: Path, device: torch.device, pictures: list[Path], watch: Watch = lambda case, done, doing: None
    ) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / RECORD
        self.device = device
        self.watch = watch
        self.features = features.Features(pictures, device)
        self.record = new_record(device, pictures)

    def measure_limits(self, dtypes: Iterable[str]) -> None:
        """Copy bandwidth and the fastest large product, in each of these dtypes."""
        self.record["limits"] = machine.limits(self.device, tuple(getattr(torch, name) for name in dtypes))
        self.save()

    def run(self, cases: Sequence[Case], options: Options) -> None:
        """Run the cases in order; past ``options.until`` the rest is named in the record as not run."""
        for index, case in enumerate(cases):
            self.watch(case.name, index / len(cases), "")
            if time.monotonic() >= options.until:
                self.record["not_run"].append({"name": case.name, "reason": NO_TIME})
                continue
            try:
                run = CaseRun(
                    case,
                    self.features,
                    replace(options, share=_share(cases[index:])),
                    lambda doing, part, case=case, index=index: self.watch(
                        case.name, (index + part) / len(cases), doing
                    ),
                )
                self.record["cases"].append(run.run())
                plausible.refuse(self.record["cases"][-1], self.record["limits"], self.device)
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
