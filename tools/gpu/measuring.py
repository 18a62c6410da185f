"""Steps that run the benchmark's cases: times of blocks and operators, their errors, their compiled peers."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import features, report
from benchmarks.cases import CASES, MODEL, Case, select
from benchmarks.problem import Contestant, Problem
from benchmarks.providers import EFFORTS, OURS, PLAIN, providers
from benchmarks.records import RECORD, load
from benchmarks.runner import NO_TIME, Options, first_line
from benchmarks.session import Session
from benchmarks.verify import check

from .store import RESULT, UNFINISHED

DEVICE = torch.device("cuda")
FIRST_SIZE = (97, 97)
SECONDS_PER_CASE = 2.0


def chosen_cases(options: Sequence[str]) -> tuple[list[Case], str, list[str]]:
    """Cases, effort and names of providers (all where none is named) from words: tags, HxW, effort=…, names.

    Training comes first: it is what the targets are about.
    """
    tags = [word for word in options if any(word in case.tags for case in CASES)]
    sizes = [tuple(map(int, word.split("x"))) for word in options if word.replace("x", "").isdigit()]
    (effort,) = [word.partition("=")[2] for word in options if word.startswith("effort=")] or ["standard"]
    if effort not in EFFORTS:
        raise ValueError(f"effort: expected one of {', '.join(EFFORTS)}, got {effort!r}")
    known = {p.name for case in select(tags) for p in providers(case, "full")}
    names = [word for word in options if word in known]
    cases = [case for case in select(tags) if not sizes or case.size in sizes]
    return sorted(cases, key=lambda case: not case.training), effort, names


def measure(
    place: Path, seconds: float, options: Sequence[str], device: torch.device = DEVICE, tiny: bool = False
) -> int:
    """A session over the chosen cases, whose record lies in ``place`` and grows with every case.

    Cases that it holds already, since an earlier call was not finished, are kept.

    Args:
        tiny: whether to try the step itself, on two tiny float32 cases of each stage.
    """
    cases, effort, names = chosen_cases(options)
    if tiny:
        small = [replace(c, size=(65, 65) if c.subject == MODEL else (9, 11), batch=1) for c in cases]
        cases = list(dict.fromkeys(replace(case, dtype="float32", layout="nchw") for case in small))[:2]
    until = time.monotonic() + seconds
    earlier = load(place)["cases"] if (place / RECORD).exists() else []
    cases = [case for case in cases if case.name not in {known["name"] for known in earlier}]
    session = Session(place, device, features.find_pictures(None))
    session.record["cases"] = earlier
    settings = Options(effort=effort, seconds=SECONDS_PER_CASE, until=until)
    if tiny:
        settings = replace(settings, seeds=1, seconds=0.05)
    if names:
        settings.choose = lambda case, effort: [p for p in providers(case, effort) if p.name in names]
    session.measure_limits(sorted({case.dtype for case in cases}))
    session.run(cases, settings)
    if report.ours_failed(session.record):
        return 1
    return UNFINISHED if any(entry["reason"] == NO_TIME for entry in session.record["not_run"]) else 0


def block_case(block: str, training: bool) -> Case:
    """The case that a block's stage begins with."""
    cases, *_ = chosen_cases(["gpu-blocks", "x".join(map(str, FIRST_SIZE))])
    (case,) = (c for c in cases if c.subject == block and c.training == training)
    return case


class RandomFeatures:
    """Random maps in the place of a backbone's: enough to compile for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def maps(self, case: Case) -> tuple[torch.Tensor, ...]:
        channels = (case.low_channels, case.channels) if case.low_channels else (case.channels,)
        return tuple(torch.randn(case.batch, c, *case.size, device=self.device) for c in channels)


def compile_peer(block: str, training: bool, peer: str) -> int:
    """One call of one compiled peer of a block; inductor keeps what it compiled for the benchmark."""
    case = block_case(block, training)
    (provider,) = (p for p in providers(case, "full") if p.name == peer)
    start = time.monotonic()
    contestant = Contestant(provider, Problem(case, RandomFeatures(DEVICE)))  # type: ignore[arg-type]
    contestant.calls()[0]()
    torch.cuda.synchronize()
    print(f"{peer} of {case.name} compiled in {time.monotonic() - start:.1f} s")
    return 0


def accuracy(place: Path, seconds: float, device: torch.device = DEVICE) -> int:
    """Output, gradients and statistics of one training step of each block, one image, judged by float64."""
    until = time.monotonic() + seconds
    source = features.Features(features.find_pictures(None), device)
    found: dict[str, Any] = {}
    for block in ("APNB", "AFNB"):
        case = replace(block_case(block, training=True), batch=1)
        errors: dict[str, str] = {}
        try:
            problem = Problem(case, source)
            entrants = [Contestant(p, problem) for p in providers(case, "quick") if p.name in (OURS, PLAIN)]

            def failed(contestant: Contestant, error: Exception, errors: dict[str, str] = errors) -> None:
                errors[contestant.provider.name] = first_line(error)

            verdicts = check(entrants, problem, 5, failed, lambda: time.monotonic() < until)
            found[case.name] = {name: asdict(verdict) for name, verdict in verdicts.items()} | errors
        except Exception as error:  # the other block goes on
            found[case.name] = {OURS: first_line(error)}
        (place / RESULT).write_text(json.dumps({"accuracy": found}))
        print(case.name, found[case.name])
    wrong = [name for name, verdicts in found.items() if not _is_right(verdicts.get(OURS))]
    return 1 if wrong else 0


def _is_right(verdict: Any) -> bool:
    return isinstance(verdict, dict) and bool(verdict["right"])


def run_small(device: torch.device = DEVICE) -> None:
    """One step of ours in every subject, dtype and layout, 17 × 19 pixels."""
    source = features.Features(features.find_pictures(None), device)
    cases = [case for case in CASES if case.subject != MODEL and case.channels in (256, 512, 2048)]
    small = {replace(case, size=(17, 19), batch=2, tags=(), compiled=False) for case in cases}
    for case in sorted(small, key=lambda case: case.name):
        (ours,) = (p for p in providers(case, "quick") if p.name == OURS)
        Contestant(ours, Problem(case, source)).calls()[0]()
        print(case.name)
