"""Runs the stages of one call: what is not done yet, in order, while there is time; every result at once on disk."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .processes import Process
from .stages import Stage, groups
from .store import DONE, FAILED, OUTPUT, PARTIAL, RUNNING, UNFINISHED, Store
from .tree import ROOT

RESERVE = 15.0
"""Seconds kept for tables and plots at the end."""
_TICK, _COLLECT = 0.1, 1.0
_LEAST = 3.0
"""Seconds below which no stage is started: Python alone takes that long to import PyTorch."""

Command = Callable[[Stage, Path, float], list[str]]


def step_command(stage: Stage, place: Path, seconds: float) -> list[str]:
    """The process of a stage: a step of ``steps.py``, told where to write and when to be done."""
    until = max(1.0, seconds - min(8.0, 0.1 * seconds))  # before it is stopped
    return [
        sys.executable,
        "-m",
        "tools.gpu.steps",
        "--place",
        str(place),
        "--seconds",
        f"{until:.1f}",
        stage.step,
        *stage.options,
    ]


class Campaign:
    """One call.

    Args:
        store: the record, with what earlier calls have done.
        budget: seconds that this call may take.
        tree: hash of the sources; a stage that failed with the same sources is not repeated.
        command: makes the command line of a stage; a rehearsal brings its own.
        scale: what the stages' seconds are multiplied by.
        reserve: seconds kept at the end.
        environment: variables for the stages.
        at_once: how many stages of a group run at the same time at most; None starts all of them.
    """

    def __init__(
        self,
        store: Store,
        budget: float,
        tree: str,
        command: Command = step_command,
        scale: float = 1.0,
        reserve: float = RESERVE,
        environment: Mapping[str, str] | None = None,
        at_once: int | None = None,
    ) -> None:
        self.at_once = at_once
        self.store, self.tree, self.command, self.scale = store, tree, command, scale
        self.end = time.monotonic() + budget - reserve
        self.least = _LEAST * scale
        caches = store.caches.resolve()
        self.environment = {
            "TRITON_CACHE_DIR": str(caches / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
            **(environment or {}),
        }
        self._collected_at = 0.0

    def run(self, stages: Sequence[Stage]) -> bool:
        """Run what is due; whether nothing failed."""
        due = [stage for stage in stages if self.is_due(stage)]
        for group in groups(due):
            left = self.end - time.monotonic()
            if left < self.least:
                self.store.note(f"{', '.join(stage.name for stage in group)}: no time left; call again to go on")
                continue
            self._run_group(group)
        self._collect(final=True)
        entries = self.store.record["stages"]
        return all(entries[stage.name]["status"] != FAILED for stage in stages if stage.name in entries)

    def is_due(self, stage: Stage) -> bool:
        """Whether there is something left to do: it is not done, or what it prepared belongs to other sources."""
        entry = self.store.entry(stage)
        if not entry or entry["status"] in (PARTIAL, RUNNING):
            return True
        changed = entry["tree"] != self.tree
        if stage.preparation:
            return bool(changed) or not self.store.had_caches
        return bool(entry["status"] == FAILED and changed)

    def _run_group(self, group: Sequence[Stage]) -> None:
        waiting = list(group)
        running: dict[Stage, Process] = {}
        try:
            while waiting or running:
                while waiting and len(running) < (self.at_once or len(group)):
                    self._start(waiting.pop(0), running)
                for stage, process in list(running.items()):
                    if process.poll():
                        self._finish(stage, process)
                        del running[stage]
                self._collect()
                if running:
                    time.sleep(_TICK * min(1.0, self.scale))
        finally:  # such as an interrupt
            for stage, process in running.items():
                process.stop()
                self._finish(stage, process)

    def _start(self, stage: Stage, running: dict[Stage, Process]) -> None:
        """Add the stage's process to those that are running; a stage that cannot start has failed."""
        if self.store.entry(stage).get("tree", self.tree) != self.tree:
            self.store.empty(stage)
        place = self.store.place(stage)
        self.store.record["stages"][stage.name] = {"status": RUNNING, "tree": self.tree}
        seconds = min(stage.seconds * self.scale, self.end - time.monotonic())
        log = place / OUTPUT
        log.unlink(missing_ok=True)
        try:
            running[stage] = Process(self.command(stage, place, seconds), log, seconds, self.environment, ROOT)
        except OSError as error:
            entry = {"status": FAILED, "tree": self.tree, "exit_code": None, "reason": str(error)}
            self.store.record["stages"][stage.name] = entry
            self.store.note(f"{stage.name}: {FAILED}: {error}")
        self.store.save()

    def _finish(self, stage: Stage, process: Process) -> None:
        self.store.collect()
        unreadable = self.store.unreadable.get(self.store.place(stage))
        if process.timed_out or (process.code == UNFINISHED and unreadable is None):
            status = PARTIAL
        else:
            status = DONE if process.code == 0 and unreadable is None else FAILED
        self.store.record["stages"][stage.name] = {
            "status": status,
            "tree": self.tree,
            "seconds": round(process.seconds, 2),
            "cpu_seconds": round(process.cpu_seconds, 2),
            "exit_code": process.code,
        }
        if unreadable is not None:
            self.store.record["stages"][stage.name]["reason"] = unreadable
        took = f"after {process.seconds:.1f} s ({process.cpu_seconds:.1f} s of CPU)"
        self.store.note(f"{stage.name}: {status} {took}" + (f": {unreadable}" if unreadable else ""))
        self._collect(final=True)

    def _collect(self, final: bool = False) -> None:
        """Once a second, and whenever a stage ends."""
        now = time.monotonic()
        if final or now - self._collected_at >= _COLLECT * min(1.0, self.scale):
            self._collected_at = now
            if self.store.collect() or final:
                self.store.save()
