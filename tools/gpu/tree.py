"""A hash of the sources: what a result belongs to where there is no git, or where nothing has been committed yet."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("annnet_kernels", "benchmarks", "csrc", "tests", "tools")
FILES = ("setup.py", "pyproject.toml")
SUFFIXES = {".py", ".c", ".cpp", ".cu", ".h"}
_LEFT_OUT = {"__pycache__", "results"}


def tree_hash(root: Path = ROOT) -> str:
    """Twelve hexadecimal digits that change with any source file: its name, its place or its content."""
    digest = hashlib.sha256()
    for path in _sources(root):
        name, content = str(path.relative_to(root)).encode(), path.read_bytes()
        digest.update(b"%d %d " % (len(name), len(content)) + name + content)
    return digest.hexdigest()[:12]


def _sources(root: Path) -> Iterator[Path]:
    yield from (root / name for name in FILES if (root / name).exists())
    for folder in FOLDERS:
        for place, folders, files in os.walk(root / folder):
            folders[:] = sorted(name for name in folders if name not in _LEFT_OUT and not name.startswith("."))
            yield from (Path(place, name) for name in sorted(files) if Path(name).suffix in SUFFIXES)
