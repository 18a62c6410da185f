"""A stage's process in a rehearsal: what needs a GPU is played as it was told, the rest really runs on the stand-in.

    python -m tools.gpu.pretend --place FOLDER --behaviour WORD STEP [OPTIONS ...]

A played step writes files of the shape that the real step writes, a piece at a time.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import RECORD, SCHEMA, save

from .lines import append
from .store import OUTCOMES, RESULT

BEHAVIOURS = (
    "pass",
    "fail",
    "hang",
    "crash",
    "out of memory",
    "strange bytes",
    "unreadable result",
    "compile",
    "record",
)
"""The last two really run: warm-up and host path, on the stand-in in that mode."""
PIECE_SECONDS = 0.15


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.pretend", description=__doc__)
    parser.add_argument("--place", type=Path, required=True)
    parser.add_argument("--behaviour", choices=BEHAVIOURS, required=True)
    parser.add_argument("step")
    parser.add_argument("options", nargs="*")
    chosen = parser.parse_args(arguments)
    if chosen.behaviour in ("compile", "record"):
        from . import on_standin

        return on_standin.run(chosen.step, chosen.options, chosen.behaviour, chosen.place)
    return play(chosen.step, chosen.options, chosen.behaviour, chosen.place)


def play(step: str, options: Sequence[str], behaviour: str, place: Path) -> int:
    """Write the pieces of a step's result, and after the first of them do as told."""
    if behaviour == "strange bytes":
        os.write(1, b"\xff\xfe caf\xe9 \x80\n")
    for number, write in enumerate(pieces(step, options, place)):
        time.sleep(PIECE_SECONDS)
        write()
        print(f"piece {number + 1} of {step} is played")
        if behaviour == "hang":
            time.sleep(3600)
        elif behaviour == "crash":
            os.abort()
        elif behaviour == "fail":
            raise RuntimeError("told to fail")
        elif behaviour == "out of memory":
            raise MemoryError("CUDA out of memory, as told")
        elif behaviour == "unreadable result":
            (place / RESULT).write_text('{"products": {"512')
            return 0
    return 0


def pieces(step: str, options: Sequence[str], place: Path) -> Iterator[Any]:
    """Functions that each write one more piece of what a step would have found."""
    if step == "measure":
        yield from _measurements(place)
    elif step == "tests":
        for name in options:
            outcome = {"test": f"tests/{name}::test_played", "outcome": "passed", "seconds": 0.1}
            yield lambda outcome=outcome: append(place / OUTCOMES, outcome)
    elif step in ("profile", "accuracy", "products"):
        found: dict[str, Any] = {}
        for name in ("APNB", "AFNB"):
            found[f"{name}, played"] = _played(step)
            yield lambda found=dict(found): (place / RESULT).write_text(json.dumps({step: found}))
    elif step == "machine":
        yield lambda: (place / RESULT).write_text(json.dumps({"environment": {"device_name": "rehearsal"}}))
    else:
        yield lambda: print("nothing to write")


def _played(step: str) -> dict[str, Any]:
    if step == "accuracy":
        verdict = {"right": True, "tensor": "output 0", "error": 2e-3, "allowed": 4e-3, "seeds": 5, "maps": "played"}
        return {"ours": verdict}
    if step == "products":
        return {"flop": 1, "forward, convolution": [1e-4, 1e-4, 1e-4]}
    rows = [{"kernel": "played_kernel", "calls": 1.0, "us": 10.0, "floor_us": 8.0}]
    return {"ours": {"source": "played", "device_us": 10.0, "host_us": 20.0, "step_us": 25.0, "kernels": rows}}


def _measurements(place: Path) -> Iterator[Any]:
    """Three cases, as a session writes them."""
    environment = {"device": "cuda", "device_name": "rehearsal without a GPU", "threads": 1}
    record: dict[str, Any] = {"schema": SCHEMA, "environment": environment, "limits": {}, "cases": [], "not_run": []}
    record["input"] = {"pictures": [], "features": "none: nothing was measured"}
    for number in range(3):
        name = f"{place.name}, case {number}, played"
        case: dict[str, Any] = {"name": name, "mode": "training step", "subject": "APNB", "training": True}
        case |= {"size": [97, 97], "channels": 512, "batch": 8, "dtype": "bfloat16", "layout": "channels_last"}
        case |= {"minimal_bytes": 1, "left_out": []}
        case["providers"] = [
            {
                "name": name,
                "family": "asymmetric",
                "status": "ok",
                "times_s": [s] * 3,
                "quartiles_s": [s] * 3,
                "flop": 1,
            }
            for name, s in (("ours", 1e-3), ("plain eager", 3e-3))
        ]
        record["cases"] = [*record["cases"], case]
        yield lambda made=dict(record): save(made, place / RECORD)


if __name__ == "__main__":
    sys.exit(main())
