"""Why a block runs its published forward instead of the collapsed one: one list of rules for all who ask.

The collapse reads weights and skips the forwards of the modules that hold them. Whoever replaces, hooks or wraps one of
these modules expects it to be called, and some of PyTorch's tools have to see every one of them. A rule looks at the
parts of a block and returns a reason in words, or None; :func:`why_not` returns the first reason of several rules.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrize

from .. import onnx
from ..runtime.tracers import exporting, jit_tracing, symbolic, vmapped
from .collapse import Parts
from .structures import OddStructure

Rule = Callable[[Parts], "str | None"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

_GLOBAL_HOOKS = tuple(f"_global{hooks}" for hooks in HOOKS)

WEIGHT_CLASSES = ("Parameter", "Tensor", "FakeTensor", "FunctionalTensor")
"""By name, since importing the classes of tracers takes longer than this package. Other tensors compute otherwise."""


def why_not(parts: Parts, rules: Sequence[Rule]) -> str | None:
    """The first reason that one of the rules gives; None if there is none."""
    for rule in rules:
        reason = rule(parts)
        if reason is not None:
            return reason
    return None


# ------------------------------------------------------------------------------- what stays true from call to call


def changed_modules(parts: Parts) -> str | None:
    """A module whose forward would be skipped has another class, a forward of its own, or hooks."""
    for kind, module in parts.skipped:
        actual = type(module) if "parametrizations" not in module._modules else _class_of(module)
        if kind is not None and actual is not kind:
            name = actual.__name__ if actual.__name__ != kind.__name__ else f"{actual.__module__}.{actual.__name__}"
            return f"{name} in the place of {kind.__name__}"
        attributes = module.__dict__
        if "forward" in attributes:
            return f"{actual.__name__} with a forward of its own"
        for hooks in HOOKS:
            if attributes[hooks]:
                return f"{actual.__name__} carries {hooks.strip('_').replace('_', ' ')}"
    return None


def sharded_weights(parts: Parts) -> str | None:
    """FSDP2 spreads the parameters of an inner module over processes."""
    for _, module in parts.skipped:
        for name, value in module._parameters.items():
            if type(value).__name__ == "DTensor":
                return f"{_name_of(module)} holds a sharded {name} (DTensor)"
    return None


def other_weights(parts: Parts) -> str | None:
    """A weight is a tensor of another class, such as a quantised one, which computes by itself."""
    for module in _convolutions(parts):
        for name, value in module._parameters.items():
            kind = type(value).__name__
            if value is not None and kind not in WEIGHT_CLASSES and kind != "DTensor":
                return f"{_name_of(module)} holds a {name} of class {kind}"
    return None


def other_geometry(parts: Parts) -> str | None:
    """A convolution or pool is more than a product over channels or a mean over bins."""
    traced = jit_tracing()  # shapes are tensors then
    for conv in _convolutions(parts):
        if (conv.kernel_size, conv.stride, conv.padding, conv.groups) != ((1, 1), (1, 1), (0, 0), 1):
            return f"{_name_of(conv)} is no plain 1 × 1 convolution: {conv.extra_repr()}"
        weight = None if traced else conv._parameters.get("weight")
        if weight is not None and weight.shape[:2] != (conv.out_channels, conv.in_channels):
            return f"{_name_of(conv)}({conv.in_channels}, {conv.out_channels}) holds a weight {tuple(weight.shape)}"
    for pool in parts.pools:
        size = pool.output_size
        if size is None or (isinstance(size, tuple) and None in size):
            return f"{_name_of(pool)} keeps a dimension of the map: output_size={size}"
    return None


def unknown_children(parts: Parts) -> str | None:
    """Somebody appended a module to a Sequential of the block."""
    known = {id(module) for _, module in parts.skipped}
    for container in parts.containers:
        if isinstance(container, nn.Sequential):
            for child in container._modules.values():
                if id(child) not in known:
                    return f"{type(child).__name__} in a {_name_of(container)} is no part of the block"
    return None


def other_widths(parts: Parts) -> str | None:
    """Somebody set an attribute that the published forward reads, and the modules say otherwise."""
    for name, value, conv in parts.widths:
        if not isinstance(value, Real) or value != conv.out_channels:
            return f"{name}={value!r}, where {_name_of(conv)} puts out {conv.out_channels} channels"
    return None


def differing_calls(parts: Parts) -> str | None:
    """The published pyramid block calls its projection twice, and the two calls may differ, as a dropout's do.

    A norm is called as often as published for its buffers, and nothing else is. What a class of somebody else's does is
    known where the whole block was compared with its replacement; one that calls itself a norm is taken for one.
    """
    if not parts.is_shared():
        return None
    conv = parts.query.conv
    if conv.training and parametrize.is_parametrized(conv) and _has_state(conv):
        return f"{_name_of(conv)} with a parametrization that moves at each of two calls"
    for module in parts.query[1:]:
        for inner in module.modules():
            name = type(inner).__name__
            known = type(inner) in _USUAL or type(inner) in parts.known or _is_of_torch(inner)
            if not known and "norm" not in name.lower():
                return f"{name}, which may draw or count at each of two calls"
            if not inner.training:
                continue
            if module is not parts.query.norm and any(buffer is not None for buffer in inner._buffers.values()):
                return f"{name} behind the norm, whose buffers move at each of two calls"
            if isinstance(inner, (nn.modules.dropout._DropoutNd, nn.RReLU)):
                return f"{name}, which draws anew at each of two calls"
    return None


_USUAL = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.Identity, nn.Sequential)
"""The usual classes, for which nothing is asked."""


def _is_of_torch(module: nn.Module) -> bool:
    """Whether the forward of a module is PyTorch's own."""
    return type(module).forward.__module__.startswith("torch.nn.modules.")


