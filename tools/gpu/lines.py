"""Files of one JSON object per line, which are read while they are being written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def append(path: Path, entry: dict[str, Any]) -> None:
    """Add a line."""
    with path.open("a", encoding="utf-8", errors="replace") as file:
        file.write(json.dumps(entry) + "\n")


def outcomes_in(path: Path) -> dict[str, dict[str, Any]]:
    """The last outcome of every test that a file names; a line that is not finished is left out."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        found[entry["test"]] = entry
    return found
