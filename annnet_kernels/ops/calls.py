"""Calls that are kept: one that looks like an earlier call of its operator repeats what that one launched.

Allocating outputs by their rules, choosing an implementation, tiles and arguments, and letting Triton find the compiled
kernel takes longer than most kernels of a block run. All of it depends only on shapes, strides, dtypes and alignment of
the operands, on the other arguments and on the device. So the first call of a kind is kept with its plan
(``kernels/plans.py``), and a later one looks it up, allocates what the first one allocated, and launches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

MOST_CALLS = 1024
"""So many kinds of calls are kept; the oldest goes first."""

_kept: dict[Any, Any] = {}
_repeating = True
_SHARING = object()
"""In the place of a call: what it launches depends on which operands are one tensor."""


class Plan(Protocol):
    """Launches of one kind of call."""

    def run(self, arguments: Sequence[Any]) -> None:
        """Launch all of it on the operands and outputs of this call, lists of operands flattened."""


class _Output(NamedTuple):
    """How an output lies in memory."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


class Call:
    """A call that was made, to be repeated with other tensors."""

    def __init__(self, plan: Plan, outputs: Any, written: int | None) -> None:
        made = outputs if isinstance(outputs, (tuple, list)) else () if outputs is None else (outputs,)
        self._plan, self._written = plan, written
        self._outputs = [_Output(x.shape, x.stride(), x.dtype) for x in made]
        self._type = type(outputs)

    def repeat(self, operands: Sequence[Any]) -> Any:
        """The outputs of the operator for these operands."""
        device = operands[0].device
        outputs = [
            torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride, dtype in self._outputs
        ]
        self._plan.run(
            [*operands, *outputs] if self._written is None else [*operands, operands[self._written], *outputs]
        )
        if self._type is list:
            return outputs
        if self._type is tuple:
            return tuple(outputs)
        return outputs[0] if outputs else None


NO_TENSORS = {bool, float, int, str, type(None)}
"""Classes of arguments that are no tensors and hold none."""


def kind_of(operands: Sequence[Any]) -> list[Any]:
    """All of the operands that a plan depends on; the first is a tensor."""
    kinds: list[Any] = [operands[0].get_device()]
    for x in operands:
        if type(x) in NO_TENSORS:
            kinds.append(x)
        elif isinstance(x, Tensor):
            kinds += x.shape, x.stride(), x.dtype, x.data_ptr() & 15
        else:
            kinds.append(tuple(x))
    return kinds


def repeating() -> bool:
    """Whether calls may be repeated."""
    return _repeating


@contextmanager
def each_planned_anew() -> Iterator[None]:
    """Inside this context no call is repeated, in no thread: whoever watches launches as they are planned sees all."""
    global _repeating
    before, _repeating = _repeating, False
    try:
        yield
    finally:
        _repeating = before


def find(key: Any, operands: Sequence[Any]) -> tuple[Any, Call | None]:
    """The call that was kept for ``key``, if any, and the key under which to keep one."""
    known = _kept.get(key)
    if known is _SHARING:
        key = key, _shared(operands)
        known = _kept.get(key)
    return key, known


def keep(key: Any, operands: Sequence[Any], call: Call) -> None:
    """Keep ``call`` for those that look the same. A call whose operands all differ serves only such calls."""
    shared = _shared(operands)
    if shared is not None and not isinstance(key[-1], _Shared):
        _keep(key, _SHARING)
        key = key, shared
    _keep(key, call)


def _keep(key: Any, call: Any) -> None:
    while len(_kept) >= MOST_CALLS:
        _kept.pop(next(iter(_kept)), None)
    _kept[key] = call


class _Shared(tuple[int, ...]):
    """For each tensor, which is the first that is the same."""


def _shared(operands: Sequence[Any]) -> _Shared | None:
    """Which operands are one tensor; None where all differ.

    A plan made where all differ serves every call: each place is filled from its own operand.
    """
    identities = [id(x) for x in operands if isinstance(x, Tensor)]
    return None if len(set(identities)) == len(identities) else _Shared(map(identities.index, identities))
