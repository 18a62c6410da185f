"""Limits that keep the code readable: parameters of functions and kernels, lines of modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MOST_PARAMETERS, MOST_KERNEL_PARAMETERS, MOST_LINES = 13, 20, 400
PYTHON = [path for folder in ("annnet_kernels", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")]
NATIVE = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")]


def functions(path: Path) -> Iterator[tuple[str, int, bool]]:
    """Name, number of parameters without ``self`` and whether it is a Triton kernel, of every function in a file."""

    def visit(node: ast.AST, within: str) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            name = f"{within}{getattr(child, 'name', '')}"
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                arguments = child.args
                names = [a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]]
                starred = [a for a in (arguments.vararg, arguments.kwarg) if a is not None]
                count = len([n for n in names if n not in ("self", "cls")]) + len(starred)
                yield name, count, any("triton.jit" in ast.unparse(d) for d in child.decorator_list)
            is_scope = isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
            yield from visit(child, f"{name}." if is_scope else within)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), "")


def over_the_limit() -> dict[str, int]:
    found = {}
    for path in PYTHON:
        for name, count, is_kernel in functions(path):
            if count > (MOST_KERNEL_PARAMETERS if is_kernel else MOST_PARAMETERS):
                found[f"{path.relative_to(ROOT)}: {name}"] = count
    return found


def test_no_function_has_too_many_parameters():
    assert over_the_limit() == {}


def test_kernels_are_recognised():
    kernels = [name for path in PYTHON for name, _, is_kernel in functions(path) if is_kernel]
    assert {"pyramid_pool_fwd_kernel", "asymmetric_attention_fwd_kernel", "upsampled_gradient_kernel"} <= set(kernels)


@pytest.mark.parametrize("paths", [[p for p in PYTHON if p.is_relative_to(ROOT / "annnet_kernels")], NATIVE])
def test_no_file_is_too_long(paths: list[Path]):
    lines = {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8").count("\n") for path in paths}
    assert len(lines) > 20
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
