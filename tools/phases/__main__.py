"""What one training step sends to a GPU, launch by launch, and the least time that it can take there: no GPU needed.

    python -m tools.phases [--arch 90] [--json] [--record FILE]

Both blocks in bfloat16 autocast, channels_last. A floor is the larger of bytes over bandwidth and FLOP over rate, every
operand moved once; it is derived, not measured. Launches of this package are compiled for the architecture, which
tells how many programs one multiprocessor runs at a time, and so how many waves a launch takes.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

from ..compile_table.table import DEVICES, compile_row
from .gpus import GPUS, Gpu
from .step import BLOCKS, Phase, phases_of

OTHERS = "library calls"


@dataclass(frozen=True)
class Row:
    """A line of the table: ``calls`` equal launches. Bytes, FLOP and microseconds are those of all of them."""

    name: str
    ours: bool
    calls: int
    bytes: int
    flop: int
    floor_us: float
    programs: int | None
    programs_per_multiprocessor: int | None
    waves: float | None


def rows_of(phases: Iterable[Phase], gpu: Gpu, compiled: bool) -> list[Row]:
    """Equal neighbours and equal calls of PyTorch become one row, in the order of their first appearance."""
    groups: dict[Any, list[Phase]] = {}
    for phase in phases:
        grid = phase.launch.grid if phase.launch else None
        groups.setdefault((phase.name, phase.size, phase.flop, phase.kind, grid), []).append(phase)
    return [_row(group[0], len(group), gpu, compiled) for group in groups.values()]


def _row(phase: Phase, calls: int, gpu: Gpu, compiled: bool) -> Row:
    programs = per_multiprocessor = waves = None
    if phase.launch is not None:
        programs = prod(phase.launch.grid)
        if compiled:
            made = compile_row("any", "any", phase.launch, gpu.arch)
            if not made.programs:
                raise RuntimeError(f"{made.kernel}: {made.fault}")
            per_multiprocessor = made.programs
            waves = programs / (per_multiprocessor * DEVICES[gpu.arch].multiprocessors)
    floor = calls * gpu.seconds(phase.size, phase.flop, phase.kind) * 1e6
    return Row(
        phase.name,
        phase.launch is not None,
        calls,
        calls * phase.size,
        calls * phase.flop,
        floor,
        programs,
        per_multiprocessor,
        waves,
    )


def sums(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Launches, bytes, FLOP and floor: ours, the library's, and of all."""
    return {
        name: {
            "launches": sum(row.calls for row in chosen),
            "bytes": sum(row.bytes for row in chosen),
            "flop": sum(row.flop for row in chosen),
            "floor_us": sum(row.floor_us for row in chosen),
        }
        for name, chosen in (
            ("ours", [row for row in rows if row.ours]),
            (OTHERS, [row for row in rows if not row.ours]),
            ("all", rows),
        )
    }


_COLUMNS = "{:44}{:>6}{:>10}{:>10}{:>10}{:>8}{:>10}{:>8}{:>8}{:>12}".format


def lines(rows: Sequence[Row], measured: dict[str, float]) -> Iterable[str]:
    """The table; what a record measured stands beside the first line of a kernel, for all its launches together."""
    whole = sum(row.floor_us for row in rows)
    yield _COLUMNS("", "calls", "MB", "GFLOP", "floor µs", "share", "programs", "per mp", "waves", "measured µs")
    seen: set[str] = set()
    for row in rows:
        found = measured.get(row.name) if row.name not in seen else None
        seen.add(row.name)
        yield _COLUMNS(
            row.name.removeprefix("aten."),
            row.calls,
            f"{row.bytes / 1e6:.2f}",
            f"{row.flop / 1e9:.2f}",
            f"{row.floor_us:.1f}",
            f"{row.floor_us / whole:.1%}",
            *("" if x is None else x for x in (row.programs, row.programs_per_multiprocessor)),
            "" if row.waves is None else f"{row.waves:.2f}",
            "" if found is None else f"{found:.1f}",
        )
    for name, total in sums(rows).items():
        yield _COLUMNS(
            name,
            int(total["launches"]),
            f"{total['bytes'] / 1e6:.2f}",
            f"{total['flop'] / 1e9:.2f}",
            f"{total['floor_us']:.1f}",
            f"{total['floor_us'] / whole:.1%}",
            "",
            "",
            "",
            f"{measured[name]:.1f}" if name in measured else "",
        )


def measured_of(record: Path, block: str, names: set[str]) -> dict[str, float]:
    """Microseconds of each of our kernels, by name and all its launches together, and the sums, from a GPU's profile.

    Args:
        record: the profile stage's ``result.json``.
        names: of our kernels.
    """
    profile = json.loads(record.read_text())["profile"]
    (table,) = (tables["ours"] for case, tables in profile.items() if block.lower() in case.lower())
    found: Counter[str] = Counter()
    for row in table["kernels"]:
        known = row["kernel"] in names
        found[row["kernel"] if known else OTHERS] += row["us"]
        found["ours"] += row["us"] if known else 0
        found["all"] += row["us"]
    return dict(found)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables; with ``--json``, as one line that comes last."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.phases", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, choices=GPUS, default=90, help="architecture")
    parser.add_argument("--blocks", nargs="+", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--map", nargs=2, type=int, default=[97, 97], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--json", action="store_true", help="print one line of JSON last")
    parser.add_argument("--record", type=Path, help="result.json of a GPU campaign's profile, to print beside")
    parser.add_argument("--no-compile", action="store_true", help="leave out what only machine code tells")
    chosen = parser.parse_args(arguments)
    gpu, device = GPUS[chosen.arch], DEVICES[chosen.arch]
    found: dict[str, Any] = {}
    print(f"{gpu.name}, sm_{gpu.arch}: {gpu.bandwidth / 1e12:g} TB/s, {gpu.products['bfloat16'] / 1e12:g} TFLOP/s in")
    print(f"bfloat16 ({gpu.source}). All numbers are derived unless they are called measured.")
    for block in chosen.blocks:
        phases = phases_of(block, device, chosen.batch, *chosen.map)
        rows = rows_of(phases, gpu, not chosen.no_compile)
        names = {row.name for row in rows if row.ours}
        measured = measured_of(chosen.record, block, names) if chosen.record else {}
        print(f"\n{block}, batch {chosen.batch}, {chosen.map[0]}×{chosen.map[1]}, training step")
        print(*lines(rows, measured), sep="\n")
        idle = sum(row.floor_us * (ceil(row.waves) / row.waves - 1) for row in rows if row.waves and row.waves > 1)
        if not chosen.no_compile:
            print(f"Multiprocessors without work in the last waves of launches add {idle:.1f} µs at least.")
        found[block] = {"launches": [vars(row) for row in rows], "sums": sums(rows), "measured_us": measured}
    if chosen.json:
        print(json.dumps({"gpu": gpu.name, "arch": gpu.arch, "rates": gpu.source, "derived": True, "blocks": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
