"""The GPU tests compile few kernels: counted on a stand-in for a GPU, where every one of them runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from annnet_kernels.runtime.backends import interpreting

if interpreting():
    pytest.skip("the stand-in driver needs compiled kernels", allow_module_level=True)
pytest.importorskip("triton")

from tools.gpu.stages import BLOCK_TESTS, OPERATOR_TESTS

ROOT = Path(__file__).resolve().parent.parent
MOST_VARIANTS = 200
"""Each takes one or two seconds of a core, and a campaign has 16 cores for less than a minute."""


def test_gpu_tests_compile_few_variants(tmp_path):
    result = tmp_path / "count.json"
    files = [str(ROOT / "tests" / name) for name in (*BLOCK_TESTS, *OPERATOR_TESTS)]
    command = [sys.executable, "-m", "tools.standin.counting", "--json", str(result), *files]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    count = json.loads(result.read_text())
    assert count["tests"] > 90  # without a C++ extension, 88 more are skipped
    assert {"asymmetric_attention_fwd_kernel", "pyramid_pool_fwd_kernel", "batch_norm_map_kernel"} <= set(
        count["kernels"]
    )
    assert count["variants"] <= MOST_VARIANTS, done.stdout


def test_the_selection_names_tests_that_there_are():
    """A test that was renamed would run on a GPU with all its variants."""
    folder = ROOT / "tests" / "interpreter"
    text = (folder / "gpu_selection.py").read_text()
    there = set(re.findall(r"^def (test_\w+)\(", "\n".join(p.read_text() for p in folder.glob("test_*.py")), re.M))
    named = set(re.findall(r'^    "(?:test_\w+\.py::)?(test_\w+)": ', text, re.M))
    assert len(named) > 20
    assert named <= there
