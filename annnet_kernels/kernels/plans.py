"""Plans: what a call launches, with places for the tensors of another call of the same kind.

``ops/calls.py`` decides which calls are of one kind; here a function that plans the launches of an operator becomes one
that runs them, and that can be asked for the plan.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import update_wrapper
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ..runtime.backends import interpreting, triton_version
from .launch import on_device_of, run_all

_INTERPRETING = interpreting()
_VERSION = triton_version()
_NO_HOOKS = (None, None, None)
"""In the place of a launch's metadata and of the hooks ahead of it and behind it."""


class _Planning(threading.local):
    """What a plan in the making has asked for, in this thread."""

    scratch: list[Tensor] | None = None
    repeatable = True


_planning = _Planning()


def scratch(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Memory that the launches of a plan share, on the device of ``like``; a plan that is repeated gets new memory."""
    memory = like.new_empty(tuple(shape), dtype=like.dtype if dtype is None else dtype)
    if _planning.scratch is not None:
        _planning.scratch.append(memory)
    return memory


def do_not_repeat() -> None:
    """Whoever plans calls this where planning itself does part of the work."""
    _planning.repeatable = False


class planned:
    """Turn a function that plans the launches of an operator into one that runs them.

    Its arguments are the operator's operands, lists of tensors flattened, and then its outputs. The first one is a
    tensor on the device that runs the launches.
    """

    def __init__(self, plan: Callable[..., list[Any]]) -> None:
        self._plan = plan
        update_wrapper(self, plan)

    def __call__(self, *arguments: Any) -> None:
        run_all(self._plan(*arguments), arguments[0])

    def run_and_plan(self, *arguments: Any) -> Plan | None:
        """Run it; the plan, or None if it holds for this call only."""
        if _INTERPRETING:
            self(*arguments)
            return None
        _planning.scratch, _planning.repeatable = [], True
        try:
            launches = self._plan(*arguments)
            memory, repeatable = _planning.scratch, _planning.repeatable
        finally:
            _planning.scratch = None
        compiled = run_all(launches, arguments[0])
        if not repeatable or not all(hasattr(kernel, "__getitem__") for kernel in compiled):
            return None  # the latter in a Triton whose compiled kernels are launched some other way
        try:
            return Plan(launches, compiled, arguments, memory)
        except _Unknown:
            return None


class _Unknown(Exception):
    """A launch reads a tensor that is neither an argument of the call nor scratch, such as a copy of an argument."""


class Plan:
    """The launches of one kind of call, with places for the tensors of a call."""

    def __init__(
        self, launches: Sequence[Any], compiled: Sequence[Any], arguments: Sequence[Any], memory: Sequence[Tensor]
    ) -> None:
        tensors = [(place, x) for place, x in enumerate([*arguments, *memory]) if isinstance(x, Tensor)]
        places = {id(x): place for place, x in tensors}
        at_address: dict[int, set[int]] = {}
        for _, x in tensors:
            at_address.setdefault(x.data_ptr(), set()).add(places[id(x)])

        def place_of(x: Tensor) -> int:
            """A tensor's place by identity; that of a view, which a plan may make of an argument, by its address."""
            if id(x) in places:
                return places[id(x)]
            candidates = at_address.get(x.data_ptr(), set())
            if len(candidates) != 1 or x.data_ptr() == 0:
                raise _Unknown
            return next(iter(candidates))

        self._memory = [(x.shape, x.dtype) for x in memory]
        self._launches = [
            (kernel, _launcher(kernel), (*launch.grid, 1, 1)[:3])
            for launch, kernel in zip(launches, compiled, strict=True)
        ]
        self._values = _filled_in([[x.arguments[name] for name in x.kernel.arg_names] for x in launches], place_of)

    def run(self, arguments: Sequence[Any]) -> None:
        """Launch all of it on the tensors of this call."""
        first: Tensor = arguments[0]
        tensors = [*arguments, *[first.new_empty(shape, dtype=dtype) for shape, dtype in self._memory]]
        with on_device_of(first):
            active, hooks = driver.active, knobs.runtime
            stream = active.get_current_stream(active.get_current_device())
            hooked = _listens(hooks.launch_enter_hook) or _listens(hooks.launch_exit_hook)
            for (kernel, launch, grid), values in zip(self._launches, self._values(tensors)):  # noqa: B905 takes time
                if launch is None or hooked:
                    kernel[grid](*values)  # as users of Triton launch it
                else:
                    launch(grid, stream, values)


def _filled_in(templates: Sequence[Sequence[Any]], place_of: Callable[[Tensor], int]) -> Callable[[Sequence[Any]], Any]:
    """Tensors by their places → the arguments of every launch. One expression: loops took as long as the launches."""
    constants: list[Any] = []

    def text_of(value: Any) -> str:
        if isinstance(value, Tensor):
            return f"tensors[{place_of(value)}]"
        if isinstance(value, tuple):
            return f"({''.join(f'{text_of(field)}, ' for field in value)})"
        constants.append(value)
        return f"constants[{len(constants) - 1}]" if type(value) not in (bool, int, type(None)) else repr(value)

    namespace: dict[str, Any] = {"constants": constants}
    text = "".join(f"{text_of(tuple(template))}, " for template in templates)
    filled_in: Callable[[Sequence[Any]], Any] = eval(f"lambda tensors: ({text})", namespace)
    return filled_in


def _listens(hook: Any) -> bool:
    """Whether one of Triton's hooks has somebody to call."""
    return hook is not None and bool(getattr(hook, "calls", True))


def _launcher(kernel: Any) -> Callable[..., None] | None:
    """What launches ``kernel`` without its hooks: (grid, stream, values). None where Triton's launcher is not known.

    Triton 3.6 and 3.8 pass every launch through a method in Python that looks for memory to allocate. Where a kernel
    needs none, what that method calls in the end is called at once.
    """
    if not (3, 6) <= _VERSION < (3, 9):
        return None
    launcher, function, metadata = kernel.run, kernel.function, kernel.packed_metadata
    needs_memory = any(getattr(launcher, f"{kind}_scratch_size", 1) for kind in ("global", "profile"))
    if _VERSION == (3, 7) or needs_memory or getattr(launcher, "gsan_enabled", False):
        return lambda grid, stream, values: kernel.run(*grid, stream, function, metadata, *_NO_HOOKS, *values)
    launch, options = launcher.launch, (launcher.launch_cooperative_grid, launcher.launch_pdl)
    if _VERSION == (3, 6):
        return lambda grid, stream, values: launch(
            *grid, stream, function, *options, None, None, metadata, *_NO_HOOKS, *values
        )
    described = launcher.arg_annotations, launcher.kernel_signature
    return lambda grid, stream, values: launch(
        *grid, stream, function, *options, metadata, *_NO_HOOKS, None, None, *described, values
    )
