"""How an operator becomes known to PyTorch: schema, fake, choice of implementation, autograd, vmap, FLOP formula.

An operator is written once as an allocator of its outputs (which is also its fake) and as implementations that fill
those outputs; every implementation takes the operator's arguments followed by the allocated outputs. So the layout of
an output is decided in one place, whichever implementation runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad

from ..runtime.autocast import no_autocast
from ..runtime.backends import choose_backend, record_choice, requested_backend
from . import calls
from .flops import register_flops

NAMESPACE = "annnet"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")

TRITON_MODULES: dict[str, str] = {}
"""Which module of ``annnet_kernels.kernels`` launches the kernels of an operator."""

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


class _Steps:
    """The operators, as the Functions of this package call them; each has the name of its operator."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"there is no operator {NAMESPACE}::{name}")


steps: Any = _Steps()

_PLAIN = {torch.Tensor, torch.nn.Parameter}

is_batch_of_gradients = torch._C._functorch.is_legacy_batchedtensor
"""Whether a tensor stands for many, as in ``torch.autograd.grad(..., is_grads_batched=True)``."""


class Repeater(NamedTuple):
    """How an operator runs below the dispatcher, again and again on arguments that look the same."""

    once: Callable[..., tuple[Any, calls.Call | None]]
    """Arguments → outputs, and the call that made them, where it can be repeated."""
    bind: Callable[[calls.Call], Callable[..., Any]]
    """That call → a function of arguments."""


REPEATERS: dict[Any, Repeater] = {}


def launches(x: torch.Tensor) -> bool:
    """Whether work on the device of ``x`` is launched: then a cast costs a launch, and a step may wait for the host."""
    return x.is_cuda


def nobody_listens() -> bool:
    """Whether no mode, transform, tracer or profiler wants to see what is called."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._autograd._profiler_enabled()
        or torch._C._get_tracing_state() is not None
    )


def _step(operator: Any, run: Callable[..., Any]) -> Callable[..., Any]:
    """A call of ``operator`` from inside a Function, where gradients are off.

    PyTorch's dispatcher takes about 50 µs for an operator written in Python, several times what the rest of a call
    takes, and as long as some kernels. Where nobody listens (no mode, transform, tracer or profiler, no tensor of
    another class), the call goes straight to the implementation.
    """

    def call(*arguments: Any) -> Any:
        if torch.is_grad_enabled() or not nobody_listens():
            return operator(*arguments)
        for x in arguments:
            kind = type(x)
            if kind in _PLAIN:
                if is_batch_of_gradients(x):
                    return operator(*arguments)
            elif kind in calls.NO_TENSORS or (kind is list and x and type(x[0]) in calls.NO_TENSORS):
                continue
            elif not _is_plain(x):
                return operator(*arguments)
        return run(*arguments)

    return call


def _is_plain(argument: Any) -> bool:
    """Whether an argument holds no tensor, or those of PyTorch's own class that stand for themselves."""
    if isinstance(argument, (list, tuple)):
        return all(type(x) in calls.NO_TENSORS or _is_plain(x) for x in argument)
    if type(argument) in _PLAIN:
        return not is_batch_of_gradients(argument)
    return not isinstance(argument, torch.Tensor)


