"""``python -m benchmarks.gpu``: everything a GPU machine is asked for, in stages, each recorded before the next.

Every stage is a process of its own under a deadline, so that a crash or a hang costs that stage alone. The folder then
holds one JSON record, one Markdown file, plots and a log. Called again, it goes on with what is not done yet; a record
of another commit is begun anew.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from . import features, report
from .__main__ import write
from .cases import CASES, Case, select
from .machine import ROOT
from .problem import Contestant, Problem
from .providers import NAIVE, OURS, PLAIN, providers
from .runner import Options
from .session import RECORD, Session, load, new_record, save

LOG, SKIP = "log.txt", "skip.json"
LOG_BYTES = 4 * 2**20
RESERVE = 15.0  # seconds kept for the tables and plots at the end
DRY_PATIENCE = 3  # a CPU on which the script is only tried may be slow or shared
DONE, PARTIAL, FAILED = "done", "not finished in time", "failed"


@dataclass(frozen=True)
class Stage:
    """A command, or cases to measure.

    Args:
        name: in record and log.
        seconds: what it may take at most.
        command: to run, after the Python interpreter; None for cases.
        dry_command: in its place when there is no GPU and only the script is tried.
        tags, effort, only_providers: which cases to measure, with whom; no providers named means all of the effort.
        full: part of ``--full`` only.
    """

    name: str
    seconds: float
    command: tuple[str, ...] | None = None
    dry_command: tuple[str, ...] = ("-c", "pass")
    tags: tuple[str, ...] = ()
    effort: str = "quick"
    only_providers: tuple[str, ...] = ()
    full: bool = False


_BLOCK_PEERS = (OURS, PLAIN, "plain compiled", "collapsed plain")
_SANITIZE = ("-m", "benchmarks.gpu", "--sanitize")
STAGES = (
    Stage("build", 150, ("setup.py", "build_ext", "--inplace"), dry_command=("setup.py", "--version")),
    Stage(
        "tests", 150, ("-m", "pytest", "-m", "gpu", "-x"), dry_command=("-m", "pytest", "-m", "gpu", "--collect-only")
    ),
    Stage("operators", 120, tags=("gpu-operators",), effort="standard"),
    Stage("blocks", 200, tags=("gpu-blocks",), effort="standard", only_providers=_BLOCK_PEERS),
    Stage("paper", 60, tags=("paper-gpu",), only_providers=(OURS, PLAIN, NAIVE)),
    Stage("blocks, all peers", 400, tags=("gpu-blocks",), effort="standard", full=True),
    Stage("models", 400, tags=("gpu-models",), effort="standard", full=True),
    Stage("sizes", 300, tags=("sizes",), effort="standard", full=True),
    Stage("memory checker", 400, _SANITIZE, dry_command=_SANITIZE, full=True),
    Stage("remaining shapes", 500, tags=("gpu-rest",), effort="standard", full=True),
    Stage("max-autotune", 500, tags=("gpu-blocks",), effort="full", full=True),
)


def stage_cases(stage: Stage, dry: bool) -> list[Case]:
    """The cases of a stage; tiny float32 ones, two of a kind at most, when the script is only tried."""
    cases = select(stage.tags)
    if not dry:
        return cases
    tiny = [replace(case, size=(65, 65) if case.subject == "ANNNet" else (9, 11), batch=1) for case in cases]
    return list(dict.fromkeys(replace(case, dtype="float32", layout="nchw") for case in tiny))[:2]


def measure_stage(stage: Stage, scratch: Path, seconds: float, dry: bool) -> int:
    """The body of a measuring stage, in its own process: a session whose record lies in ``scratch``.

    Cases named in the list that the parent left there are done already.
    """
    skipped = set(json.loads((scratch / SKIP).read_text()))
    session = Session(scratch, _device(dry), features.find_pictures(None), Console())
    cases = [case for case in stage_cases(stage, dry) if case.name not in skipped]
    options = Options(effort=stage.effort, seconds=2.0, until=time.monotonic() + seconds)
    if dry:
        options = replace(options, seeds=1, seconds=0.05, effort="quick")
    if stage.only_providers:
        options.choose = lambda case, effort: [p for p in providers(case, effort) if p.name in stage.only_providers]
    session.measure_limits(sorted({case.dtype for case in cases}))
    session.run(cases, options)
    return 1 if report.ours_failed(session.record) else 0


def _device(dry: bool) -> torch.device:
    return torch.device("cpu" if dry else "cuda")


def sanitize(dry: bool) -> int:
    """Every kernel of ours once on a small odd shape under NVIDIA's memory checker, where it is installed."""
    checker = shutil.which("compute-sanitizer")
    small = [sys.executable, "-m", "benchmarks.gpu", "--small"]
    if dry:
        return subprocess.run([*small, "--dry-run"], cwd=ROOT).returncode
    if checker is None:
        print("compute-sanitizer is not installed here: not checked")
        return 0
    return subprocess.run([checker, "--tool", "memcheck", "--error-exitcode", "9", *small], cwd=ROOT).returncode


def run_small(dry: bool) -> int:
    """One step of ours in every subject, dtype and layout, 17 × 19 pixels."""
    source = features.Features(features.find_pictures(None), _device(dry))
    cases = [case for case in CASES if case.subject != "ANNNet" and case.channels in (256, 512, 2048)]
    small = {replace(case, size=(17, 19), batch=2, tags=(), compiled=False) for case in cases}
    for case in sorted(small, key=lambda case: case.name):
        problem = Problem(case, source)
        (ours,) = (p for p in providers(case, "quick") if p.name == OURS)
        Contestant(ours, problem).calls()[0]()
        print(case.name, flush=True)
    return 0


