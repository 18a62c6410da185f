"""The README's quick start runs and prints what it says it prints; its tables come from the records."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent.joinpath("README.md").read_text()


def test_quick_start_prints_what_the_readme_says():
    code, expected = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == expected


def test_tables_agree_with_the_records():
    results = pytest.importorskip("benchmarks.results", reason="the benchmark's packages are not installed")
    assert results.generate(README, results.recorded()) == README
