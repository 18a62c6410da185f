"""Limits that keep the code readable: who may import whom, parameters of functions and kernels, lines of modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MOST_PARAMETERS, MOST_KERNEL_PARAMETERS, MOST_LINES = 13, 20, 400
PYTHON = [path for folder in ("annnet_kernels", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")]
NATIVE = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")]

FLOORS = (
    {"layouts", "pyramid", "runtime", "upsampling"},
    {"checks", "onnx"},
    {"reference"},
    {"kernels", "ops"},
    {"functional", "upsampled", "warmup"},
    {"blocks"},
    {"decode_heads"},
    {"interop"},
    {"info", "model", "parallel"},
    {"integrations"},
)
"""Rooms of the package, from the ground up: a room imports from its own floor and from those below."""


def room_of(module: str) -> str:
    return module.split(".")[1]


def imports_of(module: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of the package that a module imports when it is loaded; not those that a function imports later."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            typing_only = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            if typing_only or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            if isinstance(child, ast.ImportFrom):
                parts = package[: len(package) - child.level + 1] if child.level else []
                source = ".".join([*parts, *([child.module] if child.module else [])])
                found.update(f"{source}.{a.name}" if f"{source}.{a.name}" in modules else source for a in child.names)
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return {name for name in found if name in modules and name not in (module, "annnet_kernels")}


def import_graph() -> dict[str, set[str]]:
    modules = {}
    for path in (ROOT / "annnet_kernels").rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: imports_of(name, path, modules) for name, path in modules.items() if name != "annnet_kernels"}


def test_rooms_import_from_their_floor_or_below():
    floors = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    graph = import_graph()
    assert {room_of(name) for name in graph} == set(floors)
    upward = [
        (name, other)
        for name, others in graph.items()
        for other in others
        if floors[room_of(other)] > floors[room_of(name)]
    ]
    assert upward == []


def test_no_import_goes_round_in_a_circle():
    graph = import_graph()
    while graph:
        free = {name for name, others in graph.items() if not others & set(graph)}
        assert free, f"a circle among {sorted(graph)}"
        graph = {name: others for name, others in graph.items() if name not in free}


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


def test_kernels_unpack_tuples_one_at_a_time():
    """Triton 3.6 finds no names in a tuple within a tuple on the left of an assignment."""
    nested = [
        f"{path.name}: {ast.unparse(node)}"
        for path in (ROOT / "annnet_kernels" / "kernels").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Tuple) and any(isinstance(part, ast.Tuple) for part in target.elts)
    ]
    assert nested == []
