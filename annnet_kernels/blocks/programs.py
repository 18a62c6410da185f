"""A block's passes as programs: what they call is recorded once and repeated, with nothing asked anew.

On a GPU the host only launches, and for small maps its time decides how long a step takes. What a block calls depends
on the kinds of its tensors and on the settings of its modules alone. So the first call of a kind runs with stand-ins
that have no memory, and every call of PyTorch and of this package's operators is written down. This call and later ones
repeat them: one autograd node per block, no dispatcher for the package's own operators, no choice, no plan to look up.

Whoever wants to see what is called (a mode, a transform, a tracer, a profiler) gets the ordinary forward, as does a
block with norms that share statistics between processes, or with parametrized weights.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from ..kernels.launch import product_precision
from ..ops import registration
from ..ops.calls import kind_of, repeating
from ..ops.functions import once_differentiable
from ..runtime.autocast import autocast_dtype, untouched_by_autocast
from ..runtime.backends import requested_backend
from .collapse import Parts, Projection
from .program_text import Program, Recorded

MOST_PROGRAMS = 256
"""So many programs are kept; the oldest goes first."""

_WANTED = os.environ.get("ANNNET_PROGRAMS", "1") != "0"
"""Whether blocks may run as programs: ``ANNNET_PROGRAMS=0`` tells a fault of theirs from one of the kernels."""

_programs: dict[Any, Program | None] = {}
_logger = logging.getLogger("annnet_kernels")

_SETTINGS = ("training", "eps", "momentum", "track_running_stats", "p")
_OWN = {Tensor, nn.Parameter}

Forward = Callable[[Parts, Tensor, Tensor], Tensor]


def run(forward: Forward, parts: Parts, low: Tensor, high: Tensor) -> Tensor | None:
    """The output of ``forward`` by its program; None where there is none, and the ordinary forward has to run."""
    if not (_WANTED and registration.launches(high) and repeating() and registration.nobody_listens()):
        return None
    modules = _modules_of(parts)
    maps = [high] if low is high else [high, low]
    tensors = maps + [x for module in modules for x in _tensors_of(module)]
    if not _OWN.issuperset(map(type, tensors)) or not all(map(_is_recordable, modules)):
        return None
    if len(set(map(id, tensors))) < len(tensors):  # modules with one parameter in common
        return None
    records = torch.is_grad_enabled() and any([x.requires_grad for x in tensors])
    key = (records, len(maps), *_key_of(parts, modules, tensors))
    if key not in _programs:
        _keep(key, _recorded(forward, parts, tensors, len(maps), records))
    program = _programs.get(key)
    if program is None:
        return None
    if not records:
        with untouched_by_autocast(high), torch._C._AutoDispatchBelowAutograd():  # nothing of it would be recorded
            out: Tensor = program.forward(*tensors)[0]
            return out
    repeated: Tensor = _Repeated.apply(program, *tensors)
    return repeated


def _keep(key: Any, program: Program | None) -> None:
    while len(_programs) >= MOST_PROGRAMS:
        _programs.pop(next(iter(_programs)), None)
    _programs[key] = program


# -------------------------------------------------------------------------------------------- what a program depends on


def _modules_of(parts: Parts) -> list[nn.Module]:
    """Those that a forward reads, each once."""
    (key_conv, key_norm, _), (conv, norm, _) = parts.key, parts.query
    modules = [conv, norm, parts.value, parts.out, *parts.tail]
    if key_conv is not conv:
        modules += key_conv, key_norm
    return modules if parts.join is None else [*modules, parts.join]


def _tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers; those that are None are none."""
    held = (*module._parameters.values(), *module._buffers.values())
    return [x for x in held if x is not None]


def _is_recordable(module: nn.Module) -> bool:
    """Whether all that the forward reads of a module is a parameter, a buffer or a setting."""
    return type(module) in (nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Dropout2d)  # a parametrized module has its own class


