"""What kernels became before: a change may not make them fall.

``expected.json`` holds, for a Hopper GPU and channels_last maps in bfloat16, the worst of each kernel and layout.
Layouts whose name tells widths are other than those of the blocks, and are left out. The file is written by
``python -m tools.compile_table --arch 90 --expect``, and holds for the version of Triton that wrote it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton

from .table import Row

FILE = Path(__file__).with_name("expected.json")
ARCH, DTYPE, LAYOUT = 90, "bfloat16", "channels_last"
LONGER = 1.1
"""How much longer than expected a loop may be."""


def worst(rows: Iterable[Row]) -> dict[str, dict[str, int]]:
    """By kernel and layout: fewest programs, longest loop, most synchronous loads in loops."""
    found: dict[str, dict[str, int]] = {}
    for row in rows:
        if (row.arch, row.dtype) == (ARCH, DTYPE) and row.layout.startswith(LAYOUT) and "×" not in row.layout:
            mine = {"programs": row.programs, "loop": row.loop, "loop_loads": row.loop_loads}
            others = found.setdefault(f"{row.kernel}: {row.layout}", mine)
            for name, value in mine.items():
                others[name] = (min if name == "programs" else max)(others[name], value)
    return found


def load() -> dict[str, Any]:
    """The stored expectations, and the version of Triton that they hold for."""
    known: dict[str, Any] = json.loads(FILE.read_text())
    return known


def falls(rows: Iterable[Row]) -> list[str]:
    """Where ``rows`` are worse than expected; nothing under another version of Triton."""
    known = load()
    if known["triton"] != triton.__version__:
        return []
    found = []
    for key, now in worst(rows).items():
        before = known["kernels"].get(key, now)
        if (
            now["programs"] < before["programs"]
            or now["loop_loads"] > before["loop_loads"]
            or now["loop"] > LONGER * before["loop"]
        ):
            found.append(f"{key}: expected {before}, got {now}")
    return found


def write(rows: Iterable[Row]) -> None:
    """Expect what ``rows`` are; other kernels stay as they were."""
    known = load()
    kept = known["kernels"] if known["triton"] == triton.__version__ else {}
    merged = {"triton": triton.__version__, "kernels": dict(sorted((kept | worst(rows)).items()))}
    FILE.write_text(json.dumps(merged, indent=1) + "\n")