def register(
    schema: str,
    *,
    allocate: Callable[..., Any],
    reference: Callable[..., None],
    triton_module: str | None,
    vmap: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
    written: int | None = None,
    setting: Callable[[torch.dtype], Any] | None = None,
) -> Callable[[Callable[..., Any]], None]:
    """Define an operator and return a decorator for the function that computes it differentiably.

    That function gets the operator's arguments while gradients are recorded, and may return ``NotImplemented``. Then,
    and for an operator without such a function, the operator is a step inside of somebody else's Function: it runs,
    and its outputs refuse a backward pass.

    Args:
        schema: the operator's schema. One whose last argument is ``str? backend`` follows that request (the backward
            operators: they get the request of their forward); any other follows ``use_backend``.
        allocate: arguments → uninitialised output, or tuple of outputs. Serves as fake kernel, too.
        reference: plain PyTorch implementation.
        triton_module: module of ``annnet_kernels.kernels`` whose function named as the operator launches the kernel.
            It is imported at the first launch, so that importing the package does not import Triton. None if there
            are no Triton kernels for it.
        vmap: batching rule, as ``torch.library.register_vmap`` takes it; None if the operator is not to be batched.
        flops: FLOP of a call (2 per multiply-add), as ``register_flop_formula`` takes it; None counts nothing.
        written: index of the operand that an in-place operator (its name ends in ``_``) writes. Implementations are
            those of the operator without the underscore, which get this operand as their first output.
        setting: what of the user's settings the implementations follow, by the dtype of the first operand.
    """
    operator_name = schema.split("(", 1)[0]
    name = operator_name.removesuffix("_")
    takes_backend = "str? backend" in schema
    has_triton = triton_module is not None
    if triton_module is not None:
        TRITON_MODULES[name] = triton_module
    LIBRARY.define(schema, tags=_TAGS)
    operator = getattr(getattr(torch.ops, NAMESPACE), operator_name).default

    takes_list, returns_list = f"{operator_name}(Tensor[] " in schema, "-> Tensor[]" in schema
    mutated = [
        i for i, a in enumerate(operator._schema.arguments) if a.alias_info is not None and a.alias_info.is_write
    ]

    def uncast_reference(*arguments: Any) -> None:
        with no_autocast(next(_tensors_of(arguments)).device.type):  # it says itself what it rounds
            reference(*arguments)

    implementations: dict[str, Callable[..., None]] = {"reference": uncast_reference}

    def implementation(backend: str) -> Callable[..., None]:
        if backend not in implementations:
            if backend == "triton":
                module = importlib.import_module(f"annnet_kernels.kernels.{TRITON_MODULES[name]}")
                implementations[backend] = getattr(module, name)
            else:
                implementations[backend] = getattr(torch.ops.annnet_native, name).default
        return implementations[backend]

    def count_writes(operands: Sequence[Any]) -> None:
        for index in mutated:  # below autograd nothing counts it
            if operands[index] is not None and not operands[index].is_inference():
                torch.autograd.graph.increment_version(operands[index])

    def once(*arguments: Any) -> tuple[Any, calls.Call | None]:
        """The outputs, and the call to repeat for arguments that look the same, where there is one."""
        *operands, requested = arguments if takes_backend else (*arguments, requested_backend())
        flat = [*operands[0], *operands[1:]] if takes_list else operands
        key = known = None
        if launches(flat[0]) and calls.repeating():
            settings = None if setting is None else setting(flat[0].dtype)
            key, known = calls.find((operator_name, requested, settings, *calls.kind_of(flat)), flat)
        if known is None:
            outputs, known = fill_new_outputs(arguments, operands, flat, requested, key)
        else:
            outputs = known.repeat(flat)
            record_choice(name, "triton")
        if mutated:
            count_writes(operands)
        return outputs, known

    def bind(call: calls.Call) -> Callable[..., Any]:
        """A function for arguments that look like those of ``call``."""

        def again(*arguments: Any) -> Any:
            operands = arguments[:-1] if takes_backend else arguments
            outputs = call.repeat([*operands[0], *operands[1:]] if takes_list else operands)
            record_choice(name, "triton")
            if mutated:
                count_writes(operands)
            return outputs

        return again

    def run(*arguments: Any) -> Any:
        return once(*arguments)[0]

    def fill_new_outputs(
        arguments: Sequence[Any], operands: Sequence[Any], flat: Sequence[Any], requested: str | None, key: Any
    ) -> tuple[Any, calls.Call | None]:
        outputs = allocate(*arguments)
        filled = outputs if isinstance(outputs, (tuple, list)) else () if outputs is None else (outputs,)
        if written is not None:
            filled = (operands[written], *filled)
        first = flat[0]
        backend = choose_backend(name, first.device, first.dtype, requested, has_triton=has_triton)
        fill = implementation(backend)
        if backend != "triton":
            fill(*operands, *filled)
            return outputs, None
        plan = fill.run_and_plan(*flat, *filled) if hasattr(fill, "run_and_plan") else fill(*flat, *filled)
        if plan is None or key is None:
            return outputs, None
        call = calls.Call(plan, outputs, written)
        calls.keep(key, flat, call)
        return outputs, call

    LIBRARY.impl(operator_name, run, "CompositeExplicitAutograd")
    setattr(steps, operator_name, _step(operator, run))
    REPEATERS[operator] = Repeater(once, bind)
    torch.library.register_fake(f"{NAMESPACE}::{operator_name}", allocate, lib=LIBRARY)
    if vmap is not None:
        torch.library.register_vmap(f"{NAMESPACE}::{operator_name}", vmap, lib=LIBRARY)
    if flops is not None:
        register_flops(operator.overloadpacket, flops)
    differentiable: Callable[..., Any] | None = None

    def autograd(*arguments: Any) -> Any:
        if not _needs_autograd(operator_name, arguments):
            return below_autograd(*arguments)
        outputs = NotImplemented if differentiable is None else differentiable(*arguments)
        if outputs is NotImplemented:
            within_lists = list(_tensors_of(a for a in arguments if isinstance(a, (list, tuple))))
            results = _WithoutDerivative.apply(
                below_autograd, operator_name, written, len(arguments), *arguments, *within_lists
            )
            outputs = results if written is None else results[:-1]
            if returns_list:
                return list(outputs)
            return outputs if len(outputs) > 1 else outputs[0]
        return outputs

    def below_autograd(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    LIBRARY.impl(operator_name, autograd, "Autograd")

    def route_autograd(function: Callable[..., Any]) -> None:
        nonlocal differentiable
        differentiable = function

    return route_autograd


def shared_by_maps(operator_name: str, **dims: int | None) -> None:
    """Refuse to batch the named operands, which are one for all maps of a call."""
    for name, dim in dims.items():
        if dim is not None:
            raise NotImplementedError(
                f"torch.ops.{NAMESPACE}.{operator_name}: torch.vmap serves one {name} for all maps, got a batched one"
            )


def _tensors_of(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Those that are arguments, and those in lists that are."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors_of(argument)


class _WithoutDerivative(torch.autograd.Function):
    """Lets the steps run where gradients are recorded, as an exported block does, and refuses only their backward."""

    @staticmethod
    def forward(ctx: Any, call: Callable[..., Any], name: str, written: int | None, count: int, *arguments: Any) -> Any:
        """Calls with the first ``count`` arguments; the others are the tensors in lists, for autograd to see."""
        ctx.name = name
        result = call(*arguments[:count])
        outputs = tuple(result) if isinstance(result, (tuple, list)) else (result,)
        if written is None:
            return outputs
        ctx.mark_dirty(arguments[written])
        return *outputs, arguments[written]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            f"torch.ops.{NAMESPACE}.{ctx.name}: the operator has no derivative of its own; "
            f"call it without gradient mode, inside of a torch.autograd.Function"
        )


def _needs_autograd(name: str, arguments: tuple[Any, ...]) -> bool:
    """Whether a bare operator must record a gradient; torch.func transforms are refused, forward mode with them."""
    tensors = list(_tensors_of(arguments))
    tangent = any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if (tangent or recorded) and torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"torch.ops.{NAMESPACE}.{name}: the bare operator has no torch.func derivatives; "
            f"call the function of annnet_kernels (reverse mode only)"
        )
    if tangent:
        raise NotImplementedError(f"torch.ops.{NAMESPACE}.{name}: forward-mode differentiation is not implemented")
    return recorded
