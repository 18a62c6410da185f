"""Which of PyTorch's tracers looks on: the questions that its releases answer differently, or untyped."""

from __future__ import annotations

import torch


def exporting() -> bool:
    """Whether ``torch.export`` traces.

    ``torch.compiler.is_exporting()`` returns this flag, but in code that ``torch.compile`` traces PyTorch 2.10 and 2.11
    take it for true.
    """
    return torch.compiler._is_exporting_flag


def jit_tracing() -> bool:
    """Whether ``torch.jit`` traces, as the older of the two exporters to ONNX does."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]
