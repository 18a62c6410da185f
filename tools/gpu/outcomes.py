"""A pytest plugin that writes down every test as it ends: ``pytest -p tools.gpu.outcomes --outcomes FILE``.

A junit file is written when the session ends, which a session that is killed never does. Tests that the
file names as passed already are left out, so that a second session goes on where the first was ended.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .lines import append, outcomes_in

_TRACEBACK_LINES = 60


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="file that gets one line of JSON per test")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what passed in an earlier session."""
    path: Path | None = config.getoption("--outcomes")
    earlier = outcomes_in(path) if path else {}
    passed = {name for name, outcome in earlier.items() if outcome["outcome"] == "passed"}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
    items[:] = [item for item in items if item.nodeid not in passed]


def pytest_configure(config: pytest.Config) -> None:
    path: Path | None = config.getoption("--outcomes")
    if path is not None and not hasattr(config, "workerinput"):  # workers report to the one that started them
        config.pluginmanager.register(_Writer(path))


class _Writer:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.when == "call" or report.outcome != "passed":
            self._write(report.nodeid, report.outcome, report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report.nodeid, "failed", report)

    def _write(self, name: str, outcome: str, report: Any) -> None:
        entry: dict[str, Any] = {"test": name, "outcome": outcome, "seconds": round(self.seconds.get(name, 0.0), 2)}
        if outcome == "failed":
            lines = str(report.longrepr).splitlines()
            errors = [line[2:].strip() for line in lines if line.startswith("E ")]
            entry["error"] = (errors or lines[-1:] or ["no message"])[0]
            entry["traceback"] = lines[-_TRACEBACK_LINES:]
        elif outcome == "skipped" and isinstance(report.longrepr, tuple):
            entry["error"] = report.longrepr[2]
        append(self.path, entry)
