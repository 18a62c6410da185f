"""``python tests/compatibility.py``: writes ``docs/compatibility.md`` from the tests of tools.

A test says in a marker which tool it is of and what holds: ``@pytest.mark.tool(name, result, what)``, with
``package=`` where the tool is not PyTorch's own. The page also records which versions of the packages it was written
with, those that the tests were tried with. ``test_compatibility.py`` fails while page and tests disagree.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "compatibility.md"
RESULTS = ("works", "runs plain", "refused")
BEGIN, END = "<!-- tools:begin -->", "<!-- tools:end -->"
HEADER = "| tool | result | what holds | tried with | test |\n| --- | --- | --- | --- | --- |"
NOT_INSTALLED = "not installed"

INTRODUCTION = f"""# What other tools do to a block

A block runs whatever plain PyTorch runs. Where the collapse cannot run, the block runs its published forward, which
calls every module inside of it; then `repr(block)` says why. A reason that lies in one call alone, such as a trace, is
also said in a warning, once for each block.

- **works**: the block runs collapsed, or does so again as soon as the tool is done with it.
- **runs plain**: the block runs its published forward, with PyTorch's own operators: as fast as without this package.
- **refused**: an error says what to do instead.

This table is written by `python tests/compatibility.py` from the tests that show it, with the versions that they were
tried with.

{BEGIN}
"""


class Row(NamedTuple):
    """One tool in one test."""

    tool: str
    result: str
    what: str
    package: str
    test: str


class _Collection:
    """What pytest finds; a file that skips itself makes it incomplete."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.skipped: list[str] = []

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self.skipped.append(f"{report.nodeid}: {report.longrepr[2]}")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for marker in item.iter_markers("tool"):
                row = Row(*marker.args, marker.kwargs.get("package", "torch"), f"{item.path.name}::{item.originalname}")
                if row.result not in RESULTS:
                    raise pytest.UsageError(f"{row.test}: expected one of {', '.join(RESULTS)}, got {row.result!r}")
                if row not in self.rows:
                    self.rows.append(row)


def collect() -> None:
    """Print the rows that pytest finds, as JSON, and what could not be collected."""
    files = [
        str(file) for file in sorted((ROOT / "tests").glob("test_*.py")) if "pytest.mark.tool(" in file.read_text()
    ]
    collection = _Collection()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = pytest.main(["--collect-only", "-qqq", "-p", "no:cacheprovider", *files], plugins=[collection])
    if code != pytest.ExitCode.OK:
        raise SystemExit(printed.getvalue())
    print(json.dumps({"rows": collection.rows, "skipped": collection.skipped}))


def found() -> tuple[list[Row], list[str]]:
    """The rows of all tests, and the files that skip themselves here."""
    command = [sys.executable, __file__, "--collect"]
    process = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    answer = json.loads(process.stdout)
    return sorted((Row(*row) for row in answer["rows"]), key=lambda row: row.tool.lower()), answer["skipped"]


def version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package).partition('+')[0]}"
    except importlib.metadata.PackageNotFoundError:
        return f"{package}: {NOT_INSTALLED}"


def lines(rows: list[Row]) -> list[str]:
    return [f"| {row.tool} | {row.result} | {row.what} | {version(row.package)} | `{row.test}` |" for row in rows]


def without_versions(page: str) -> list[list[str]]:
    """The cells of the page's table, but for the versions."""
    table = page.partition(BEGIN)[2].partition(END)[0].strip().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    return [[*row[:3], row[4]] for row in cells]


def page(rows: list[Row]) -> str:
    return "\n".join([f"{INTRODUCTION}\n{HEADER}", *lines(rows), "", END, ""])


if __name__ == "__main__":
    if sys.argv[1:] == ["--collect"]:
        collect()
    else:
        rows, skipped = found()
        if skipped:
            raise SystemExit("not every test can be collected here:\n" + "\n".join(skipped))
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(rows))
