"""The algebra of the collapse: the order of its products, and checkpoints around it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import annnet_kernels as ak
from annnet_kernels.ops.matrix_products import matrix_products
from annnet_kernels.ops.token_values import cheapest_order, program_of
from annnet_kernels.runtime import native


@pytest.mark.parametrize("sizes", [(110, 64, 16, 32, 32), (880, 64, 16, 32, 32), (3, 5), (2, 9, 4)], ids=str)
def test_chain_takes_the_fewest_operations(sizes: tuple[int, ...]) -> None:
    matrices = [torch.randn(m, n) for m, n in pairwise(sizes)]
    with FlopCounterMode(display=False) as ours:
        factors = [matrices[0], *(matrix.t() for matrix in matrices[1:])]
        program = program_of(cheapest_order(sizes), len(factors), like=0)
        product = [matrices[0], *matrix_products(factors, program)][-1]
    with FlopCounterMode(display=False) as plain:
        expected = torch.linalg.multi_dot(matrices) if len(matrices) > 1 else matrices[0]
    assert ours.get_total_flops() == plain.get_total_flops()
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))
@pytest.mark.parametrize("requests", [("reference", None), (None, "reference"), ("native", "reference")], ids=str)
def test_checkpointing_may_find_another_request(requests: tuple[str | None, str | None]) -> None:
    """What each pass keeps must agree, so it must not depend on which implementation serves."""
    block = ak.AFNB(12, 16, 16, 8, 8)
    torch.nn.init.normal_(block.stages[0].W.weight)
    low, high = torch.randn(1, 12, 24, 25, requires_grad=True), torch.randn(1, 16, 24, 25, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        block.zero_grad()
        with ak.use_backend(requests[0]):
            out = checkpoint(block, low, high, use_reentrant=False) if checkpointed else block(low, high)
        with ak.use_backend(requests[1]):
            out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        gradients.append([p.grad.clone() for p in block.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)
