"""``python -m tools.gpu.steps``: what the process of one stage does.

A step writes its results into its folder as it gets them and ends by itself when its seconds are over. Its exit code is
1 where something is wrong with this package.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .store import JUNIT, OUTCOMES, RESULT
from .tree import ROOT

MAX_FAILURES = 50
WORKERS = 6
"""Of pytest: each takes a CUDA context and a core."""


def build(place: Path, seconds: float, options: Sequence[str]) -> int:
    """The extension with its CUDA part alone, in place: the CPU's instruction levels take minutes."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "ANNNET_CPU": "0"}).returncode


def machine(place: Path, seconds: float, options: Sequence[str]) -> int:
    """What this machine is, and what it lacks."""
    import torch

    from benchmarks.machine import environment

    found = environment(torch.device("cuda"))
    del found["command"]
    (place / RESULT).write_text(json.dumps({"environment": found}))
    for program in ("make", "nvcc", "git"):
        if shutil.which(program) is None:
            print(f"{program} is not installed here")
    for package in ("pytest", "xdist", "hypothesis", "rich", "matplotlib", "torchvision"):
        if importlib.util.find_spec(package) is None:
            print(f"the Python package {package} is not installed here")
    return 0


def tests(place: Path, seconds: float, options: Sequence[str]) -> int:
    """GPU tests of these files, in several processes where pytest-xdist is installed."""
    if importlib.util.find_spec("pytest") is None:
        print("pytest is not installed here: no tests")
        return 1
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-vv", "--continue-on-collection-errors", "--tb=long"]
    command += [f"--maxfail={MAX_FAILURES}", "-p", "no:cacheprovider", f"--junitxml={place / JUNIT}"]
    command += ["-p", "tools.gpu.outcomes", f"--outcomes={place / OUTCOMES}"]
    if importlib.util.find_spec("xdist") is None:
        print("pytest-xdist is not installed here: tests run one after another")
    else:
        command += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"]
    if importlib.util.find_spec("hypothesis") is None:
        print("hypothesis is not installed here: tests that need it are left out")
    files = [str(ROOT / "tests" / name) for name in options]
    environment = {
        **os.environ,
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }  # read when cuBLAS starts; some tests compare bits
    code = subprocess.run([*command, *files], cwd=ROOT, env=environment).returncode
    nothing_left = 5  # every test has passed in an earlier call
    return 0 if code == nothing_left else code


def warm_up(place: Path, seconds: float, options: Sequence[str]) -> int:
    """Compile a share of the Triton kernels into the shared cache."""
    import torch

    from . import warming

    share, shares = map(int, options)
    print(f"{warming.compile_share(share, shares, torch.device('cuda'))} kernel variants are ready")
    return 0


def compile_peer(place: Path, seconds: float, options: Sequence[str]) -> int:
    """Compile one compiled peer of a block, as the benchmark does, into inductor's shared cache."""
    from . import measuring

    block, mode, peer = options
    return measuring.compile_peer(block, mode == "training", peer)


def profile(place: Path, seconds: float, options: Sequence[str]) -> int:
    """Where the time of one training step goes, by kernel."""
    from . import profiling

    return profiling.run(place, seconds)


def accuracy(place: Path, seconds: float, options: Sequence[str]) -> int:
    """Both blocks in bfloat16 against float64."""
    from . import measuring

    return measuring.accuracy(place, seconds)


def products(place: Path, seconds: float, options: Sequence[str]) -> int:
    """1 × 1 convolutions by cuDNN against products by cuBLAS."""
    from . import products as module

    return module.run(place, seconds)


def measure(place: Path, seconds: float, options: Sequence[str]) -> int:
    """Benchmark cases."""
    from . import measuring

    return measuring.measure(place, seconds, options)


def sanitize(place: Path, seconds: float, options: Sequence[str]) -> int:
    """Every kernel of ours once on a small odd shape, under NVIDIA's memory checker where it is installed."""
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        print("compute-sanitizer is not installed here: not checked")
        return 0
    small = [sys.executable, "-c", "from tools.gpu.measuring import run_small; run_small()"]
    return subprocess.run([checker, "--tool", "memcheck", "--error-exitcode", "9", *small], cwd=ROOT).returncode


Step = Callable[[Path, float, Sequence[str]], int]
STEPS: dict[str, Step] = {
    "machine": machine,
    "build": build,
    "tests": tests,
    "warm-up": warm_up,
    "compile": compile_peer,
    "profile": profile,
    "accuracy": accuracy,
    "products": products,
    "measure": measure,
    "sanitize": sanitize,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.steps", description=__doc__)
    parser.add_argument("--place", type=Path, required=True, help="folder for the results")
    parser.add_argument("--seconds", type=float, required=True, help="what the step may take")
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("options", nargs="*")
    chosen = parser.parse_args(arguments)
    return STEPS[chosen.step](chosen.place, chosen.seconds, chosen.options)


if __name__ == "__main__":
    sys.exit(main())
