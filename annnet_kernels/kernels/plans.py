"""Plans: what a call launches, kept for the next call that looks the same.

Choosing tiles, building arguments and letting Triton find the compiled kernel for them takes longer than most kernels
of a block run. All of it depends only on shapes, strides, dtypes and alignment of a call's tensors, on its other
arguments and on the device. So the first call of a kind is planned, and a later one looks the plan up and puts its own
tensors into it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from ..runtime.backends import interpreting, triton_version
from .launch import Launch, on_device_of, run_all

MOST_PLANS = 1024
"""Plans are kept for so many kinds of calls; the oldest goes first."""

_INTERPRETING = interpreting()
_KNOWN_LAUNCHER = (3, 6) <= triton_version() < (3, 9)
"""Whether the launcher of a compiled kernel is one whose arguments are known; others are launched as users do it."""

_plans: dict[Any, Any] = {}
_SHARING = object()
"""In the place of a plan: what it is depends on which arguments are one tensor."""


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


def planned(plan: Callable[..., list[Launch]]) -> Callable[..., None]:
    """Turn a function that plans the launches of an operator into one that runs them.

    Its arguments are the operator's: tensors, None, and what can be hashed, or lists of that. The first one is a tensor
    on the device that runs the launches.
    """

    @wraps(plan)
    def run(*arguments: Any) -> None:
        first: Tensor = arguments[0]
        if _INTERPRETING:
            run_all(plan(*arguments), first)
            return
        key: Any = (plan, first.device, *map(_kind_of, arguments))
        known = _plans.get(key)
        if known is _SHARING:
            key = key, _shared(arguments)
            known = _plans.get(key)
        if known is not None:
            known.run(arguments)
            return
        made = _plan_and_run(plan, arguments)
        if made is None:
            return
        shared = _shared(arguments)
        if shared is not None and not isinstance(key[-1], _Shared):
            _keep(key, _SHARING)
            key = key, shared
        _keep(key, made)

    return run


def _keep(key: Any, plan: Any) -> None:
    while len(_plans) >= MOST_PLANS:
        _plans.pop(next(iter(_plans)), None)
    _plans[key] = plan


def _kind_of(argument: Any) -> Any:
    """All of an argument that a plan depends on."""
    if isinstance(argument, Tensor):
        return argument.shape, argument.stride(), argument.dtype, argument.data_ptr() % 16
    return tuple(argument) if isinstance(argument, list) else argument


class _Shared(tuple[int, ...]):
    """For each tensor, which is the first that is the same."""


def _shared(arguments: Sequence[Any]) -> _Shared | None:
    """Which arguments are one tensor, as an output written in place is its operand; None where all differ.

    A plan made where all differ serves every call: each place is filled from its own argument.
    """
    identities = [id(x) for x in arguments if isinstance(x, Tensor)]
    return None if len(set(identities)) == len(identities) else _Shared(map(identities.index, identities))


def _plan_and_run(plan: Callable[..., list[Launch]], arguments: Sequence[Any]) -> Plan | None:
    """The plan of a call that ran, or None if it holds for this call only."""
    _planning.scratch, _planning.repeatable = [], True
    try:
        launches = plan(*arguments)
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
        self, launches: Sequence[Launch], compiled: Sequence[Any], arguments: Sequence[Any], memory: Sequence[Tensor]
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
        self._launches = [Prepared(launch, kernel, place_of) for launch, kernel in zip(launches, compiled, strict=True)]

    def run(self, arguments: Sequence[Any]) -> None:
        """Launch all of it on the tensors of this call."""
        first: Tensor = arguments[0]
        tensors = [*arguments, *(first.new_empty(shape, dtype=dtype) for shape, dtype in self._memory)]
        with on_device_of(first):
            stream = driver.active.get_current_stream(driver.active.get_current_device())
            for launch in self._launches:
                launch.run(tensors, stream)


def _listens(hook: Any) -> bool:
    """Whether one of Triton's hooks has somebody to call."""
    return hook is not None and bool(getattr(hook, "calls", True))


class Prepared:
    """A launch of a compiled kernel whose tensors are filled in at each call."""

    def __init__(self, launch: Launch, kernel: Any, place_of: Callable[[Tensor], int]) -> None:
        self._kernel = kernel
        self._grid = (*launch.grid, 1, 1)[:3]
        self._values = [launch.arguments[name] for name in launch.kernel.arg_names]
        self._tensors: list[tuple[int, int]] = []
        self._tuples: list[tuple[int, list[tuple[int, int]]]] = []
        for index, value in enumerate(self._values):
            if isinstance(value, Tensor):
                self._tensors.append((index, place_of(value)))
                self._values[index] = None
            elif isinstance(value, tuple):
                fields = [(i, place_of(field)) for i, field in enumerate(value) if isinstance(field, Tensor)]
                if fields:
                    self._tuples.append((index, fields))
                    self._values[index] = [None if isinstance(field, Tensor) else field for field in value]

    def run(self, tensors: Sequence[Any], stream: int) -> None:
        """Launch it, with ``tensors`` by their places."""
        values = self._values.copy()
        for index, place in self._tensors:
            values[index] = tensors[place]
        for index, fields in self._tuples:
            filled = values[index].copy()
            for i, place in fields:
                filled[i] = tensors[place]
            values[index] = tuple(filled)
        if _KNOWN_LAUNCHER and not (
            _listens(knobs.runtime.launch_enter_hook) or _listens(knobs.runtime.launch_exit_hook)
        ):
            kernel = self._kernel
            kernel.run(*self._grid, stream, kernel.function, kernel.packed_metadata, None, None, None, *values)
        else:
            self._kernel[self._grid](*values)
