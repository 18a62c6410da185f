"""What every replacement must hold to, whatever the dialect: training through it, and leaving it, changes nothing."""

import copy

import torch
from torch import nn

import annnet_kernels as ak

OUT_PROJECTIONS = ("W", "out_project", "ConvOut", "Conv_Out")


def randomise_output(block):
    """The output projection starts at zero, and then the attention is multiplied away."""
    for name, module in block.named_modules():
        if name.rpartition(".")[2] in OUT_PROJECTIONS:
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)


def train(run, model, steps, optimizer=None):
    """A few steps; ``run(model)`` returns a loss."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        run(model).backward()
        optimizer.step()
    return optimizer


def assert_same_state(model, other):
    assert model.state_dict().keys() == other.state_dict().keys()
    for (name, got), want in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


def assert_round_trip(model, run, replaced):
    """Train, replace, train, restore, train: equal to never having replaced; the optimizer was made before."""
    untouched = copy.deepcopy(model)
    optimizer = train(run, model, 2)
    report = ak.replace_blocks(model)
    assert list(report.replaced) == replaced, str(report)
    train(run, model, 2, optimizer)
    assert len(ak.restore_blocks(model).replaced) == len(replaced)
    train(run, model, 2, optimizer)
    train(run, untouched, 6)
    assert_same_state(model, untouched)
