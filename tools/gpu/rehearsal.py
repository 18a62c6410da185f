"""``python -m tools.gpu.rehearsal``: the whole campaign without a GPU, in its real process structure.

Warm-up and the host path of blocks and operators run on the stand-in driver (tools/standin): kernels are compiled for
sm_90, launches checked and not run. Build, tests, accuracy, profile and times need a GPU; their processes play that
they pass, fail, hang, crash or run out of memory. Exit code 1 where scheduling, record or host path is wrong.

``--short`` compiles nothing, goes through one share of the warm-up, and counts no seconds. The last lines say what a
rehearsal cannot show.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.records import RECORD

from .__main__ import BUDGET, new_record
from .campaign import RESERVE, Campaign, Command
from .finish import finish
from .stages import STAGES, Stage
from .steps import WORKERS
from .store import DONE, FAILED, MAX_FILE_BYTES, MAX_FILES, PARTIAL, Record, Store
from .tree import ROOT

CORES = 16
"""Of the machine that seconds are counted for."""
PLAYED_SECONDS = 30.0
"""The limit of a played stage, in which it only writes a few lines; a hang takes all of it."""
REAL_SECONDS = 1800.0
"""The limit of a stage that really compiles. It only ends a hang: what counts is CPU time, see ``counted``."""
HOST_PATH = Stage("host path", "host path")
FAULTS = {
    "profile": "fail",
    "accuracy": "out of memory",
    "blocks 97×97": "hang",
    "products": "unreadable result",
    "operators": "crash",
    "paper": "strange bytes",
}
EXPECTED = {"fail": FAILED, "out of memory": FAILED, "hang": PARTIAL, "crash": FAILED, "unreadable result": FAILED}
CANNOT_SHOW = (
    "whether a kernel computes what it should: nothing is executed, results are garbage",
    "times, and with them whether peers, profile and benchmark fit into their seconds",
    "how long inductor compiles the peers for a GPU",
    "whether nvcc's object runs, and CUDA graphs, streams and deterministic mode",
    "errors that only the hardware finds: illegal addresses, races, misaligned accesses",
)


class Wrong(Exception):
    """What the rehearsal has found."""


def require(condition: bool, message: str) -> None:
    """Raise unless ``condition`` holds."""
    if not condition:
        raise Wrong(message)


def command_with(behaviours: Mapping[str, str]) -> Command:
    """Commands of played stages; a stage that is not named passes."""

    def command(stage: Stage, place: Path, seconds: float) -> list[str]:
        told = ["--behaviour", behaviours.get(stage.name, "pass")]
        return [sys.executable, "-m", "tools.gpu.pretend", "--place", str(place), *told, stage.step, *stage.options]

    return command


def rehearsed(short: bool) -> tuple[list[Stage], dict[str, str]]:
    """The stages of a first call with their limits here, and how each behaves."""
    mode = "record" if short else "compile"
    stages, behaviours = [], {HOST_PATH.name: mode}
    for stage in [s for s in STAGES if not s.full]:
        real = stage.step == "warm-up" and (not short or stage.options[0] == "1")
        if real:
            behaviours[stage.name] = mode
        if real or not short or not stage.preparation or stage.step == "build":
            stages.append(replace(stage, seconds=REAL_SECONDS if real else PLAYED_SECONDS))
    return [*stages, replace(HOST_PATH, seconds=REAL_SECONDS)], behaviours


def campaign(folder: Path, behaviours: Mapping[str, str], tree: str = "one", budget: float = math.inf) -> Campaign:
    """A campaign of played stages on the record in ``folder``, no more of them at once than there are cores."""
    store = Store(folder / "record", folder / "out", new_record())
    return Campaign(store, budget, tree, command_with(behaviours), reserve=0.0, at_once=os.cpu_count())


def statuses(record: Record) -> dict[str, str]:
    return {name: entry["status"] for name, entry in record["stages"].items()}


def on_disk(folder: Path) -> Record:
    """The record as a reader finds it."""
    record: Record = json.loads((folder / "record" / RECORD).read_text())
    return record


# What is rehearsed


def everything_passes(folder: Path, short: bool) -> Record:
    """All stages once: each is done, the record holds what each wrote, and the copies are as they were asked for."""
    stages, behaviours = rehearsed(short)
    run = campaign(folder, behaviours)
    fine = run.run(stages)
    finish(run.store, "one")
    record = on_disk(folder)
    bad = {name: status for name, status in statuses(record).items() if status != DONE}
    require(fine and not bad, f"stages that should pass: {bad}; see {folder / 'record' / 'log.txt'}")
    require(list(record["stages"]) == [stage.name for stage in stages], "stages ran in another order than the table's")
    require(len(record["cases"]) == 12, "the record lacks the cases that were played")
    require({"profile", "accuracy", "products", "standin"} <= set(record), "the record lacks a step's result")
    require(len(record["tests"]) > 3, "the record lacks the tests that were played")
    files = [path for path in (folder / "out").rglob("*") if path.is_file()]
    require(1 < len(files) <= MAX_FILES, f"{len(files)} files were copied, {MAX_FILES} are allowed")
    require(all(path.stat().st_size <= MAX_FILE_BYTES for path in files), "a copied file is too large")
    require(
        "Nothing failed" in (folder / "out" / "benchmark.md").read_text().splitlines()[0], "the summary's first line"
    )
    due = [stage.name for stage in stages if campaign(folder, behaviours).is_due(stage)]
    require(not due, f"a second call would repeat {due}")
    return record


def faults_cost_one_stage(folder: Path) -> None:
    """Each fault costs its own stage; the next call repeats what was not finished, other sources what failed."""
    stages = [replace(s, seconds=3.0 if FAULTS.get(s.name) == "hang" else PLAYED_SECONDS) for s in STAGES if not s.full]
    stages = [s for s in stages if s.together is None or s.name in ("machine", "build", "tests of blocks")]
    run = campaign(folder, FAULTS)
    require(not run.run(stages), "a campaign with failures says that all is fine")
    finish(run.store, "one")
    record = on_disk(folder)
    expected = {stage.name: EXPECTED.get(FAULTS.get(stage.name, ""), DONE) for stage in stages}
    require(statuses(record) == expected, f"expected {expected}, got {statuses(record)}")
    log = (folder / "out" / "log.txt").read_text(encoding="utf-8")
    require("told to fail" in log and "caf" in log, "the log lacks a traceback or the line of strange bytes")
    require(
        (folder / "out" / "benchmark.md").read_text().startswith("**WRONG"), "the summary does not begin with failures"
    )
    measured = {case["name"] for case in record["cases"]}
    require(len(measured) == 1 + 1 + 3 + 3, "what hanging and crashing stages had measured is lost")
    due = [stage.name for stage in stages if campaign(folder, {}).is_due(stage)]
    require(due == ["blocks 97×97"], f"a second call of the same sources should repeat what hung, not {due}")
    again = campaign(folder, {}, tree="two")
    due = [stage.name for stage in stages if again.is_due(stage)]
    failed = [name for name, status in expected.items() if status == FAILED]
    require(set(due) == {"build", "blocks 97×97", *failed}, f"other sources should repeat what failed, got {due}")
    require(again.run(stages), "what was mended still fails")
    require(set(statuses(on_disk(folder)).values()) == {DONE}, "what was mended is not done")


def a_kill_loses_a_second(folder: Path) -> None:
    """SIGKILL in the middle of a stage: the record holds its cases so far, nothing runs on, the next call goes on."""
    code = f"from tools.gpu.rehearsal import run_hanging; run_hanging({str(folder)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: (folder / "record" / RECORD).exists() and len(on_disk(folder)["cases"]) > 0, 60)
        children = children_of(process.pid)
        require(bool(children), "no stage is running")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() and not is_zombie(child) for child in children), 10)
    record = on_disk(folder)
    require(statuses(record)["products"] == DONE, "the stage before the kill is lost")
    require(len(record["cases"]) > 0, "the cases before the kill are lost")
    run = campaign(folder, {})
    stages = hanging_stages()
    require(
        [s.name for s in stages if run.is_due(s)] == ["operators"], "the next call does not go on with what was cut"
    )
    require(run.run(stages) and statuses(on_disk(folder))["operators"] == DONE, "the next call does not finish it")


def hanging_stages() -> list[Stage]:
    return [replace(s, seconds=300.0) for s in STAGES if s.name in ("products", "operators")]


def run_hanging(folder: str) -> None:
    """A campaign whose second stage hangs after its first case; it is to be killed."""
    campaign(Path(folder), {"operators": "hang"}).run(hanging_stages())


def no_time_is_said(folder: Path) -> None:
    """A call without time starts nothing, and the next one still finds everything to do."""
    stage = replace(STAGES[-1], full=False)
    run = campaign(folder, {}, budget=0.0)
    require(run.run([stage]) and not run.store.record["stages"], "a stage began without time")


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        require(time.monotonic() < end, "it did not happen in time")
        time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in path.read_text().split()] if path.exists() else []


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


# Counted time


def counted(record: Record, cores: int = CORES) -> list[tuple[str, float]]:
    """Seconds of every stage on ``cores`` cores.

    Processes that run together share the cores evenly. A warm-up needs the CPU seconds that it took here; all others
    could only be played, and count as busy until their limit: tests with all their workers, everything else with one
    process. What runs alone counts with its limit.
    """
    first = [stage for stage in STAGES if stage.together is not None]
    busy = sum(WORKERS if stage.step == "tests" else 1 for stage in first if stage.step != "warm-up")
    needs = sorted(cpu_seconds(record, stage) for stage in first if stage.step == "warm-up")
    warmed_up = done = 0.0
    for finished, need in enumerate(needs):
        warmed_up += (need - done) * max(1.0, (busy + len(needs) - finished) / cores)
        done = need
    alone = [(stage.name, stage.seconds) for stage in STAGES if stage.together is None and not stage.full]
    return [
        (f"first group, in which warm-up takes {warmed_up:.1f}", max(warmed_up, *(stage.seconds for stage in first))),
        *alone,
        ("tables and plots", RESERVE),
    ]


def fits(record: Record) -> bool:
    """Print the counted seconds; whether they are within what a call may take."""
    rows = counted(record)
    total = sum(seconds for _, seconds in rows)
    print(f"Seconds on {CORES} cores, warm-up counted from its CPU seconds here, the rest by its limits:")
    for name, seconds in [*rows, (f"in all, {BUDGET:.0f} allowed", total)]:
        print(f"{seconds:8.1f}  {name}")
    if total > BUDGET:
        print("WRONG: the stages do not fit into a call")
    return total <= BUDGET


def cpu_seconds(record: Record, stage: Stage) -> float:
    return float(record["stages"].get(stage.name, {}).get("cpu_seconds", 0.0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Rehearse; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.rehearsal", description=__doc__)
    parser.add_argument("--short", action="store_true", help="compile nothing; the form for CI")
    parser.add_argument(
        "--folder", type=Path, help="where the records of the rehearsal stay (default: a temporary one)"
    )
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (chosen.folder or Path(temporary)).resolve()
        parts: list[tuple[str, Callable[[Path], Any]]] = [
            ("every stage passes and is recorded", lambda path: everything_passes(path, chosen.short)),
            ("planted faults cost one stage each", faults_cost_one_stage),
            ("a kill loses a second at most", a_kill_loses_a_second),
            ("without time nothing begins", no_time_is_said),
        ]
        wrong = 0
        record: Record = {"stages": {}}
        for number, (name, part) in enumerate(parts):
            print(f"== {name}", flush=True)
            try:
                result = part(folder / str(number))
            except Wrong as error:
                wrong += 1
                print(f"WRONG: {name}: {error}", flush=True)
            else:
                record = result or record
                print(f"right: {name}", flush=True)
    for stage, counts in record.get("standin", {}).items():
        print(f"{stage}: {counts}")
    wrong += 0 if chosen.short or fits(record) else 1
    print("A rehearsal cannot show:", *(f"  {line}" for line in CANNOT_SHOW), sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
