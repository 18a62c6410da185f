"""Row shards on the Triton kernels: every row as a bin of its own, and a sharded block of one process."""

import copy

import pytest
import torch
from helpers import assert_as_accurate_as_plain, random_map
from pool_rule import random_token_gradient
from row_shards_rule import CANCELLED
from torch import nn

import annnet_kernels as ak
from annnet_kernels.parallel.row_shards import Band
from annnet_kernels.runtime.backends import interpreting

DEVICE = "cpu" if interpreting() else "cuda"
OF_TRAINING = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SEEDS = 1 if interpreting() else 5
SIZES = (1, 3, 6, 8)


@OF_TRAINING
def test_bands_add_up_to_the_tokens(dtype):
    pool, pool_bwd = torch.ops.annnet.pyramid_pool, torch.ops.annnet.pyramid_pool_bwd

    def whole(x, grad):
        with ak.use_backend("reference"):
            tokens = pool(x, None, SIZES, SIZES)
        return {"tokens": tokens, "dx": pool_bwd(grad, None, [9, 10], SIZES, SIZES, False, "reference")}

    def run(_):
        x = random_map((1, 3, 9, 10), dtype, device=DEVICE)
        grad = random_token_gradient(1, 3, 110, dtype, device=DEVICE)
        tokens, spread = 0, []
        for top, rows in ((0, 1), (1, 3), (4, 5)):
            band = Band(top, rows, 9, SIZES, SIZES)
            with ak.use_backend("triton"):
                lines = pool(x[:, :, top : top + rows], None, *band.row_sizes)
            tokens = tokens + band.add_rows(lines.transpose(1, 2).float()).transpose(1, 2)
            back = band.spread(grad.transpose(1, 2).float()).transpose(1, 2).to(dtype)
            spread.append(pool_bwd(back, None, [rows, 10], *band.row_sizes, False, "triton"))
        return {"tokens": tokens, "dx": torch.cat(spread, dim=2)}, whole(x, grad), whole(x.double(), grad.double())

    assert_as_accurate_as_plain(run, dtype, seeds=SEEDS)


def parameter_gradients(block, x, weights):
    """Of a block whose parameters are float32, under autocast where the map is in 16 bits."""
    with torch.autocast(DEVICE, torch.bfloat16, enabled=x.dtype == torch.bfloat16):
        out = block(x)
    named = {name: p for name, p in block.named_parameters() if not name.endswith(CANCELLED)}
    return dict(zip(named, torch.autograd.grad((out * weights).sum(), list(named.values())), strict=True))


@OF_TRAINING
def test_a_sharded_block_equals_the_whole_one(alone, dtype):
    """The whole one in plain PyTorch is the measure: a ReLU that rounding flips in bfloat16 flips in both."""

    def run(_):
        block = ak.APNB(6, 7, 4, 3, dropout=0.0).to(DEVICE)
        nn.init.normal_(block.stages[0].W.weight)
        whole, truth = copy.deepcopy(block), copy.deepcopy(block).double()
        ak.parallel.shard_rows(block)
        x, weights = (random_map((1, c, 4, 32), dtype, device=DEVICE) for c in (6, 7))
        with ak.use_backend("triton"):
            ours = parameter_gradients(block, x, weights)
        assert ak.last_backend("bn_relu_bwd_input") == "triton"
        with ak.use_backend("reference"):
            plain = parameter_gradients(whole, x, weights)
            return ours, plain, parameter_gradients(truth, x.double(), weights.double())

    assert_as_accurate_as_plain(run, dtype, seeds=SEEDS)