def _key_of(parts: Parts, modules: Sequence[nn.Module], tensors: Sequence[Tensor]) -> Any:
    """Kinds of all tensors, settings of all modules, and what of the surroundings the operators follow."""
    key: list[Any] = [requested_backend(), autocast_dtype(tensors[0]), torch.are_deterministic_algorithms_enabled()]
    key += kind_of(tensors)
    key += [x.requires_grad for x in tensors]
    key += [product_precision(torch.float32), *parts.pool_sizes()]
    for module in modules:
        key.append(type(module))
        key += map(module.__dict__.get, _SETTINGS)
        key += [x is None for x in (*module._parameters.values(), *module._buffers.values())]
    key += type(parts.query.activation), type(parts.key.activation)
    return tuple(key)


# -------------------------------------------------------------------------------------------------------- the recording


class _Recorder(TorchDispatchMode):
    """Writes down every call with its result."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Recorded] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append(Recorded(func, args, kwargs or {}, result))
        return result


def _recorded(forward: Forward, parts: Parts, tensors: Sequence[Tensor], n_maps: int, records: bool) -> Program | None:
    """The program of these parts, or None where recording it fails."""
    fake, forwards, backwards = FakeTensorMode(), _Recorder(), _Recorder()
    unhooked = saved_tensors_hooks(lambda x: x, lambda x: x)  # else a user's hooks would see stand-ins
    try:
        with fake, unhooked, torch.set_grad_enabled(records):
            stand_ins = [
                torch.empty_strided(
                    x.shape, x.stride(), dtype=x.dtype, device=x.device, requires_grad=records and x.requires_grad
                )
                for x in tensors
            ]
            made = {id(x): stand_in for x, stand_in in zip(tensors, stand_ins, strict=True)}
            with forwards:
                out = forward(_standing_in(parts, made), stand_ins[n_maps - 1], stand_ins[0])
            grad: Tensor | None = None
            gradients: list[Tensor | None] = [None] * len(tensors)
            if records:
                grad = torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device)
                wanted = [x for x in stand_ins if x.requires_grad]
                with backwards:
                    found = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True))
                gradients = [next(found) if x.requires_grad else None for x in stand_ins]
        return Program(stand_ins, forwards.calls, out, grad, backwards.calls, gradients)
    except Exception as error:
        _logger.debug("the ordinary forward runs: recording it failed with %s: %s", type(error).__name__, error)
        return None


def _standing_in(parts: Parts, made: dict[int, Tensor]) -> Parts:
    """The parts as copies that hold the stand-ins; the modules themselves stay as they are."""
    copies: dict[int, Any] = {}

    def copy(module: Any) -> Any:
        if module is None:
            return None
        if id(module) not in copies:
            copied: Any = object.__new__(type(module))
            copied.__dict__.update(module.__dict__)
            for kind in ("_parameters", "_buffers"):
                held = module.__dict__[kind]
                copied.__dict__[kind] = {name: made.get(id(x), x) for name, x in held.items()}
            copies[id(module)] = copied
        return copies[id(module)]

    key, query = (Projection(*map(copy, projection)) for projection in (parts.key, parts.query))
    return parts._replace(
        key=query if parts.is_shared() else key,
        query=query,
        value=copy(parts.value),
        out=copy(parts.out),
        join=copy(parts.join),
        tail=[copy(module) for module in parts.tail],
    )


class _Repeated(torch.autograd.Function):
    """A program as one node of the graph."""

    @staticmethod
    def forward(ctx: Any, program: Program, *tensors: Tensor) -> Tensor:
        with untouched_by_autocast(tensors[0]), torch._C._AutoDispatchBelowAutograd():
            out: Tensor
            out, saved = program.forward(*tensors)
        ctx.program = program
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        program, saved = ctx.program, ctx.saved_tensors
        if registration.is_batch_of_gradients(grad):
            return None, *_of_each(grad, lambda one: program.backward(saved, one))
        with untouched_by_autocast(grad), torch._C._AutoDispatchBelowAutograd():
            return None, *program.backward(saved, grad)


def _of_each(grads: Tensor, backward: Callable[[Tensor], list[Tensor | None]]) -> Iterator[Tensor | None]:
    """Gradients for a batch of them, one by one: ``torch.autograd.grad(..., is_grads_batched=True)`` passes such."""
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    each = [backward(grad) for grad in torch._remove_batch_dim(grads, level, 0, 0).unbind()]
    for some in zip(*each, strict=True):
        stacked = None if some[0] is None else torch.stack(some)
        yield None if stacked is None else torch._add_batch_dim(stacked, 0, level)
