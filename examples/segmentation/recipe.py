"""SGD and the poly schedule."""

from __future__ import annotations

import torch
from torch import nn

from .options import Options


def make_optimizer(network: nn.Module, options: Options) -> torch.optim.SGD:
    """SGD with momentum; weights of convolutions decay, norms and biases do not."""
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=options.lr, momentum=options.momentum)


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, options: Options) -> float:
    """The poly schedule, lr · (1 − step/steps)^power: a function of the step, so there is no state to resume."""
    lr = options.lr * (1 - step / options.steps) ** options.power
    for group in optimizer.param_groups:
        group["lr"] = lr
    return float(lr)
