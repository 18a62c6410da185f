"""Which of PyTorch's tracers looks on: the questions that its releases answer differently, or untyped."""

from __future__ import annotations

import sys

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


def exporting_to_onnx() -> bool:
    """Whether an exporter to ONNX is at work.

    ``torch.onnx.is_in_onnx_export()`` tells, but it is taken for false in code that ``torch.compile`` traces, which is
    the exporter's second attempt: there the exporter's own flag is read.
    """
    if not torch.compiler.is_dynamo_compiling():
        return torch.onnx.is_in_onnx_export()
    flags = sys.modules.get("torch.onnx._internal.exporter._flags")
    return flags is not None and bool(flags._is_onnx_exporting)


def symbolic(*values: object) -> bool:
    """Whether ``torch.fx`` traces with stand-ins for these values, which are no tensors."""
    proxy = getattr(sys.modules.get("torch.fx"), "Proxy", None)
    return proxy is not None and any(isinstance(value, proxy) for value in values)


def vmapped() -> bool:
    """Whether ``torch.vmap`` is at work, at whatever depth of transforms."""
    if not torch._C._are_functorch_transforms_active():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)
