"""The folder that holds a campaign's record, and how it gets there.

    FOLDER/
      benchmark.json   the record: what `python -m benchmarks readme` reads, and the stages
      benchmark.md     the same for people, failures first
      log.txt          the campaign's own lines and the end of every stage's output
      stages/NAME/     what one stage writes as it goes: output.txt, result.json, outcomes.jsonl, junit.xml
      cache/           compiled kernels, shared by all stages

A stage's process writes into its own folder only. The campaign collects from there every second, so that whoever is
killed, stage or campaign, costs the last second; the next campaign collects what the killed one did not.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from benchmarks.records import RECORD, load, save

from .lines import outcomes_in
from .stages import Stage

TABLE, LOG, RESULT, OUTCOMES, OUTPUT, JUNIT = (
    "benchmark.md",
    "log.txt",
    "result.json",
    "outcomes.jsonl",
    "output.txt",
    "junit.xml",
)
DONE, PARTIAL, FAILED, RUNNING = "done", "not finished in time", "failed", "running"
UNFINISHED = 3
"""Exit code of a step that ended by itself because its seconds were over."""
MAX_FILES, MAX_FILE_BYTES = 8, 16 * 2**20
_LOG_BYTES = 8 * 2**20
_OUTPUT_BYTES = 512 * 2**10

Record = dict[str, Any]


class Store:
    """The record of one campaign, which earlier calls may have begun.

    Args:
        folder: where it lies; made if it is not there.
        out: where the files for people are copied to; None copies nothing.
        new: makes the record that a first call begins with.
    """

    def __init__(self, folder: Path, out: Path | None, new: Record) -> None:
        self.folder, self.out = folder, out
        (folder / "stages").mkdir(parents=True, exist_ok=True)
        self.had_caches = self.caches.exists()
        self.caches.mkdir(exist_ok=True)
        self.path = folder / RECORD
        self._collected: dict[Path, int] = {}
        self.unreadable: dict[Path, str] = {}
        self.record = new | {"stages": {}, "tests": {}}
        problem = self._take_over_earlier()
        self.notes = [] if problem is None else [problem]

    @property
    def caches(self) -> Path:
        return self.folder / "cache"

    def _take_over_earlier(self) -> str | None:
        """Go on with the record that lies here; the reason if that cannot be read."""
        if not self.path.exists():
            return None
        try:
            earlier = load(self.path)
        except (ValueError, OSError) as error:
            self.path.replace(self.path.with_suffix(".unreadable"))
            return f"the earlier record cannot be read and is begun anew: {error}"
        self.record = {"stages": {}, "tests": {}} | earlier
        for entry in self.record["stages"].values():  # nothing runs any more
            if entry["status"] == RUNNING:
                entry["status"] = PARTIAL
        self.collect()
        return None

    def place(self, stage: Stage) -> Path:
        """The folder of a stage."""
        path = self.folder / "stages" / self.place_name(stage.name)
        path.mkdir(exist_ok=True)
        return path

    @staticmethod
    def place_name(stage: str) -> str:
        """The name of a stage's folder: letters, digits and dashes."""
        return re.sub(r"[^A-Za-z0-9.-]+", "-", stage)

    def empty(self, stage: Stage) -> None:
        """Forget what a stage has written: it belongs to other sources. Measurements stay until they are made again."""
        place = self.place(stage)
        self.record["tests"] = {n: t for n, t in self.record["tests"].items() if t["stage"] != place.name}
        shutil.rmtree(place)
        self.unreadable.pop(place, None)
        self._collected = {path: stamp for path, stamp in self._collected.items() if path.parent != place}

    def entry(self, stage: Stage) -> Record:
        """What the record says about a stage; empty if nothing yet."""
        found: Record = self.record["stages"].get(stage.name, {})
        return found

    def collect(self) -> bool:
        """Take what the stages have written since into the record; whether there was anything."""
        news = False
        for path in sorted(self.folder.glob("stages/*/*")):
            if path.name not in (RESULT, OUTCOMES, RECORD):
                continue
            stamp = path.stat().st_mtime_ns
            if self._collected.get(path) == stamp:
                continue
            self._collected[path] = stamp
            try:
                self._take(path)
            except (ValueError, KeyError, TypeError) as error:  # it may be half written: the other half changes it
                self.unreadable[path.parent] = f"{path.name} cannot be read: {error}"
            else:
                self.unreadable.pop(path.parent, None)
                news = True
        return news

    def _take(self, path: Path) -> None:
        if path.name == OUTCOMES:
            for name, outcome in outcomes_in(path).items():
                self.record["tests"][name] = outcome | {"stage": path.parent.name}
        elif path.name == RESULT:
            for key, value in json.loads(path.read_text(errors="replace")).items():
                self.record[key] = {**self.record.get(key, {}), **value}
        else:
            self._take_measurements(load(path), path.parent)

    def _take_measurements(self, measured: Record, place: Path) -> None:
        """Take a session's cases in the place of those of other sources, or with fewer providers that were timed."""
        cases = {case["name"]: case for case in self.record["cases"]}
        trees = {self.place_name(name): entry["tree"] for name, entry in self.record["stages"].items()}
        tree = trees.get(place.name)
        for case in measured["cases"]:
            earlier = cases.get(case["name"])
            if earlier is None or earlier.get("tree") != tree or _timed(case) >= _timed(earlier):
                cases[case["name"]] = case | {"tree": tree}
        self.record["cases"] = list(cases.values())
        named = {entry["name"]: entry for entry in [*self.record["not_run"], *measured["not_run"]]}
        self.record["not_run"] = [entry for name, entry in named.items() if name not in cases]
        self.record["limits"] |= measured["limits"]
        self.record["input"] = measured["input"]
        own = {key: value for key, value in self.record["environment"].items() if key in ("command", "tree")}
        self.record["environment"] |= measured["environment"] | own

    def note(self, line: str) -> None:
        """Say a line, now and in the log."""
        print(line, flush=True)
        with (self.folder / "notes.txt").open("a", encoding="utf-8", errors="replace") as file:
            file.write(line + "\n")

    def save(self) -> None:
        """Write record and log, and copy them to where they are asked for."""
        save(self.record, self.path)
        self._write_log()
        self._publish([self.path, self.folder / LOG])

    def finish(self, table: str, pictures: list[Path]) -> None:
        """Write the Markdown file and copy all that a reader gets."""
        (self.folder / TABLE).write_text(table, encoding="utf-8", errors="replace")
        self.save()
        reports = sorted(self.folder.glob(f"stages/*/{JUNIT}"))
        named = [(self.folder / TABLE, TABLE), *((p, f"{p.parent.name}.xml") for p in reports)]
        named += [(picture, picture.name) for picture in pictures]
        for path, name in named[: MAX_FILES - 2]:  # record and log are there
            self._publish([path], name)

    def _write_log(self) -> None:
        parts = [_tail(self.folder / "notes.txt", _OUTPUT_BYTES)]
        for path in sorted(self.folder.glob(f"stages/*/{OUTPUT}"), key=lambda path: path.stat().st_mtime_ns):
            parts.append(f"\n== {path.parent.name}\n{_tail(path, _OUTPUT_BYTES)}")
        (self.folder / LOG).write_text("".join(parts)[:_LOG_BYTES], encoding="utf-8", errors="replace")

    def _publish(self, paths: list[Path], name: str | None = None) -> None:
        if self.out is None or self.out == self.folder:
            return
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            for path in paths:
                if path.stat().st_size <= MAX_FILE_BYTES:
                    shutil.copyfile(path, self.out / (name or path.name))
        except OSError as error:
            print(f"not copied to {self.out}: {error}", flush=True)


def _timed(case: Record) -> int:
    """How many providers of a case have times."""
    return sum("times_s" in provider for provider in case["providers"])


def _tail(path: Path, size: int) -> str:
    """The end of a file, whatever bytes it holds."""
    if not path.exists():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - size))
        return file.read().decode("utf-8", errors="replace")
