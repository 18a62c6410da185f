"""Compile every Triton kernel that the package can launch, without a GPU, and read what became of it.

    python -m benchmarks.codegen [--json FILE] [--arch 90 ...] [--kernel NAME] [--jobs N]

The kernel modules say what they launch (``launch_variants``, see ``annnet_kernels/kernels/launch.py``); Triton's own
binder specialises the arguments as a launch would. Exit code 1 on a spill, on a 16-bit product without tensor-core
instructions, or on more shared memory than a block may use. What was compiled is kept in Triton's cache: a second run
compiles only what changed. The CUDA C++ kernels are read from the extension, where they were built.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from annnet_kernels.kernels.launch import Device, Launch

from . import codegen_cuda

MODULES = ("asymmetric_attention", "pyramid_pool", "bn_relu_pool", "batch_norm", "upsampled_cross_entropy")

DEVICES = {
    80: Device((8, 0), 108),
    86: Device((8, 6), 84),
    89: Device((8, 9), 128),
    90: Device((9, 0), 132),
    100: Device((10, 0), 148),
    120: Device((12, 0), 170),
}
"""One GPU per architecture: A100, RTX 3090, RTX 4090, H100, B200, RTX 5090 (multiprocessors of the full product)."""

# Counted in PTX, one to one with the machine code: to disassemble a kernel takes as long as to compile it.
_TENSOR_CORE = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
_ASYNC_COPY = re.compile(r"\bcp\.async\.(?:c[ag]|bulk)\b")


@dataclass(frozen=True)
class Row:
    """What one kernel became on one architecture; ``spills`` are bytes of stack per thread."""

    kernel: str
    arch: int
    dtype: str
    layout: str
    config: dict[str, Any]
    registers: int
    spills: int
    shared_bytes: int
    tensor_core: int
    async_copies: int
    fault: str | None


def specialise(launch: Launch, arch: int) -> tuple[Any, dict[str, Any], str]:
    """What Triton would compile for ``launch``: source, options, and the key under which it would keep the result."""
    kernel, backend = launch.kernel, make_backend(GPUTarget("cuda", arch, 32))
    options = launch.options
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialisation, _ = binder(**launch.arguments, **options)
    parsed, signature, constexprs, attributes = kernel._pack_args(backend, options, bound, specialisation, None)
    key = f"{kernel.__name__} {specialisation} {options}"
    return ASTSource(kernel, signature, constexprs, attributes), parsed.__dict__, key


def variants(arch: int, modules: Sequence[str] = MODULES) -> Iterator[tuple[str, str, Launch]]:
    """(dtype, layout, launch) of all launches that differ in compiled code on ``arch``."""
    seen: set[str] = set()
    for name in modules:
        module = importlib.import_module(f"annnet_kernels.kernels.{name}")
        for dtype, layout, launch in module.launch_variants(DEVICES[arch]):
            *_, key = specialise(launch, arch)
            if key not in seen:
                seen.add(key)
                yield dtype, layout, launch


def _constants(arguments: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The constexpr arguments, those inside of tuples as ``tuple.field``."""
    for name, value in arguments.items():
        if name.isupper():
            yield name, value
        elif isinstance(value, tuple):
            fields = getattr(value, "_fields", map(str, range(len(value))))
            yield from (
                (f"{name}.{field}", v.value)
                for field, v in zip(fields, value, strict=True)
                if isinstance(v, tl.constexpr)
            )


