"""The stand-in for a GPU: launches are recorded with their grid, variants with their kernel, and grids are checked."""

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
if sys.platform != "linux":
    pytest.skip("the stand-in driver is a Linux library", allow_module_level=True)
pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import json, sys, torch
from tools import standin
recorder = standin.install(sys.argv[1])
import annnet_kernels as ak
for _ in range(2):
    ak.pyramid_pool(torch.randn(3, 20, 40, 33))
print(json.dumps({
    "launches": [[launch.kernel, launch.grid, launch.warps] for launch in recorder.launches],
    "variants": [variant.kernel for variant in recorder.variants],
    "seconds": sum(variant.seconds for variant in recorder.variants),
    "backend": ak.last_backend("pyramid_pool"),
    "x": recorder.launches[0].signature["x_ptr"],
}))
"""


@pytest.mark.parametrize("mode", ["compile", "record"])
def test_launches_and_variants(mode, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", PROGRAM, mode]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["backend"] == "triton"
    kernels = [kernel for kernel, _, _ in found["launches"]]
    assert kernels[0] == "pyramid_pool_fwd_kernel"
    assert kernels[: len(kernels) // 2] == kernels[len(kernels) // 2 :]  # the second call launches the same
    assert sorted(found["variants"]) == sorted(set(kernels))  # and compiles nothing
    assert all(grid[0] >= 1 and warps >= 1 for _, grid, warps in found["launches"])
    assert found["x"].startswith("*float32 (3, 20, 40, 33) strides")
    assert (found["seconds"] > 0.05) == (mode == "compile")


GRIDS = """
import ctypes, sys
from tools.standin import library
driver = ctypes.CDLL(str(library.build() / library.NAME))
for grid in ((2**31 - 1, 65535, 65535), (1, 65536, 1), (1, 1, 65536), (2**31, 1, 1), (0, 1, 1)):
    print(driver.cuLaunchKernelEx((ctypes.c_uint * 4)(*grid, 1), None, None, None))
"""


def test_a_grid_that_no_gpu_takes_is_refused():
    """In a process of its own: whoever loads the driver has a GPU that does not work."""
    done = subprocess.run([sys.executable, "-c", GRIDS], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["0", "1", "1", "1", "1"], done.stderr


GRID_OF_A_LAUNCH = """
import sys
from tools import standin
standin.install("record")
import torch
import annnet_kernels as ak
from annnet_kernels.kernels.launch import Launch
run = Launch.run
def with_grid(launch):
    object.__setattr__(launch, "grid", eval(sys.argv[1]))
    run(launch)
Launch.run = with_grid
ak.pyramid_pool(torch.randn(3, 20, 40, 33))
"""


@pytest.mark.parametrize(("grid", "fits"), [("(2**31 - 1, 65535)", True), ("(2**31,)", False), ("(1, 65536)", False)])
def test_a_recorded_grid_is_checked_too(grid, fits):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", GRID_OF_A_LAUNCH, grid]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode == 0) == fits, done.stderr
    assert ("refuses the grid" in done.stderr) != fits


def test_an_unknown_mode_is_named():
    from tools import standin

    with pytest.raises(ValueError, match="mode: expected one of compile, record, got 'fast'"):
        standin.install("fast")
