"""The README's quick start prints what it says it prints; tables come from the records and the tests."""

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
README = HERE.parent.joinpath("README.md").read_text()


def test_quick_start_prints_what_the_readme_says():
    code, expected = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", README, re.DOTALL).groups()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    assert printed.getvalue() == expected


def test_tables_agree_with_the_records():
    results = pytest.importorskip("benchmarks.results", reason="the benchmark's packages are not installed")
    differing = [path.name for path, wanted in results.pages().items() if path.read_text() != wanted]
    assert not differing, "run: python -m benchmarks readme"


def test_support_tables_are_those_of_the_tests():
    checked = subprocess.run([sys.executable, HERE / "support.py", "--check"], capture_output=True, text=True)
    if checked.returncode == 3:
        pytest.skip(f"not every test can be collected here: {checked.stderr}")
    assert checked.returncode == 0, checked.stderr
