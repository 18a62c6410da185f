"""The compile table: a reduced set of kernels compiles clean here, and every kind of fault is seen."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace

import pytest
import torch

from annnet_kernels.runtime.backends import interpreting

if interpreting():
    pytest.skip("the interpreter replaces what Triton would compile", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl

from annnet_kernels.kernels import asymmetric_attention
from annnet_kernels.kernels.launch import Launch
from tools.compile_table import expected, machine_code, table
from tools.compile_table.__main__ import main


@triton.jit
def too_many_values_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    first, second = tl.load(x_ptr + offsets), tl.load(x_ptr + BLOCK + offsets)
    for _ in range(count):
        first, second = first * second, first + second
    tl.store(out_ptr + offsets, first + second)


@triton.jit
def product_kernel(x_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr):
    left = tl.load(x_ptr + tl.arange(0, M)[:, None] * K + tl.arange(0, K)[None, :])
    right = tl.load(x_ptr + tl.arange(0, K)[:, None] * N + tl.arange(0, N)[None, :])
    product = tl.dot(left, right, input_precision=PRECISION)
    tl.store(out_ptr + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :], product)


def product(dtype, m, n, k):
    x, out = torch.empty(0, dtype=dtype, device="meta"), torch.empty(0, device="meta")
    arguments = {"x_ptr": x, "out_ptr": out, "M": m, "N": n, "K": k, "PRECISION": "ieee"}
    return Launch(product_kernel, (1,), arguments, num_warps=4, num_stages=1)


def row(launch, dtype="float32", arch=80):
    return table.compile_row(dtype, "plain", launch, arch)


def test_a_spill_is_seen():
    x = torch.empty(0, device="meta")
    arguments = {"x_ptr": x, "out_ptr": x, "count": 9, "BLOCK": 4096}
    spilling = row(Launch(too_many_values_kernel, (1,), arguments, num_warps=4, num_stages=1, max_registers=32))
    assert spilling.spills > 0
    assert spilling.fault.startswith("spills")


def test_missing_tensor_cores_are_seen():
    on_tensor_cores = row(product(torch.float16, 32, 32, 32), "float16")
    assert on_tensor_cores.tensor_core > 0
    assert on_tensor_cores.fault is None
    # Labelled 16-bit, but a float32 product: the label decides what is demanded.
    assert row(product(torch.float32, 32, 32, 32), "float16").fault == "no tensor-core instruction"


def test_too_much_shared_memory_is_seen():
    assert "bytes of shared memory" in row(product(torch.float16, 64, 32, 1024), "float16", 86).fault


def test_what_does_not_compile_is_a_fault():
    assert "does not compile" in row(product(torch.float16, 3, 32, 32), "float16").fault


def test_every_module_of_launches_is_in_the_table():
    for name in table.MODULES:
        module = importlib.import_module(f"annnet_kernels.kernels.{name}")
        assert next(module.launch_variants(table.DEVICES[90]))


def attention_variants(arch, label, dtype="bfloat16"):
    """One launch per kernel of the full backward, and the forward without and with a skip map."""
    chosen = {}
    for name, layout, launch in table.variants(arch, ["asymmetric_attention"]):
        if name == dtype and layout == label:
            skip = launch.arguments.get("skip", (None,))[0] is not None
            chosen.setdefault((launch.kernel.__name__, skip), (name, layout, launch))
    return list(chosen.values())


LISTING = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/                   LDG.E R4, [R2.64] ;
        /*0020*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0030*/                   LDG.E.128 R8, [R2.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64] ;
        /*0050*/               @P0 BRA 0x30 ;
        /*0060*/                   FADD R1, R1, R4 ;
        /*0070*/               @P1 BRA 0x20 ;
        /*0080*/                   EXIT ;
        /*0090*/                   BRA 0x90 ;
"""


def test_loops_of_a_listing():
    """The inner loop has three instructions and one synchronous load; the outer one, and the trap at the end, none."""
    assert machine_code.loops(LISTING) == (3, 1)
    assert machine_code.loops(LISTING.replace("BRA 0x30", "NOP")) == (6, 1)


@pytest.mark.parametrize(
    ("registers", "warps", "kib", "arch", "programs"),
    [(128, 8, 96, 90, 2), (129, 8, 96, 90, 1), (128, 8, 114, 90, 1), (255, 4, 72, 90, 2), (32, 8, 0, 86, 6)],
)
def test_programs_of_a_multiprocessor(registers, warps, kib, arch, programs):
    assert machine_code.MachineCode(registers, 0, 0, 0).programs(arch, warps, kib * 1024) == programs


