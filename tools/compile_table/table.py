"""Compiles launches for an architecture, and reads what became of them."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from annnet_kernels.kernels.launch import Device, Launch

from . import cuda
from .machine_code import read

MODULES = (
    "asymmetric_attention",
    "pyramid_pool",
    "bn_relu_pool",
    "batch_norm",
    "matrix_products",
    "upsampled_cross_entropy",
)

DEVICES = {
    80: Device((8, 0), 108),
    86: Device((8, 6), 84),
    89: Device((8, 9), 128),
    90: Device((9, 0), 132),
    100: Device((10, 0), 148),
    120: Device((12, 0), 170),
}
"""One GPU per architecture: A100, RTX 3090, RTX 4090, H100, B200, RTX 5090 (multiprocessors of the full product)."""

# Counted in PTX: one to one with the machine code.
_TENSOR_CORE = re.compile(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
_ASYNC_COPY = re.compile(r"\bcp\.async\.(?:c[ag]|bulk)\b")


@dataclass(frozen=True)
class Row:
    """What one kernel became on one architecture.

    ``spills`` are bytes of stack per thread, ``programs`` what one multiprocessor runs at a time, ``loop`` the
    instructions of the longest innermost loop, ``loop_loads`` the synchronous loads from global memory in all of them.
    """

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
    programs: int
    loop: int
    loop_loads: int
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
        return Row(*label, 0, 0, 0, 0, 0, 0, 0, 0, f"does not compile: {type(error).__name__}: {str(error)[:300]}")
    code, shared = read(compiled.asm["cubin"]), compiled.metadata.shared
    tensor_core, async_copies = (len(p.findall(compiled.asm["ptx"])) for p in (_TENSOR_CORE, _ASYNC_COPY))
    faults = []
    if code.spills:
        faults.append(f"spills {code.spills} bytes")
    if "tt.dot" in compiled.asm["ttir"] and dtype in ("bfloat16", "float16") and not tensor_core:
        faults.append("no tensor-core instruction")
    if shared > DEVICES[arch].shared_memory:
        faults.append(f"{shared} bytes of shared memory, {DEVICES[arch].shared_memory} allowed")
    fault = ", ".join(faults) or None
    programs = code.programs(arch, launch.num_warps, shared)
    loop = (code.loop, code.loop_loads)
    return Row(*label, code.registers, code.spills, shared, tensor_core, async_copies, programs, *loop, fault)


@cache
def _variants(arch: int, modules: tuple[str, ...]) -> list[tuple[str, str, Launch]]:
    return list(variants(arch, modules))


def _compile_nth(arch: int, modules: tuple[str, ...], kernel: str, dtype: str, part: int, parts: int) -> list[Row]:
    """Every ``parts``-th variant of ``arch``: launches hold tensors and kernels, so a process makes its own."""
    chosen = [v for v in _variants(arch, modules) if kernel in v[2].kernel.__name__ and dtype in v[0]]
    return [compile_row(*v, arch) for v in chosen[part::parts]]


def table(archs: Iterable[int], modules: Sequence[str], kernel: str, dtype: str, jobs: int) -> Iterator[Row]:
    """All rows of ``archs`` whose kernel and dtype contain these, compiled by ``jobs`` processes."""
    triton_modules = tuple(name for name in modules if name in MODULES)
    with_cuda = cuda.MODULE in modules and cuda.why_not() is None
    parts = 16 * jobs
    with ProcessPoolExecutor(jobs) as pool:
        futures = {
            arch: [pool.submit(_compile_nth, arch, triton_modules, kernel, dtype, n, parts) for n in range(parts)]
            for arch in archs
        }
        for arch, compiled in futures.items():
            for future in compiled:
                yield from future.result()
            if with_cuda:
                yield from (row for row in (Row(**fields) for fields in cuda.rows(arch, kernel)) if dtype in row.dtype)
