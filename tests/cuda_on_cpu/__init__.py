"""The CUDA pooling on CPU tensors: csrc/cuda compiled by a C++ compiler, threads run one by one."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from annnet_kernels.layouts import empty_map, empty_tokens, is_channels_last
from annnet_kernels.pyramid import num_tokens

HERE = Path(__file__).parent
SOURCES = HERE.parent.parent / "csrc" / "cuda"
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
"""In the order of csrc/cpu/dtypes.h."""


def why_not() -> str | None:
    """Why the kernels cannot be compiled here; None if they can."""
    if not SOURCES.exists():
        return "needs the checkout's csrc"
    return None if shutil.which("g++") else "no g++"


class _Call(ctypes.Structure):
    """annnet::cuda::PoolCall."""

    _fields_ = (
        ("dtype", ctypes.c_int),
        *((name, ctypes.c_int64) for name in ("images", "channels", "height", "width")),
        ("map", ctypes.c_void_p),
        ("map_strides", ctypes.POINTER(ctypes.c_int64)),
        ("tokens", ctypes.c_void_p),
        ("token_strides", ctypes.POINTER(ctypes.c_int64)),
        ("levels", ctypes.c_int),
        ("heights", ctypes.POINTER(ctypes.c_int64)),
        ("widths", ctypes.POINTER(ctypes.c_int64)),
    )


class _Counts(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_int64) for name in ("loads_of_16_bytes", "other_loads", "loaded_bytes"))


@dataclass
class CudaOnCpu:
    """The compiled kernels; ``counts`` are of the latest call.

    Args:
        multiprocessors: of the pretended GPU: into how many parts a map is cut.
        order: seed of the order in which the threads of a block take turns; None draws one.
    """

    library: ctypes.CDLL
    multiprocessors: int = 4
    order: int | None = None

    @classmethod
    def compile(cls, folder: Path) -> CudaOnCpu:
        library = folder / "pyramid_pool.so"
        # Traps where behaviour is undefined, misaligned vectors included.
        checks = ["-fsanitize=undefined", "-fsanitize-undefined-trap-on-error"]
        flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-fno-strict-aliasing", "-Wno-unknown-pragmas", *checks]
        command = ["g++", *flags, f"-I{HERE}", "-x", "c++", str(HERE / "pyramid_pool.cpp"), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        loaded = ctypes.CDLL(str(library))
        loaded.run_pool.restype = ctypes.c_char_p
        return cls(loaded)

    def pool_into(self, x: Tensor, heights: Sequence[int], widths: Sequence[int], out: Tensor) -> None:
        self._run(x, out, heights, widths, False)

    def spread_into(self, grad: Tensor, heights: Sequence[int], widths: Sequence[int], dx: Tensor) -> None:
        self._run(dx, grad, heights, widths, True)

    def pool(self, x: Tensor, heights: Sequence[int], widths: Sequence[int]) -> Tensor:
        out = empty_tokens(x, x.shape[0], x.shape[1], num_tokens(heights, widths)).fill_(float("nan"))
        self.pool_into(x, heights, widths, out)
        return out

    def spread(self, grad: Tensor, x: Tensor, heights: Sequence[int], widths: Sequence[int]) -> Tensor:
        dx = empty_map(grad, tuple(x.shape), is_channels_last(x)).fill_(float("nan"))
        self.spread_into(grad, heights, widths, dx)
        return dx

    def _run(self, x: Tensor, tokens: Tensor, heights: Sequence[int], widths: Sequence[int], backward: bool) -> None:
        def integers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
            return (ctypes.c_int64 * len(values))(*values)

        call = _Call(
            DTYPES.index(x.dtype), *x.shape, x.data_ptr(), integers(x.stride()), tokens.data_ptr(),
            integers(tokens.stride()), len(heights), integers(heights), integers(widths),
        )  # fmt: skip
        self.counts = _Counts()
        order = random.getrandbits(32) if self.order is None else self.order
        failure = self.library.run_pool(
            ctypes.byref(call), backward, self.multiprocessors, ctypes.c_uint(order), ctypes.byref(self.counts)
        )
        assert failure is None, failure.decode()