@pytest.mark.parametrize("arch", [80, 90])
def test_attention_kernels_compile_clean(arch):
    label = "channels_last, token-major tokens, normalised"
    rows = [table.compile_row(*v, arch) for v in attention_variants(arch, label)]
    assert {r.kernel for r in rows} >= {
        "asymmetric_attention_fwd_kernel",
        "asymmetric_attention_bwd_pixels_kernel",
        "asymmetric_attention_bwd_tokens_kernel",
    }
    assert [r.fault for r in rows] == [None] * len(rows)
    assert all(r.async_copies > 0 for r in rows if "tokens" in r.kernel or "fwd" in r.kernel)
    assert expected.falls(rows) == []
    if arch == 90:
        known = expected.load()
        assert known["triton"] != triton.__version__ or expected.worst(rows).keys() <= known["kernels"].keys()
        assert {r.programs for r in rows if "sum_splits" not in r.kernel} == {2}
        assert all(r.loop_loads == 0 for r in rows if "sum_splits" not in r.kernel)


def test_a_fall_is_seen(monkeypatch):
    row = table.Row("k", 90, "bfloat16", "channels_last", {}, 128, 0, 0, 1, 1, 2, 200, 0, None)
    known = {"triton": triton.__version__, "kernels": expected.worst([row])}
    monkeypatch.setattr(expected, "load", lambda: known)
    assert expected.falls([row]) == []
    assert expected.falls([replace(row, loop=219), replace(row, arch=80, programs=1)]) == []
    for worse in (replace(row, programs=1), replace(row, loop=221), replace(row, loop_loads=1)):
        (fall,) = expected.falls([row, worse])
        assert fall.startswith("k: channels_last: expected {'programs': 2, 'loop': 200, 'loop_loads': 0}, got")
    known["triton"] = "another"
    assert expected.falls([replace(row, programs=1)]) == []


def test_table_is_written_and_clean(tmp_path):
    file = tmp_path / "rows.json"
    arguments = ["--module", "asymmetric_attention", "--kernel", "sum_splits", "--arch", "90", "--jobs", "1"]
    assert main([*arguments, "--json", str(file)]) == 0
    rows = json.loads(file.read_text())
    assert {r["dtype"] for r in rows} == {"bfloat16", "float16", "float32"}
    assert {"kernel", "arch", "config", "registers", "spills", "shared_bytes", "tensor_core", "async_copies"} <= set(
        rows[0]
    )


def launches_of(size, channels_last, dtype=torch.bfloat16, widths=(256, 512, 110), batch=4):
    like = torch.empty(0, dtype=dtype, device="meta")
    key_channels, value_channels, tokens = widths
    empty_map, empty_tokens = asymmetric_attention.empty_map, asymmetric_attention.empty_tokens
    query = empty_map(like, (batch, key_channels, *size), channels_last)
    out = empty_map(like, (batch, value_channels, *size), channels_last)
    key, value = (empty_tokens(like, batch, c, tokens) for c in (key_channels, value_channels))
    logsumexp = like.new_empty((batch, size[0] * size[1]), dtype=torch.float32)
    device = table.DEVICES[90]
    operands = asymmetric_attention.Operands(query, None, key, value, 1.0, "ieee")
    forward = asymmetric_attention.plan_forward(operands, None, None, out, logsumexp, device)
    return forward + asymmetric_attention.plan_backward(out, operands, logsumexp, (query, key, value), device)


def test_sizes_of_an_image_compile_nothing_new():
    """All sizes of one layout and alignment share their compiled kernels, and all are in the table."""
    known = {table.specialise(launch, 90)[2] for _, _, launch in table.variants(90, ["asymmetric_attention"])}
    for channels_last, sizes, most in (
        (True, ((97, 97), (128, 256), (33, 40), (65, 129), (96, 96)), 1),
        (False, ((96, 96), (128, 256), (64, 128)), 1),
        (False, ((97, 97), (65, 129), (33, 41)), 1),
    ):
        keys = {}
        for size in sizes:
            for launch in launches_of(size, channels_last):
                keys.setdefault(launch.kernel.__name__, set()).add(table.specialise(launch, 90)[2])
        for name, distinct in keys.items():
            # The token gradients of query and value are two launches of one kernel, and may be written at once.
            assert len(distinct) <= (4 if "tokens" in name else most), (name, channels_last)
            assert distinct <= known or "tokens" in name, (name, channels_last)
