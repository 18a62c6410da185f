"""The compile table: a reduced set of kernels compiles clean here, and every kind of fault is seen."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from annnet_kernels.backends import interpreting

if interpreting():
    pytest.skip("the interpreter replaces what Triton would compile", allow_module_level=True)
pytest.importorskip("triton")

import triton
import triton.language as tl

from annnet_kernels.kernels import asymmetric_attention
from annnet_kernels.kernels.launch import Launch
from benchmarks import codegen


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
    return codegen.compile_row(dtype, "plain", launch, arch)


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
    for name in codegen.MODULES:
        module = importlib.import_module(f"annnet_kernels.kernels.{name}")
        assert next(module.launch_variants(codegen.DEVICES[90]))


def attention_variants(arch, label, dtype="bfloat16"):
    """One launch per kernel of the full backward and the forward."""
    chosen = {}
    for name, layout, launch in codegen.variants(arch, ["asymmetric_attention"]):
        if name == dtype and layout == label:
            chosen.setdefault(launch.kernel.__name__, (name, layout, launch))
    return list(chosen.values())


@pytest.mark.parametrize("arch", [80, 90])
def test_attention_kernels_compile_clean(arch):
    rows = [codegen.compile_row(*v, arch) for v in attention_variants(arch, "channels_last, token-major tokens")]
    assert {r.kernel for r in rows} >= {
        "asymmetric_attention_fwd_kernel",
        "asymmetric_attention_bwd_pixels_kernel",
        "asymmetric_attention_bwd_tokens_kernel",
    }
    assert [r.fault for r in rows] == [None] * len(rows)
    assert all(r.async_copies > 0 for r in rows if "tokens" in r.kernel or "fwd" in r.kernel)


def test_table_is_written_and_clean(tmp_path):
    file = tmp_path / "rows.json"
    arguments = ["--module", "asymmetric_attention", "--kernel", "sum_splits", "--arch", "90", "--jobs", "1"]
    assert codegen.main([*arguments, "--json", str(file)]) == 0
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
    device = codegen.DEVICES[90]
    operands = asymmetric_attention.Operands(query, None, key, value, 1.0, "ieee")
    forward = asymmetric_attention.plan_forward(operands, None, None, out, logsumexp, device)
    return forward + asymmetric_attention.plan_backward(out, operands, logsumexp, (query, key, value), device)


def test_sizes_of_an_image_compile_nothing_new():
    """All sizes of one layout and alignment share their compiled kernels, and all are in the table."""
    known = {codegen.specialise(launch, 90)[2] for _, _, launch in codegen.variants(90, ["asymmetric_attention"])}
    for channels_last, sizes, most in (
        (True, ((97, 97), (128, 256), (33, 40), (65, 129), (96, 96)), 1),
        (False, ((96, 96), (128, 256), (64, 128)), 1),
        (False, ((97, 97), (65, 129), (33, 41)), 1),
    ):
        keys = {}
        for size in sizes:
            for launch in launches_of(size, channels_last):
                keys.setdefault(launch.kernel.__name__, set()).add(codegen.specialise(launch, 90)[2])
        for name, distinct in keys.items():
            # The token gradients of query and value are two launches of one kernel, and may be written at once.
            assert len(distinct) <= (4 if "tokens" in name else most), (name, channels_last)
            assert distinct <= known or "tokens" in name, (name, channels_last)
