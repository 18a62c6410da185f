"""A program as the text of two functions: the calls of a block's forward pass, and those of its backward pass.

Stand-ins get names, calls become lines, and what no line reads any more is deleted. On its first run every line settles
what it calls from then on: an operator of this package the launches of this one kind of call, a function of PyTorch
itself, if its results lie in memory as those of the stand-ins did.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import registration

_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)
_logger = logging.getLogger("annnet_kernels")


class Recorded(NamedTuple):
    """A call with stand-ins."""

    function: Any
    arguments: Sequence[Any]
    keywords: dict[str, Any]
    result: Any


class Program:
    """The calls of both passes, as two functions. What the backward pass needs of the forward pass is saved."""

    def __init__(
        self,
        inputs: Sequence[Tensor],
        forwards: Sequence[Recorded],
        out: Tensor,
        grad: Tensor | None,
        backwards: Sequence[Recorded],
        gradients: Sequence[Tensor | None],
    ) -> None:
        names = _Names()
        arguments = [names.of(x) for x in inputs]
        ahead = names.of_calls(forwards)
        result = names.of(out)
        made_ahead = names.count
        saved: list[str] = []
        self._backward: Callable[..., Any] | None = None
        if grad is not None:
            self._grad = grad.shape, grad.stride(), grad.dtype
            upstream = names.of(grad)
            behind = names.of_calls(backwards)
            returned = ["None" if g is None else names.of(g) for g in gradients]
            read = {name for call in behind for name in call.reads} | {name for name in returned if name != "None"}
            saved = sorted((name for name in read if name != upstream and _number(name) < made_ahead), key=_number)
            self._backward = _function([*saved, upstream], behind, f"({_listed(returned)})", {*saved, *returned})
        self.forward = _function(arguments, ahead, f"{result}, ({_listed(saved)})", {*arguments, *saved, result})
        """(*inputs) → the output, and what to save."""

    def backward(self, saved: Sequence[Tensor], grad: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of the inputs."""
        assert self._backward is not None
        shape, stride, dtype = self._grad
        if grad.stride() != stride or grad.data_ptr() % 16 != 0:  # a program is of one kind of gradient
            grad = torch.empty_strided(shape, stride, dtype=dtype, device=grad.device).copy_(grad)
        gradients: tuple[Tensor | None, ...] = self._backward(*saved, grad)
        return gradients


class _Line(NamedTuple):
    """A call as a line of a function."""

    function: Callable[..., Any]
    arguments: str
    constants: list[Any]
    reads: list[str]
    writes: list[str]
    is_one: bool
    strides: Sequence[tuple[int, ...] | None] = (None,)
    """Of its results; None for what is no tensor."""


