"""Row shards on the Triton kernels: every row as a bin of its own, and a sharded block of one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import annnet_kernels as ak
from annnet_kernels.parallel.row_shards import Band
from annnet_kernels.runtime.backends import interpreting

DEVICE = "cpu" if interpreting() else "cuda"
SIZES = (1, 3, 6, 8)


def test_bands_add_up_to_the_tokens():
    x, weights = torch.randn(1, 3, 9, 10, device=DEVICE), torch.randn(1, 3, 110, device=DEVICE)
    total, spread = 0, []
    for top, rows in ((0, 1), (1, 3), (4, 5)):
        band = Band(top, rows, 9, SIZES, SIZES)
        with ak.use_backend("triton"):
            lines = torch.ops.annnet.pyramid_pool(x[:, :, top : top + rows], None, *band.row_sizes)
        total = total + band.add_rows(lines.transpose(1, 2))
        back = band.spread(weights.transpose(1, 2)).transpose(1, 2)
        spread.append(torch.ops.annnet.pyramid_pool_bwd(back, None, [rows, 10], *band.row_sizes, False, "triton"))
    with ak.use_backend("reference"):
        torch.testing.assert_close(total.transpose(1, 2), ak.pyramid_pool(x, SIZES))
    expected = torch.ops.annnet.pyramid_pool_bwd(weights, None, [9, 10], SIZES, SIZES, False, "reference")
    torch.testing.assert_close(torch.cat(spread, dim=2), expected)


@pytest.fixture
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_sharded_block_equals_the_whole_one(alone):
    block = ak.APNB(6, 7, 4, 3, dropout=0.0).to(DEVICE)
    nn.init.normal_(block.stages[0].W.weight)
    x, weights = torch.randn(1, 6, 7, 4, device=DEVICE), torch.randn(1, 7, 7, 4, device=DEVICE)
    found = []
    for backend in ("reference", "triton"):
        with ak.use_backend(backend):
            gradients = torch.autograd.grad((block(x) * weights).sum(), list(block.parameters()))
        found.append(gradients)
        assert ak.last_backend("bn_relu_bwd_input") == backend
        if backend == "reference":
            ak.parallel.shard_rows(block)
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