class Campaign:
    """The stages of one call, and the record they leave in ``out``."""

    def __init__(self, out: Path, budget: float, dry: bool) -> None:
        self.out, self.dry = out, dry
        self.end = time.monotonic() + budget
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / RECORD
        self.record = new_record(_device(dry), features.find_pictures(None)) | {"stages": {}}
        if self.path.exists():
            earlier = load(self.path)
            if earlier["environment"]["commit"] == self.record["environment"]["commit"]:
                self.record = {"stages": {}} | earlier

    def run(self, stages: Sequence[Stage]) -> bool:
        """Run what is not done yet while there is time; whether nothing failed."""
        for stage in stages:
            if self.record["stages"].get(stage.name, {}).get("status") in (DONE, FAILED):
                continue
            left = self.end - time.monotonic() - RESERVE
            if left < 1:
                self._note(f"{stage.name}: no time left; call again to go on")
                continue
            seconds = stage.seconds * (DRY_PATIENCE if self.dry else 1)
            self._run_stage(stage, min(seconds, left))
        if self.record["cases"]:
            write(self.record, self.out)
        return all(entry["status"] != FAILED for entry in self.record["stages"].values())

    def _run_stage(self, stage: Stage, seconds: float) -> None:
        start = time.monotonic()
        finished = self.record["stages"].get(stage.name, {}).get("cases", [])
        with tempfile.TemporaryDirectory() as name:
            scratch = Path(name)
            (scratch / SKIP).write_text(json.dumps(finished))
            status, output = _execute([sys.executable, *self._arguments(stage, scratch, seconds)], seconds)
            if (scratch / RECORD).exists():
                measured = load(scratch / RECORD)
                self._merge(measured)
                finished = [*finished, *(case["name"] for case in measured["cases"])]
                if measured["not_run"] and status == DONE:
                    status = PARTIAL
        self.record["stages"][stage.name] = {
            "status": status,
            "seconds": round(time.monotonic() - start, 1),
            "cases": finished,
            "end_of_output": output[-2000:],
        }
        save(self.record, self.path)
        self._log(f"== {stage.name}\n{output}\n")
        self._note(f"{stage.name}: {status} after {time.monotonic() - start:.0f} s")

    def _arguments(self, stage: Stage, scratch: Path, seconds: float) -> tuple[str, ...]:
        """What the interpreter is called with; a measuring stage gets some seconds less, to end by itself."""
        arguments = stage.dry_command if self.dry else stage.command
        if stage.command is None:
            limit = f"{max(seconds - 10, 1):.0f}"
            arguments = ("-m", "benchmarks.gpu", "--stage", stage.name, "--scratch", str(scratch), "--seconds", limit)
        assert arguments is not None
        return (*arguments, "--dry-run") if self.dry and "benchmarks.gpu" in arguments else arguments

    def _merge(self, measured: dict[str, Any]) -> None:
        """Take a stage's cases into the record; a case measured before with fewer peers is replaced."""
        cases = {case["name"]: case for case in [*self.record["cases"], *measured["cases"]]}
        self.record["cases"] = list(cases.values())
        self.record["limits"] |= measured["limits"]
        self.record["environment"] = measured["environment"] | {"command": self.record["environment"]["command"]}

    def _log(self, text: str) -> None:
        """Append, keeping the end where the log grows too long."""
        log = self.out / LOG
        old = log.read_bytes() if log.exists() else b""
        log.write_bytes((old + text.encode())[-LOG_BYTES:])

    def _note(self, line: str) -> None:
        print(line, flush=True)
        self._log(line + "\n")


def _execute(command: list[str], seconds: float) -> tuple[str, str]:
    """Run a process group under a deadline; its outcome and output."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        output, _ = process.communicate()
        return PARTIAL, output
    return (DONE if process.returncode == 0 else FAILED), output


def main(arguments: list[str] | None = None) -> int:
    """Run the stages, or one stage in its own process; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "bench-results")))
    parser.add_argument("--budget", type=float, default=float(os.environ.get("BUDGET", "540")), help="seconds")
    parser.add_argument("--full", action="store_true", help="go on with the rest; call again until all is done")
    parser.add_argument("--dry-run", action="store_true", help="try the script itself on a CPU, with tiny shapes")
    parser.add_argument("--stages", nargs="+", choices=[stage.name for stage in STAGES], help="these alone")
    parser.add_argument("--stage", choices=[stage.name for stage in STAGES], help=argparse.SUPPRESS)
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--sanitize", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--small", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if not chosen.dry_run and not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: PyTorch sees no CUDA GPU here; --dry-run tries the script on the CPU\n")
    if chosen.stage:
        (stage,) = (stage for stage in STAGES if stage.name == chosen.stage)
        return measure_stage(stage, chosen.scratch, chosen.seconds, chosen.dry_run)
    if chosen.sanitize:
        return sanitize(chosen.dry_run)
    if chosen.small:
        return run_small(chosen.dry_run)
    stages = [s for s in STAGES if (s.name in chosen.stages if chosen.stages else chosen.full or not s.full)]
    return 0 if Campaign(chosen.out.resolve(), chosen.budget, chosen.dry_run).run(stages) else 1


if __name__ == "__main__":
    sys.exit(main())
