"""The mended interpreter rounds to nearest even and multiplies bfloat16 values; unmended it does neither."""

from __future__ import annotations

import pytest
import torch

from annnet_kernels.runtime.backends import interpreting

if not interpreting():
    pytest.skip("is about Triton's interpreter", allow_module_level=True)

import triton
import triton.language as tl


@triton.jit
def product_kernel(a_ptr, b_ptr, out_ptr, SIDE: tl.constexpr):
    offsets = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    tl.store(out_ptr + offsets, tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)))


@triton.jit
def round_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets).to(tl.bfloat16))


def test_products_are_of_the_values():
    a, b = torch.randn(2, 16, 16).bfloat16()
    out = torch.empty(16, 16)
    product_kernel[(1,)](a, b, out, SIDE=16)
    torch.testing.assert_close(out, a.float() @ b.float())


def test_rounding_is_to_nearest_even():
    patterns = torch.randint(-(2**31), 2**31 - 1, (1024,), dtype=torch.int64).to(torch.int32)
    patterns[:64] = (patterns[:64] & ~0xFFFF) | 0x8000  # halfway between two bfloat16 values
    x = patterns.view(torch.float32)
    x[64:68] = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0])
    out = torch.empty(1024, dtype=torch.bfloat16)
    round_kernel[(1,)](x, out, SIZE=1024)
    expected = x.bfloat16()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.nan_to_num())
