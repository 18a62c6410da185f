"""The CUDA C++ kernels in the compile table: clean here, and every kind of fault is seen."""

from __future__ import annotations

import pytest

from annnet_kernels.runtime.backends import interpreting

if interpreting():
    pytest.skip("the interpreter replaces what Triton would compile", allow_module_level=True)
pytest.importorskip("triton")

from tools.compile_table import cuda
from tools.compile_table.__main__ import main


def test_kernels_are_clean() -> None:
    if cuda.why_not() is not None:
        pytest.skip(f"CUDA C++: {cuda.why_not()}")
    rows = list(cuda.rows(90))
    assert len(rows) == 4 * 9  # per dtype: channels in vectors and single, planes and direct, both ways, and the finish
    assert [row["fault"] for row in rows] == [None] * len(rows)
    assert all(row["async_copies"] > 0 for row in rows if row["kernel"] == "pool_planes_kernel")
    assert all(row["shared_bytes"] <= 48 << 10 for row in rows)
    assert main(["--module", "cuda", "--kernel", "planes", "--arch", "90", "--jobs", "1"]) == 0


def test_faults_are_seen() -> None:
    symbol = "_ZN6annnet4cuda20pool_channels_kernelIfLi4EEEvNS0_8PoolArgsE"
    text = f" Function {symbol}:\n  REG:40 STACK:{{stack}} SHARED:0 LOCAL:0\n\t\tFunction : {symbol}\n{{code}}"
    clean, spilled, narrow = (
        next(cuda.read(text.format(stack=stack, code=code), 90))
        for stack, code in (
            (0, "LDG.E.EF.128 R4, [R2.64] ;"),
            (16, "LDG.E.128 R4, [R2.64] ;\nSTL.64 [R1], R8 ;\nLDL R3, [R1] ;"),
            (0, "LDG.E R4, [R2.64] ;"),
        )
    )
    assert (clean["fault"], clean["dtype"], clean["registers"]) == (None, "float32", 40)
    assert (spilled["spills"], spilled["fault"]) == (16, "spills (16 bytes of stack)")
    assert narrow["fault"] == "no 16-byte load or store of the map"
