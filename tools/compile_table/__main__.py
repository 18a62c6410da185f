"""Compile every Triton kernel that the package can launch, without a GPU, and read what became of it.

    python -m tools.compile_table [--json FILE] [--arch 90 ...] [--kernel NAME] [--jobs N]

The kernel modules say what they launch (``launch_variants``, see ``annnet_kernels/kernels/launch.py``); Triton's own
binder specialises the arguments as a launch would. Exit code 1 on a spill, on a 16-bit product without tensor-core
instructions, on more shared memory than a block may use, or where a kernel falls below ``expected.json``. What was
compiled is kept in Triton's cache: a second run compiles only what changed. The CUDA C++ kernels are read from the
extension, where they were built.

The last columns: programs that one multiprocessor runs at a time, instructions of the longest innermost loop, and
synchronous loads from global memory in the innermost loops.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from . import cuda, expected
from .table import DEVICES, MODULES, Row, table


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, print, compare; 1 on a fault or a fall."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.compile_table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--arch", type=int, nargs="+", choices=DEVICES, default=list(DEVICES), help="architectures")
    modules = (*MODULES, cuda.MODULE)
    parser.add_argument("--module", nargs="+", choices=modules, default=modules, help="kernel modules")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--dtype", default="", help="only dtypes whose name contains this")
    parser.add_argument("--expect", action="store_true", help="make what was compiled what is expected from now on")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)
    reason = cuda.why_not()
    if cuda.MODULE in options.module and reason is not None:
        print(f"Without CUDA C++ kernels: {reason}")
    rows: list[Row] = []
    compiled = table(options.arch, options.module, options.kernel, options.dtype, options.jobs)
    for arch, group in groupby(compiled, lambda row: row.arch):
        rows += (of_arch := list(group))
        print(f"sm_{arch}: {len(of_arch)} compilations", *summary(of_arch), "", sep="\n", flush=True)
    faults = [row for row in rows if row.fault]
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    for row in faults:
        print(f"sm_{row.arch} {row.kernel} {row.dtype} {row.layout}: {row.fault}\n    {row.config}")
    if options.expect:
        expected.write(rows)
    falls = expected.falls(rows)
    print(*falls, f"{len(rows)} compilations, {len(faults)} faults, {len(falls)} falls", sep="\n")
    return 1 if faults or falls or not rows else 0


_COLUMNS = "  {:42}{:9}{:>9}{:>11}{:>9}{:>12}{:>12}{:>13}{:>10}{:>11}{:>11}".format


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """One line per kernel and dtype: how many variants there are, and the range of what they became."""
    yield _COLUMNS(
        "kernel", "dtype", "variants", "registers", "spilling", "shared KiB", "tensor-core", "async copies", "programs",
        "loop", "loop loads",
    )  # fmt: skip
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.dtype), []).append(row)
    for (kernel, dtype), group in sorted(groups.items()):
        yield _COLUMNS(
            kernel,
            dtype,
            len(group),
            _range(row.registers for row in group),
            sum(row.spills > 0 for row in group),
            _range(row.shared_bytes // 1024 for row in group),
            _range(row.tensor_core for row in group),
            _range(row.async_copies for row in group),
            _range(row.programs for row in group),
            _range(row.loop for row in group),
            _range(row.loop_loads for row in group),
        )


def _range(values: Iterable[int]) -> str:
    values = sorted(set(values))
    return str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"


if __name__ == "__main__":
    sys.exit(main())
