"""A pytest plugin that counts what the GPU tests would have Triton compile, on a machine without a GPU.

    python -m tools.standin.counting [--compile] [--json FILE] [TESTS ...]

Every GPU test runs on CPU tensors through the stand-in for a GPU, so that nothing it computes is right: assertions are
evaluated and ignored, and the error rule takes one draw. What counts is the set of kernels that were asked for.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from .devices import CudaAsCpu, pretend_streams
from .recording import Recorder, Variant, install

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"


class Counting:
    """The plugin.

    Args:
        recorder: of the stand-in.
    """

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder
        self.by_test: Counter[str] = Counter()
        self.ran = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Any:
        before = len(self.recorder.variants)
        self.ran += 1
        try:
            with CudaAsCpu():
                return (yield)
        except Exception:  # of garbage, or of what the stand-in does not have
            return None
        finally:
            self.by_test[item.nodeid.partition("[")[0]] += len(self.recorder.variants) - before


class _EvaluateOnly(ast.NodeTransformer):
    """``assert x`` becomes ``x``."""

    def visit_Assert(self, node: ast.Assert) -> ast.AST:
        return ast.copy_location(ast.Expr(node.test), node)


def _ignore_assertions() -> None:
    from _pytest.assertion import rewrite

    def evaluate_only(tree: ast.Module, *_: Any) -> None:
        ast.fix_missing_locations(_EvaluateOnly().visit(tree))

    def run_once(run: Any, *_: Any, **__: Any) -> None:
        run(0)

    def nothing(*_: Any, **__: Any) -> None:
        return None

    sys.path.insert(0, str(TESTS))
    for module, name, replacement in (
        (rewrite, "rewrite_asserts", evaluate_only),
        (rewrite, "_read_pyc", nothing),  # what an ordinary run has rewritten
        (torch.testing, "assert_close", nothing),
        (importlib.import_module("helpers"), "assert_as_accurate_as_plain", run_once),
    ):
        setattr(module, name, replacement)
    sys.dont_write_bytecode = True


def count(tests: Sequence[str], mode: str = "record") -> tuple[list[Variant], Counter[str], int]:
    """The variants that GPU tests ask for: all of them, how many each test brings first, and how many tests ran.

    Args:
        tests: paths that pytest takes.
        mode: of the stand-in; ``"compile"`` tells the seconds of every variant.
    """
    pretend_streams()
    counting = Counting(install(mode))
    _ignore_assertions()
    arguments = ["-m", "gpu", "-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--no-header"]
    pytest.main([*arguments, *tests], plugins=[counting])
    return counting.recorder.variants, counting.by_test, counting.ran


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the count by test, and the total last."""
    parser = argparse.ArgumentParser(prog="python -m tools.standin.counting", description=__doc__)
    parser.add_argument("--compile", action="store_true", help="compile every variant for sm_90 and tell the seconds")
    parser.add_argument("--json", type=Path, help="write count and seconds to this file")
    parser.add_argument("tests", nargs="*", default=[str(TESTS)])
    chosen = parser.parse_args(arguments)
    variants, by_test, ran = count(chosen.tests, "compile" if chosen.compile else "record")
    for test, number in by_test.most_common():
        if number:
            print(f"{number:5} {test}")
    seconds = sum(variant.seconds for variant in variants)
    kernels = Counter(variant.kernel for variant in variants)
    result = {"variants": len(variants), "tests": ran, "seconds": round(seconds, 2), "kernels": dict(kernels)}
    if chosen.json:
        chosen.json.write_text(json.dumps(result))
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