def compile_row(dtype: str, layout: str, launch: Launch, arch: int) -> Row:
    """Compile one launch for ``arch`` and read the result."""
    source, options, _ = specialise(launch, arch)
    config = launch.options | dict(_constants(launch.arguments))
    label = (launch.kernel.__name__, arch, dtype, layout, config)
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        return Row(*label, 0, 0, 0, 0, 0, f"does not compile: {type(error).__name__}: {str(error)[:300]}")
    registers, spills = resource_usage(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    tensor_core, async_copies = (len(p.findall(compiled.asm["ptx"])) for p in (_TENSOR_CORE, _ASYNC_COPY))
    faults = []
    if spills:
        faults.append(f"spills {spills} bytes")
    if "tt.dot" in compiled.asm["ttir"] and dtype in ("bfloat16", "float16") and not tensor_core:
        faults.append("no tensor-core instruction")
    if shared > DEVICES[arch].shared_memory:
        faults.append(f"{shared} bytes of shared memory, {DEVICES[arch].shared_memory} allowed")
    fault = ", ".join(faults) or None
    return Row(*label, registers, spills, shared, tensor_core, async_copies, fault)


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack per thread of the one kernel in ``cubin``.

    The stack holds spilled registers; a kernel without local arrays has no other use for it.
    """
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert usage is not None, text
    return int(usage[1]), int(usage[2])


@cache
def _variants(arch: int, modules: tuple[str, ...]) -> list[tuple[str, str, Launch]]:
    return list(variants(arch, modules))


def _compile_nth(arch: int, modules: tuple[str, ...], kernel: str, part: int, parts: int) -> list[Row]:
    """Every ``parts``-th variant of ``arch``: launches hold tensors and kernels, so a process makes its own."""
    chosen = [v for v in _variants(arch, modules) if kernel in v[2].kernel.__name__]
    return [compile_row(*v, arch) for v in chosen[part::parts]]


def table(archs: Iterable[int], modules: Sequence[str], kernel: str, jobs: int) -> Iterator[Row]:
    """All rows of ``archs``, compiled by ``jobs`` processes."""
    triton_modules = tuple(name for name in modules if name in MODULES)
    with_cuda = codegen_cuda.MODULE in modules and codegen_cuda.why_not() is None
    parts = 16 * jobs
    with ProcessPoolExecutor(jobs) as pool:
        futures = {
            arch: [pool.submit(_compile_nth, arch, triton_modules, kernel, n, parts) for n in range(parts)]
            for arch in archs
        }
        for arch, compiled in futures.items():
            for future in compiled:
                yield from future.result()
            if with_cuda:
                yield from (Row(**row) for row in codegen_cuda.rows(arch, kernel))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--arch", type=int, nargs="+", choices=DEVICES, default=list(DEVICES), help="architectures")
    modules = (*MODULES, codegen_cuda.MODULE)
    parser.add_argument("--module", nargs="+", choices=modules, default=modules, help="kernel modules")
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    options = parser.parse_args(arguments)
    reason = codegen_cuda.why_not()
    if codegen_cuda.MODULE in options.module and reason is not None:
        print(f"Without CUDA C++ kernels: {reason}")
    rows: list[Row] = []
    for arch, compiled in groupby(table(options.arch, options.module, options.kernel, options.jobs), lambda r: r.arch):
        rows += (of_arch := list(compiled))
        print(f"sm_{arch}: {len(of_arch)} compilations", *summary(of_arch), "", sep="\n", flush=True)
    faults = [row for row in rows if row.fault]
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    for row in faults:
        print(f"sm_{row.arch} {row.kernel} {row.dtype} {row.layout}: {row.fault}\n    {row.config}")
    print(f"{len(rows)} compilations, {len(faults)} faults")
    return 1 if faults or not rows else 0


_COLUMNS = "  {:42}{:9}{:>9}{:>11}{:>10}{:>12}{:>13}{:>14}".format


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """One line per kernel and dtype: how many variants there are, and the range of what they became."""
    yield _COLUMNS("kernel", "dtype", "variants", "registers", "spilling", "shared KiB", "tensor-core", "async copies")
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.kernel, row.dtype), []).append(row)
    for (kernel, dtype), group in sorted(groups.items()):
        yield _COLUMNS(
            kernel,
            dtype,
            len(group),
            _range(row.registers for row in group),
            sum(row.spills > 0 for row in group),
            _range(row.shared_bytes // 1024 for row in group),
            _range(row.tensor_core for row in group),
            _range(row.async_copies for row in group),
        )


def _range(values: Iterable[int]) -> str:
    values = sorted(set(values))
    return str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"


if __name__ == "__main__":
    sys.exit(main())
