"""The CUDA C++ kernels for the compile table: read from the extension that is built, for every architecture in it."""

from __future__ import annotations

import importlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton

from annnet_kernels.runtime import native

from .machine_code import loops

ROOT = Path(__file__).parents[2]
MODULE = "cuda"
"""Its name among the modules of the table."""

_DTYPES = {"f": "float32", "d": "float64", "13__nv_bfloat16": "bfloat16", "6__half": "float16"}
_KERNEL = re.compile(r"^_ZN6annnet4cuda\d+(\w+?_kernel)I(f|d|13__nv_bfloat16|6__half)(?:Li(\d+)E)?E")
_VECTOR = re.compile(r"\b(?:LDG|STG|LDGSTS)\.E(?:\.[A-Z]+)*\.128\b")
_SPILL = re.compile(r"\b(?:STL|LDL)(?:\.\w+)*\b")
_COPY = re.compile(r"\bLDGSTS\b")


def why_not() -> str | None:
    """Why there are no CUDA C++ kernels to read; None if there are."""
    return native.why_not("cuda")


def shared_limit() -> int:
    """Dynamic shared memory of a block at most: the launches choose below it by shape."""
    source = (ROOT / "csrc" / "cuda" / "pyramid_pool.cu").read_text()
    found = re.search(r"kSharedBytes = (\d+) << 10;", source)
    assert found is not None
    return int(found[1]) << 10


def rows(arch: int, name: str = "") -> Iterator[dict[str, Any]]:
    """The fields of a row for every kernel whose name contains ``name``; none if there is no code for ``arch``."""
    if f"sm_{arch}" not in native.cuda_targets():
        return
    library = importlib.import_module("annnet_kernels._C").__file__
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-sass", "--dump-resource-usage", "-arch", f"sm_{arch}"]
    done = subprocess.run([*command, str(library)], check=True, capture_output=True, text=True)
    yield from read(done.stdout, arch, name)


def read(text: str, arch: int, name: str = "") -> Iterator[dict[str, Any]]:
    """The rows of what cuobjdump prints."""
    usage = {m[1]: m for m in re.finditer(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)}
    for body in re.split(r"\bFunction : ", text)[1:]:
        symbol = body.split(maxsplit=1)[0]
        parts = _KERNEL.match(symbol)
        if parts is None or name not in parts[1]:
            continue
        registers, stack, static = (int(number) for number in usage[symbol].groups()[1:])
        vector, wide = parts[3], len(_VECTOR.findall(body))
        loop, loads = loops(body)
        faults = []
        # The stack holds spilled registers; a kernel without local arrays has no other use for it.
        spills = max(len(_SPILL.findall(body)), stack)
        if spills:
            faults.append(f"spills ({stack} bytes of stack)")
        if not wide and ("planes" in parts[1] or vector not in (None, "1")):
            faults.append("no 16-byte load or store of the map")
        yield {
            "kernel": parts[1],
            "arch": arch,
            "dtype": _DTYPES[parts[2]],
            "layout": _layout(parts[1], vector),
            "config": {"vector": int(vector or 0), "16_byte_accesses": wide},
            "registers": registers,
            "spills": spills,
            "shared_bytes": static + (0 if "direct" in parts[1] else shared_limit()),
            "tensor_core": 0,
            "async_copies": len(_COPY.findall(body)),
            "programs": 0,  # the shape decides how many threads a program has
            "loop": loop,
            "loop_loads": loads,
            "fault": ", ".join(faults) or None,
        }


def _layout(kernel: str, vector: str | None) -> str:
    if "channels" in kernel:
        return "channels_last, odd" if vector == "1" else "channels_last"
    return "nchw and strided" if "planes" in kernel else "any"
