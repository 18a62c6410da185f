"""What a call launches: kernels of this package, seen by the stand-in driver, and library calls, seen by dispatch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.counting import moves_nothing

from ..standin import Recorder


@dataclass(frozen=True)
class LibraryCall:
    """A call of PyTorch that launches: what it was called with serves to time it alone."""

    operator: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    @property
    def launches(self) -> int:
        """A convolution's backward makes two gradients, a call each."""
        return 2 if self.operator is torch.ops.aten.convolution_backward.default else 1


@dataclass
class Calls:
    """What one call of a block launches."""

    kernels: list[str] = field(default_factory=list)
    library: list[LibraryCall] = field(default_factory=list)

    @property
    def launches(self) -> int:
        return len(self.kernels) + sum(call.launches for call in self.library)


class _Listener(TorchDispatchMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder, self.calls = recorder, Calls()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        if func.namespace == "annnet":
            before = len(self.recorder.launches)
            result = func(*args, **keywords)
            self.calls.kernels += [launch.kernel for launch in self.recorder.launches[before:]]
            return result
        result = func(*args, **keywords)
        inputs, outputs = (
            [x for x in tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, keywords), result)
        )
        is_view = func.is_view or torch.Tag.inplace_view in func.tags
        if (inputs or outputs) and not is_view and not moves_nothing(func, inputs, outputs):
            self.calls.library.append(LibraryCall(func, args, keywords))
        return result


def calls_of(recorder: Recorder, call: Callable[[], object]) -> Calls:
    """What ``call`` launches."""
    listener = _Listener(recorder)
    with listener:
        call()
    return listener.calls