# ------------------------------------------------------------------------------------ what is true for this call alone


def watching_hooks(parts: Parts) -> str | None:
    """Global module hooks want to see every module; that of PyTorch's own ModuleTracker wants the block's name only."""
    for hooks in _GLOBAL_HOOKS:
        for hook in getattr(global_hooks, hooks).values():
            owner = type(getattr(hook, "__self__", None))
            if not any(base.__module__ == "torch.utils.module_tracker" for base in owner.__mro__):
                return hooks.strip("_").replace("_", " ")
    return None


def traced_by_jit(parts: Parts) -> str | None:
    """``torch.jit.trace`` records autograd Functions as calls into Python, and checks its trace without gradients."""
    return "torch.jit.trace" if jit_tracing() and not onnx.exporting() else None


def exported_for_training(parts: Parts) -> str | None:
    """The steps of a collapsed block have no derivative in the program that ``torch.export`` makes."""
    if not exporting() or onnx.exporting():
        return None
    return "torch.export in training mode" if _trains(parts) else None


def vectorised(parts: Parts) -> str | None:
    """``torch.vmap`` goes over the whole block."""
    return "torch.vmap over the block" if vmapped() else None


LASTING: tuple[Rule, ...] = (
    changed_modules,
    sharded_weights,
    other_weights,
    other_geometry,
    unknown_children,
    other_widths,
    differing_calls,
)
PASSING: tuple[Rule, ...] = (watching_hooks, traced_by_jit, exported_for_training, vectorised)

TO_COLLAPSE = LASTING + PASSING
"""What a block must be, and be called in, to run collapsed."""

ONCE_GATHERED = tuple(rule for rule in TO_COLLAPSE if rule is not sharded_weights)
"""The same for the time when no parameter is sharded any more."""


def _has_state(conv: nn.Module) -> bool:
    """Whether a parametrization of ``conv`` keeps buffers, as that of the spectral norm does."""
    return any(name.startswith("parametrizations.") for name, _ in conv.named_buffers())


class Block(Protocol):
    """A block that knows its parts."""

    def parts(self) -> Parts: ...


def why_plain(block: Block, rules: Sequence[Rule] = TO_COLLAPSE) -> str | None:
    """Why ``block`` runs its published forward; None if it may run collapsed. Raises nothing."""
    try:
        parts = block.parts()
    except OddStructure as odd:
        return str(odd)
    return why_not(parts, rules)


def parts_to_collapse(block: Block, *maps: object) -> Parts | None:
    """The parts of ``block`` for a call with these maps; None if the published forward has to run.

    A reason that lies in this call alone is no longer there for the ``repr`` to tell, so it is said aloud, once for
    each block.
    """
    if symbolic(*maps):
        _say(block, "torch.fx.symbolic_trace")
        return None
    try:
        parts = block.parts()
    except OddStructure as odd:
        _say_of_graph(str(odd))
        return None
    reason = why_not(parts, LASTING)
    if reason is not None:
        _say_of_graph(reason)
        return None
    reason = why_not(parts, PASSING)
    if reason is not None:
        _say(block, reason)
        return None
    if onnx.exporting() and _trains(parts):
        raise ValueError(
            "expected a block in evaluation mode for an export to ONNX, got training mode: call .eval() first"
        )
    return parts


_said: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def _say(block: Any, reason: str) -> None:
    """Warn that this call runs the published forward; once for each block and reason."""
    if torch.compiler.is_dynamo_compiling():
        return
    reasons = _said.setdefault(block, set())
    if reason not in reasons:
        reasons.add(reason)
        warnings.warn(
            f"annnet_kernels: {type(block).__name__} runs its published forward, because of {reason}", stacklevel=4
        )


def _say_of_graph(reason: str) -> None:
    """Say aloud what ties an ONNX graph to one size."""
    if onnx.exporting():
        warnings.warn(
            f"annnet_kernels: a block is exported with its published forward, because of {reason}; "
            f"how that pools holds for maps of this size only",
            stacklevel=4,
        )


def _trains(parts: Parts) -> bool:
    """Whether a module of the block is in training mode."""
    return any(module.training for _, module in parts.skipped)


def _convolutions(parts: Parts) -> list[nn.Conv2d]:
    convolutions = parts.key.conv, parts.query.conv, parts.value, parts.out, parts.join
    return [conv for conv in convolutions if conv is not None]


def _class_of(module: nn.Module) -> type:
    """The class of a module, without the one that a parametrization puts in front of it."""
    parametrized = "parametrizations" in module._modules and parametrize.is_parametrized(module)
    return type(module).__bases__[0] if parametrized else type(module)


def _name_of(module: nn.Module) -> str:
    """The class of a module, by its own name where it is parametrized."""
    return _class_of(module).__name__
