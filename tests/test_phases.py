"""The phase table: bytes and FLOP of a training step are those of its shapes, and machine code tells the waves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from annnet_kernels.runtime.backends import interpreting

if interpreting():
    pytest.skip("the interpreter replaces what Triton would compile", allow_module_level=True)
pytest.importorskip("triton")

import torch

from annnet_kernels.kernels.launch import Launch
from tools.compile_table.table import DEVICES
from tools.phases.__main__ import measured_of, rows_of, sums
from tools.phases.gpus import GPUS
from tools.phases.step import Ledger, Phase

ROOT = Path(__file__).resolve().parent.parent
BATCH, PIXELS, TOKENS, CHANNELS, KEYS = 8, 97 * 97, 110, 512, 256


def table(*arguments):
    command = [sys.executable, "-m", "tools.phases", "--blocks", "APNB", "--no-compile", "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *printed, last = done.stdout.splitlines()
    return "\n".join(printed), json.loads(last)


def test_a_step_is_counted_by_its_shapes(tmp_path):
    record = tmp_path / "result.json"
    kernels = [{"kernel": "asymmetric_attention_fwd_kernel", "us": 50.25}, {"kernel": "cudnn", "us": 9.0}]
    record.write_text(json.dumps({"profile": {"APNB 97x97": {"ours": {"kernels": kernels}}}}))
    printed, found = table("--record", str(record))
    assert (found["gpu"], found["derived"]) == ("H200", True)
    rows = {row["name"]: row for row in found["blocks"]["APNB"]["launches"]}
    attention = rows["asymmetric_attention_fwd_kernel"]
    # Query, skip map and output in 16 bits, the logsumexp and the constant in 32, keys and values, the norm's table.
    maps = BATCH * PIXELS * (KEYS + 2 * CHANNELS) * 2
    rest = BATCH * PIXELS * 4 + CHANNELS * 4 + BATCH * TOKENS * (KEYS + CHANNELS) * 2 + 4 * KEYS * 4
    assert attention["bytes"] == pytest.approx(maps + rest, rel=1e-4)
    assert attention["flop"] == 2 * BATCH * PIXELS * TOKENS * (KEYS + CHANNELS)
    assert attention["floor_us"] == pytest.approx(attention["bytes"] / 4.3e12 * 1e6)
    assert attention["programs"] == BATCH * -(-PIXELS // 128)
    names = ("convolution", "addmm")  # the latter adds a product to the gradient of the map
    products = [row for row in found["blocks"]["APNB"]["launches"] if any(name in row["name"] for name in names)]
    # Two projections forward, of 256 and 512 channels; their gradients are twice as many products.
    flop = 2 * BATCH * PIXELS * CHANNELS * (KEYS + CHANNELS)
    assert sum(row["flop"] for row in products) == 3 * flop
    total = found["blocks"]["APNB"]["sums"]
    assert total["all"]["bytes"] == total["ours"]["bytes"] + total["library calls"]["bytes"]
    assert total["ours"]["launches"] > 10
    assert found["blocks"]["APNB"]["measured_us"]["library calls"] == 9.0
    assert "50.2" in next(line for line in printed.splitlines() if line.startswith("asymmetric_attention_fwd"))


def test_waves_come_from_machine_code():
    from annnet_kernels.kernels.attention_kernels import asymmetric_attention_sum_splits_kernel

    x = torch.empty(2, 1024 * 400, device="meta")
    arguments = {"partials_ptr": x, "out_ptr": x[0], "splits": 2, "size": 1024 * 400, "BLOCK": 1024}
    launch = Launch(asymmetric_attention_sum_splits_kernel, (400,), arguments, num_warps=4, num_stages=1)
    phases = [Phase("kernel", 3 * 1024 * 400 * 4, 0, "ieee", launch)] * 2 + [
        Phase("aten.mm", 10, 67 * 10**12, "ieee", None)
    ]
    ours, library = rows_of(phases, GPUS[90], compiled=True)
    assert (ours.calls, ours.programs) == (2, 400)
    assert ours.programs_per_multiprocessor >= 8
    assert ours.waves == pytest.approx(400 / (DEVICES[90].multiprocessors * ours.programs_per_multiprocessor))
    assert ours.floor_us == pytest.approx(2 * 3 * 1024 * 400 * 4 / 4.3e12 * 1e6)
    assert library.floor_us == pytest.approx(1e6)
    assert sums([ours, library])["all"]["launches"] == 3


def test_a_product_added_in_place_reads_and_writes_its_sum():
    total, left, right = torch.ones(6, 5), torch.ones(6, 7), torch.ones(7, 5)
    with Ledger() as ledger:
        total.addmm_(left, right)
        total.new_ones(3, 4)
        total.t()
    product, ones = ledger.phases
    assert (product.flop, product.kind, product.size) == (2 * 6 * 7 * 5, "ieee", 4 * (2 * 6 * 5 + 6 * 7 + 7 * 5))
    assert (ones.flop, ones.size) == (0, 4 * 12)


def test_products_in_three_parts_cost_three():
    gpu = GPUS[90]
    assert gpu.seconds(0, 10**12, "tf32x3") == pytest.approx(3 * gpu.seconds(0, 10**12, "tf32"))
    assert gpu.seconds(10**9, 1, "bfloat16") == 10**9 / gpu.bandwidth


def test_a_record_without_the_block_is_refused(tmp_path):
    record = tmp_path / "result.json"
    record.write_text(json.dumps({"profile": {}}))
    with pytest.raises(ValueError, match="not enough values"):
        measured_of(record, "APNB", set())
