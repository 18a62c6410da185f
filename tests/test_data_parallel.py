"""Replicas of torch.nn.DataParallel, with the broadcast stood in for on a CPU."""

import copy
import sys

import pytest
import torch
from block_rule import assert_same, draw_maps, output_weights
from torch import nn

import annnet_kernels as ak

pytestmark = pytest.mark.usefixtures("one_thread")


def broadcast_on_a_cpu(tensors, devices, detach=False):
    """As DataParallel's: the first device has the tensors themselves, the others copies that pass gradients back."""
    copies = [tensors, *([t.detach().clone() if detach else t * 1 for t in tensors] for _ in devices[1:])]
    return [list(tensors_of_device) for tensors_of_device in copies]


@pytest.mark.tool(
    "torch.nn.DataParallel", "works", "replicas: outputs, gradients and statistics as plain, folds left aside"
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_replicas_of_data_parallel(pair, training, monkeypatch):
    monkeypatch.setattr(sys.modules["torch.nn.parallel.replicate"], "_broadcast_coalesced_reshape", broadcast_on_a_cpu)
    fused, plain, kind = pair
    maps, weights, found = draw_maps(kind), output_weights(kind), []
    for block in (fused, plain):
        block.train(training)
        if block is fused and not training:
            ak.fold_for_inference(block)
        replicas = nn.parallel.replicate(block, [0, 1])
        assert all(replica.__dict__.get("_fold") is None for replica in replicas)
        outputs = [replica(*maps) for replica in replicas]
        sum((out * weights).sum() for out in outputs).backward()
        gradients = {f"grad {name}": p.grad for name, p in block.named_parameters()}
        found.append(
            {"first": outputs[0].detach(), "second": outputs[1].detach(), **gradients, **dict(block.named_buffers())}
        )
    assert_same(*found)
    assert "collapsed" in repr(nn.parallel.replicate(fused, [0, 1])[1])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_replicas_of_a_network(training, monkeypatch):
    from checkpoint_states import net

    monkeypatch.setattr(sys.modules["torch.nn.parallel.replicate"], "_broadcast_coalesced_reshape", broadcast_on_a_cpu)
    model, x = net().train(training), torch.randn(2, 3, 33, 40)
    expected = copy.deepcopy(model)(x)
    got = nn.parallel.replicate(model, [0, 1])[1](x)
    for out, want in zip(got, expected, strict=True) if training else [(got, expected)]:
        torch.testing.assert_close(out, want)
