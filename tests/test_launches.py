"""What a step of a block launches, counted without a GPU: the limits hold, and the counter counts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from annnet_kernels.runtime.backends import interpreting

if interpreting():
    pytest.skip("the stand-in driver needs compiled kernels", allow_module_level=True)
pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"AFNB": (58, 20, 9), "APNB": (48, 17, 9)}
"""Launches of a training step, of an evaluation, and of an evaluation that is folded, under bfloat16 autocast."""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_launches_stay_below_their_limits(dtype):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tools.launches", "--json", "--dtype", dtype]
    if dtype == "float32":
        command.append("--count-only")  # the other goes through Triton's launchers, which see what each argument is
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads(done.stdout.splitlines()[-1])
    for kind, limits in LIMITS.items():
        ours, plain = table[f"{kind} ours"], table[f"{kind} plain"]
        found = ours["launches"], ours["evaluation_launches"], ours["folded_launches"]
        assert all(count <= limit for count, limit in zip(found, limits, strict=True)), found
        assert 60 < plain["launches"] < 110
        assert 25 < plain["evaluation_launches"] < 45
