"""Lets code that asks for CUDA devices run on the CPU: tensors land there, streams and graphs do nothing."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

CPU = torch.device("cpu")


class CudaAsCpu(TorchFunctionMode):
    """Inside it every PyTorch function that is given a CUDA device works on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.cuda:
            return args[0]
        args = tree_map(_moved, args) if function is torch.Tensor.to else tree_map(_moved_device, args)
        kwargs = {name: _moved(value) if name == "device" else value for name, value in kwargs.items()}
        return function(*args, **kwargs)


def _moved_device(value: Any) -> Any:
    return CPU if isinstance(value, torch.device) and value.type == "cuda" else value


def _moved(value: Any) -> Any:
    return CPU if isinstance(value, str) and value.startswith("cuda") else _moved_device(value)


class _Nothing:
    """Stands for a stream, an event or a graph: every method can be called and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


def pretend_streams() -> None:
    """Give ``torch.cuda`` streams and graphs that do nothing; what is captured in a graph runs at once.

    Nothing is compiled by ``torch.compile`` either: it would generate code for the CPU.
    """
    torch.compile = lambda function, *_, **__: function  # type: ignore[assignment]
    cuda: Any = torch.cuda

    def within(*_: Any, **__: Any) -> AbstractContextManager[None]:
        return nullcontext()

    cuda.stream = cuda.graph = within
    cuda.Stream = cuda.Event = cuda.CUDAGraph = _Nothing
    cuda.current_stream = lambda *_: _Nothing()
    for name in ("synchronize", "set_device", "set_stream", "_sleep", "set_sync_debug_mode", "empty_cache"):
        setattr(cuda, name, lambda *_, **__: None)
