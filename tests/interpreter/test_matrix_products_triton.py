"""The Triton kernel of the products of weights and tokens: dtypes in and out, strides, sizes that no tile divides."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_as_accurate_as_plain

import annnet_kernels as ak
from annnet_kernels.runtime.backends import interpreting

DEVICE = "cpu" if interpreting() else "cuda"
SEEDS = 3 if interpreting() else 5
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = [(110, 64, 19), (1, 1, 1), (65, 33, 130), (64, 256, 64)]
"""Rows, depth, columns."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
def test_accuracy(size, dtype, transposed):
    """A product of a 16-bit matrix with float32 weights, either way round, written in both dtypes."""
    rows, depth, columns = size

    def draw(m, n, dtype):
        x = torch.randn((n, m) if transposed else (m, n), device=DEVICE).to(dtype)
        return x.t() if transposed else x

    def run(seed):
        narrow, wide = draw(rows, depth, dtype), draw(depth, columns, torch.float32)
        with ak.use_backend("triton"):
            products = torch.ops.annnet.matrix_products([narrow, wide], [0, ~1], [1, ~0], [0, 1])
        ours = dict(zip(("narrow", "wide"), products, strict=True))
        plain = torch.mm(narrow.float(), wide)
        truth = torch.mm(narrow.double(), wide.double())
        return ours, {"narrow": plain.to(dtype), "wide": plain.t()}, {"narrow": truth, "wide": truth.t()}

    assert_as_accurate_as_plain(run, dtype, seeds=SEEDS)
    assert ak.last_backend("matrix_products") == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_products(dtype):
    """Products between products are float32: nothing is rounded to the dtype of the factors."""
    a, b, c = (torch.randn(n, m, device=DEVICE).to(dtype) for n, m in ((7, 5), (5, 6), (6, 3)))
    with ak.use_backend("triton"):
        ab, abc, square = torch.ops.annnet.matrix_products([a, b, c], [0, 3, ~4], [1, 2, 4], [-1] * 3)
    a, b, c = a.float(), b.float(), c.float()
    for found, expected in ((ab, a @ b), (abc, a @ b @ c), (square, (a @ b @ c).t() @ (a @ b @ c))):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing(dtype):
    a, b = (torch.ones(shape, dtype=dtype, device=DEVICE) for shape in ((0, 3), (3, 4)))
    with ak.use_backend("triton"):
        (product,) = torch.ops.annnet.matrix_products([a, b], [0], [1], [0])
    assert product.shape == (0, 4)
    assert product.dtype == dtype