class _Names:
    """Names of stand-ins, by identity; a stand-in's alias has its name."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self.count = 0

    def of(self, x: Tensor) -> str:
        """The name of ``x``, a new one if it has none."""
        if id(x) not in self._names:
            self._names[id(x)] = f"t{self.count}"
            self.count += 1
        return self._names[id(x)]

    def of_calls(self, calls: Sequence[Recorded]) -> list[_Line]:
        """The calls but for those that only make an alias, or a value that is no tensor."""
        lines = []
        for call in calls:
            if call.function in _ALIASES:
                self._names[id(call.result)] = self.of(call.arguments[0])
            elif call.function._schema.is_mutable or isinstance(call.result, (Tensor, list, tuple)):
                lines.append(self._line(call))
        return lines

    def _line(self, call: Recorded) -> _Line:
        reads: list[str] = []
        constants: list[Any] = []

        def text_of(value: Any) -> str:
            if isinstance(value, Tensor):
                reads.append(self.of(value))
                return reads[-1]
            if isinstance(value, (list, tuple)) and any(isinstance(x, Tensor) for x in value):
                return f"[{', '.join(map(text_of, value))}]"
            constants.append(value)
            return f"{{constants}}[{len(constants) - 1}]"

        arguments = ", ".join(
            [*map(text_of, call.arguments), *(f"{name}={text_of(value)}" for name, value in call.keywords.items())]
        )
        is_one = isinstance(call.result, Tensor)
        results = [call.result] if is_one else call.result if isinstance(call.result, (list, tuple)) else []
        writes = [self.of(x) if isinstance(x, Tensor) else "_" for x in results]
        return _Line(call.function, arguments, constants, reads, writes, is_one, _strides_of(call.result))


def _number(name: str) -> int:
    return int(name[1:])


def _listed(names: Sequence[str]) -> str:
    return "".join(f"{name}, " for name in names)


def _bound_once_called(repeater: registration.Repeater, namespace: dict[str, Any], name: str) -> Callable[..., Any]:
    """An operator of this package at its place in a program, where all calls are alike: the first one says how."""

    def first(*arguments: Any) -> Any:
        outputs, call = repeater.once(*arguments)
        if call is not None:
            namespace[name] = repeater.bind(call)
        return outputs

    return first


def _seen_once_called(line: _Line, namespace: dict[str, Any], name: str) -> Callable[..., Any]:
    """A call of PyTorch at its place in a program; what follows was recorded for results that lie as ``line.strides``.

    Should a library lay out a result some other way on this device, the first call shows it, and the result is copied.
    """

    def copied(*arguments: Any, **keywords: Any) -> Any:
        return _laid_out(line.function(*arguments, **keywords), line.strides)

    def first(*arguments: Any, **keywords: Any) -> Any:
        result = line.function(*arguments, **keywords)
        found = _laid_out(result, line.strides)
        if found is not result:
            _logger.debug("%s: its result is copied into the layout that a program was recorded for", line.function)
        namespace[name] = line.function if found is result else copied
        return found

    return first


def _strides_of(result: Any) -> list[tuple[int, ...] | None]:
    """Of a tensor, or of those in a tuple or list; None for what is no tensor."""
    results = result if isinstance(result, (list, tuple)) else [result]
    return [x.stride() if isinstance(x, Tensor) else None for x in results]


def _laid_out(result: Any, strides: Sequence[tuple[int, ...] | None]) -> Any:
    """``result`` with these strides: itself where it has them, but for dimensions of one element."""
    results = result if isinstance(result, (list, tuple)) else [result]
    copies = [
        x
        if stride is None or all(n == 1 or a == b for n, a, b in zip(x.shape, x.stride(), stride, strict=True))
        else torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)
        for x, stride in zip(results, strides, strict=True)
    ]
    if all(copy is x for copy, x in zip(copies, results, strict=True)):
        return result
    return copies[0] if isinstance(result, Tensor) else type(result)(copies)


def _function(arguments: Sequence[str], lines: Sequence[_Line], result: str, needed: set[str]) -> Callable[..., Any]:
    """A function that runs the lines, and forgets what no line reads any more."""
    last: dict[str, int] = {}
    for number, line in enumerate(lines):
        last |= dict.fromkeys(
            (name for name in (*line.reads, *line.writes) if name not in needed and name != "_"), number
        )
    namespace: dict[str, Any] = {}
    text = [f"def program({', '.join(arguments)}):"]
    for number, line in enumerate(lines):
        repeater, name = registration.REPEATERS.get(line.function), f"f{number}"
        if repeater is None:
            namespace[name] = _seen_once_called(line, namespace, name)
        else:
            namespace[name] = _bound_once_called(repeater, namespace, name)
        namespace[f"c{number}"] = line.constants
        targets = line.writes[0] if line.is_one else _listed(line.writes)
        call = f"f{number}({line.arguments.replace('{constants}', f'c{number}')})"
        text.append(f"    {targets} = {call}" if targets else f"    {call}")
        done = [name for name, latest in last.items() if latest == number]
        if done:
            text.append(f"    del {', '.join(done)}")
    text.append(f"    return {result}")
    exec("\n".join(text), namespace)
    program: Callable[..., Any] = namespace["program"]
    return program
