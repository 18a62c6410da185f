"""Calling autograd Functions cheaply."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
from torch.autograd import Function, forward_ad


def is_traced() -> bool:
    """Whether ``torch.compile`` or a transform of ``torch.func`` looks at what is called."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """PyTorch's decorator of a backward pass that has no derivative, by a shorter way where nothing is recorded."""
    refusing = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def wrapped(ctx: Any, *gradients: Any) -> Any:
        return refusing(ctx, *gradients) if torch.is_grad_enabled() else backward(ctx, *gradients)

    return wrapped


def apply(function: type[Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)`` for a Function with ``setup_context``, by a shorter way where nothing traces.

    Between two kernels nothing of the way from one to the other is in a cache. PyTorch's own ``apply`` inspects the
    signature of ``forward`` at every call, to bind keywords and defaults: a small block took 0.62 ms in evaluation on a
    CPU with it and takes 0.40 ms with the forward alone, which is enough where no gradient is wanted.
    """
    if is_traced():
        return function.apply(*arguments)
    if torch.is_grad_enabled():
        return _eager(function).apply(*arguments)
    return _forward(function, *arguments)


def _forward(function: type[Function], *arguments: Any) -> Any:
    """The forward alone, its operators called below autograd: there is nothing to record.

    In forward mode they are called above it, where they refuse a tangent.
    """
    if forward_ad._current_level >= 0:
        return function.forward(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        return function.forward(*arguments)


@cache
def _eager(function: type[Function]) -> type[Function]:
    """The Function with a ``forward`` that takes the context, whose arguments PyTorch hands over as they are."""

    def forward(ctx: Any, *arguments: Any) -> Any:
        output = _forward(function, *arguments)
        function.setup_context(ctx, arguments, output)
        return output

    members = {"forward": staticmethod(forward), "setup_context": staticmethod(Function.setup_context)}
    return type(function.__name__, (function,), members)
