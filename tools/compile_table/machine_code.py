"""Reads machine code: registers, spills, loops, and how many programs share a multiprocessor."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+)")
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", re.MULTILINE)
_BRANCH = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")
_LOAD = re.compile(r"\bLDG\b")

_REGISTERS = 65536
_SHARED_KIB = {80: 164, 90: 228, 100: 228}
"""Shared memory of one multiprocessor, CUDA programming guide; the others have 100 KiB."""
_WARPS = {86: 48, 89: 48, 120: 48}
"""Warps that a multiprocessor holds; the others hold 64."""
_RESERVED = 1024
"""Bytes of shared memory that the system takes per program."""


@dataclass(frozen=True)
class MachineCode:
    """One kernel. ``loop`` and ``loop_loads`` are those of ``Row``."""

    registers: int
    spills: int
    loop: int
    loop_loads: int

    def programs(self, arch: int, warps: int, shared: int) -> int:
        """How many programs one multiprocessor runs at a time."""
        per_warp = -(-self.registers * 32 // 256) * 256
        return min(
            _REGISTERS // (per_warp * warps),
            _SHARED_KIB.get(arch, 100) * 1024 // (shared + _RESERVED),
            _WARPS.get(arch, 64) // warps,
        )


def read(cubin: bytes) -> MachineCode:
    """The one kernel in ``cubin``."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-sass", "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = _USAGE.search(text)
    assert usage is not None, text
    # The stack holds spilled registers; a kernel without local arrays has no other use for it.
    return MachineCode(int(usage[1]), int(usage[2]), *loops(text))


def loops(text: str) -> tuple[int, int]:
    """Instructions of the longest innermost loop, and synchronous global loads of all innermost loops, in a listing."""
    code = [(int(address, 16), instruction) for address, instruction in _INSTRUCTION.findall(text)]
    place = {address: index for index, (address, _) in enumerate(code)}
    spans = []
    for index, (_, instruction) in enumerate(code):
        branch = _BRANCH.search(instruction)
        start = place.get(int(branch[1], 16), index) if branch else index
        if start < index:  # a branch to itself ends every kernel
            spans.append((start, index))
    innermost = [
        (start, end)
        for start, end in spans
        if not any((a, b) != (start, end) and start <= a and b <= end for a, b in spans)
    ]
    loads = sum(bool(_LOAD.search(instruction)) for a, b in innermost for _, instruction in code[a : b + 1])
    return max((end - start + 1 for start, end in innermost), default=0), loads
