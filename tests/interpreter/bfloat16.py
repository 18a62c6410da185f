"""Makes Triton's interpreter (3.6 to 3.8 seen) compute bfloat16 right: it keeps such values as 16-bit patterns.

It multiplies the patterns themselves in ``tl.dot``, and it cuts float32 off to bfloat16 where a GPU rounds to nearest
even. All other arithmetic of the kernels is done in float32. ``test_bfloat16_of_the_interpreter.py`` shows both.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from annnet_kernels.runtime import backends


def widened(patterns: np.ndarray) -> np.ndarray:
    """bfloat16 patterns (uint16) as the float32 values that they are."""
    return (patterns.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """float32 values as bfloat16 patterns (uint16), to nearest even."""
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy().view(np.uint16)


def let_it_compute(patch: pytest.MonkeyPatch) -> None:
    """Mend the interpreter while ``patch`` holds, and let bfloat16 tensors go to it."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_right(self: Any, source: Any, target: Any) -> Any:
        pair = source.dtype.scalar, target.scalar
        if pair == (tl.float32, tl.bfloat16):
            return TensorHandle(rounded(source.data).reshape(np.shape(source.data)), tl.bfloat16)
        if pair == (tl.bfloat16, tl.float32):
            return TensorHandle(widened(source.data), tl.float32)
        return cast(self, source, target)

    def dot_right(self: Any, a: Any, b: Any, *others: Any) -> Any:
        a, b = (TensorHandle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *others)

    why_not = backends.why_not

    def why_not_here(backend: str, operator: str, device: torch.device, dtype: torch.dtype, **options: Any) -> Any:
        asked = torch.float16 if backend == "triton" and dtype == torch.bfloat16 else dtype
        return why_not(backend, operator, device, asked, **options)

    patch.setattr(InterpreterBuilder, "cast_impl", cast_right)
    patch.setattr(InterpreterBuilder, "create_dot", dot_right)
    patch.setattr(backends, "why_not", why_not_here)
