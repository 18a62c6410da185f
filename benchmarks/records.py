"""A record as a file: its name, its schema, what its numbers mean. Needs nothing but Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def save(record: dict[str, Any], path: Path) -> None:
    """Write a record; a reader never meets half a file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8", errors="replace")
    temporary.replace(path)


def load(path: Path) -> dict[str, Any]:
    """A record from a file or from the folder that holds it."""
    file = path / RECORD if path.is_dir() else path
    record: dict[str, Any] = json.loads(file.read_text())
    if record.get("schema") != SCHEMA:
        raise ValueError(f"{file}: expected a record of schema {SCHEMA}, got {record.get('schema')!r}")
    return record
