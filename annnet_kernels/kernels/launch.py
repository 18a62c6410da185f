"""What a kernel module plans: launches, as data, for a device that need not be there.

The convention of every module in this package: the function an operator calls returns what ``plan_...(...)`` plans,
which ``plans.planned`` runs, and ``launch_variants(device)`` yields the launches of those same plan functions for meta
tensors in every dtype, layout and width that gets code of its own. So the compile table
(``python -m tools.compile_table``) sees exactly what a GPU would be given, and restates nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

_KIB = 1024
_SHARED_MEMORY_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
"""Largest opt-in shared memory of one block, CUDA programming guide; every other architecture since 8.6 has 99 KiB."""


@dataclass(frozen=True)
class Device:
    """What tile choices depend on."""

    capability: tuple[int, int]
    multiprocessors: int

    @property
    def shared_memory(self) -> int:
        """Bytes that one block may use."""
        return _SHARED_MEMORY_KIB.get(self.capability, 99) * _KIB


@dataclass(frozen=True)
class Launch:
    """One kernel launch; ``arguments`` are the kernel's parameters by name, constexpr ones included."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Triton's launch options; only NVIDIA's compiler knows ``maxnreg``."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}

    def run(self) -> Any:
        """Launch it; the compiled kernel that Triton found or made for these arguments."""
        return self.kernel[self.grid](**self.arguments, **self.options)


INTERPRETER = Device(capability=(9, 0), multiprocessors=4)
"""Stands for the CPU under ``TRITON_INTERPRET=1``: few multiprocessors, so that splits stay small and still occur."""


def device_of(x: torch.Tensor) -> Device:
    """The device that will run launches on ``x``."""
    if x.device.type != "cuda":
        return INTERPRETER
    return _cuda_device(x.device.index if x.device.index is not None else torch.cuda.current_device())


@cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device((properties.major, properties.minor), properties.multi_processor_count)


@dataclass(frozen=True)
class CopyBack:
    """What follows the launches of a call that wrote a dense copy: the copy goes back to where it came from."""

    dense: torch.Tensor
    target: torch.Tensor

    def run(self) -> None:
        """Copy it."""
        self.target.copy_(self.dense)


def run_all(launches: Sequence[Launch | CopyBack], x: torch.Tensor) -> list[Any]:
    """Run ``launches`` in order on the device of ``x``; their compiled kernels."""
    with on_device_of(x):
        return [launch.run() for launch in launches]


_NO_CHANGE = nullcontext()


def on_device_of(x: torch.Tensor) -> AbstractContextManager[object]:
    """Makes the device of ``x`` the current one, which takes a few µs where it is not."""
    if not x.is_cuda or x.get_device() == torch.cuda.current_device():
        return _NO_CHANGE
    return torch.cuda.device(x.device)


def product_precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s input precision: TF32 for float32 only where the user's PyTorch setting allows it."""
    if dtype != torch.float32:
        return "ieee"
    matmul = torch.backends.cuda.matmul
    # Reading allow_tf32 raises once fp32_precision was set.
    allowed = matmul.fp32_precision == "tf32" if hasattr(matmul, "fp32_precision") else matmul.allow_tf32
    return "tf32" if allowed else "ieee"
