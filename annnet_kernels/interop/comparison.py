"""Whether a stranger's block or head computes what its replacement would: both run on private copies, in float64.

Everything that could hide a difference is made random first: at the published start the output projection is zero, and
then plainly different blocks give the same output.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from ..blocks.collapse import Parts
from ..blocks.requirements import HOOKS

_TOLERANCE = 1e-8
"""Relative, in float64: rounding leaves about 1e-13, the smallest other operation many orders more."""

_NEGLIGIBLE = 1e-10
"""Absolute: some gradients are zero but for rounding."""

_DROPOUT = 0.4
"""Of the tail's dropout while comparing; not 0.5, which a dropout that reads no setting has by default."""


def difference(
    module: nn.Module,
    shapes: Sequence[tuple[int, ...]],
    replace: Callable[[nn.Module], None],
    *,
    dropouts: Callable[[nn.Module], Iterable[nn.Module]] = nn.Module.modules,
    as_list: bool = False,
) -> str | None:
    """How a module's replacement would differ from it; None if outputs, gradients and buffers agree in both modes.

    Args:
        module: left as it is, buffers and random generators included.
        shapes: of the maps that it takes.
        replace: replaces a copy in place.
        dropouts: finds the modules of a copy of which those that drop shall drop.
        as_list: whether it takes its maps as one list.
    """
    with _undisturbed():
        try:
            plain = _randomised_copy(module, dropouts)
            fused = copy.deepcopy(plain)
            replace(fused)
            generator = torch.Generator().manual_seed(1)
            maps = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
            for training in (False, True):
                expected, got = (_results(twin.train(training), maps, as_list) for twin in (plain, fused))
                for name, value in expected.items():
                    error = (got[name] - value).norm() / value.norm().clamp_min(1e-300)
                    if not error <= _TOLERANCE and not (got[name] - value).abs().max() <= _NEGLIGIBLE:
                        mode = "training" if training else "evaluation"
                        return f"computes something else: {name} differs by {error:.1e} in {mode} mode"
        except Exception as error:  # whatever a stranger's code raises, it is left alone
            return f"could not be compared: {type(error).__name__}: {error}"
    return None


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Every random generator of the CPU is put back, and nothing of the caller's modes reaches the comparison."""
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),  # enables gradients, too
            torch.autocast("cpu", enabled=False),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002


def _randomised_copy(original: nn.Module, dropouts: Callable[[nn.Module], Iterable[nn.Module]]) -> nn.Module:
    """A copy on the CPU in float64, without hooks, with random parameters and running statistics; ``dropouts`` drop."""
    plain = copy_without_hooks(original).to("cpu", torch.float64).requires_grad_()
    generator = torch.Generator().manual_seed(0)
    for module in dropouts(plain):
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = _DROPOUT
    with torch.no_grad():
        for parameter in plain.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.normal_(std=max(fan_in, 1) ** -0.5, generator=generator)
        for module in plain.modules():
            if isinstance(module, nn.SyncBatchNorm):
                module.__class__ = nn.BatchNorm2d  # type: ignore[assignment]  # other processes do not take part
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                module.running_mean.normal_(generator=generator)
                cast(Tensor, module.running_var).uniform_(0.5, 2.0, generator=generator)
    return plain


def copy_without_hooks(module: nn.Module) -> nn.Module:
    """A deep copy that can be called without anybody noticing."""
    twin = copy.deepcopy(module)
    for part in twin.modules():
        for hooks in HOOKS:
            getattr(part, hooks).clear()
    return twin


def block_shapes(parts: Parts) -> list[tuple[int, ...]]:
    """Of one map for a pyramid block, of two that differ in size for a fusion block."""
    shapes = [(2, parts.query.conv.in_channels, 13, 11)]
    if not parts.is_shared():
        shapes.insert(0, (2, parts.key.conv.in_channels, 10, 9))
    return list(shapes)


def _results(module: nn.Module, maps: list[Tensor], as_list: bool) -> dict[str, Tensor]:
    """Output, every gradient (zero where there is none) and every buffer of one call, whose dropout draws the same."""
    inputs = [x.clone().requires_grad_() for x in maps]
    module.zero_grad()
    torch.default_generator.manual_seed(2)  # the CPU's alone: torch.manual_seed reseeds the user's devices, too
    out = module(list(inputs)) if as_list else module(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    (out * weights).sum().backward()
    results = {"the output": out.detach()}
    leaves = {f"input {i}": x for i, x in enumerate(inputs)} | dict(module.named_parameters())
    for name, leaf in leaves.items():
        results[f"the gradient of {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
    return results | {f"the buffer {name}": buffer.double() for name, buffer in module.named_buffers()}
