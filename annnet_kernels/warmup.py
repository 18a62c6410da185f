"""Compile the Triton kernels before the first call needs them."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch

from . import checks
from .runtime.backends import why_not

_LAUNCH_MODULES = (
    "pyramid_pool",
    "bn_relu_pool",
    "asymmetric_attention",
    "batch_norm",
    "matrix_products",
    "upsampled_cross_entropy",
)


def warmup(
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,),
    device: torch.device | str | int | None = None,
    operators: Sequence[str] = _LAUNCH_MODULES,
) -> int:
    """Compile every Triton kernel variant of the operators and blocks, without running any.

    A variant depends on dtype, memory layout and alignment (and, for the attention, on channel widths: those of the
    published blocks are built), never on the size of an image. Triton keeps what it compiled on disk, so the next
    process only loads it.

    Args:
        dtypes: float32, bfloat16, float16.
        device: a CUDA device; None means the current one.
        operators: some of ``"pyramid_pool"``, ``"bn_relu_pool"``, ``"asymmetric_attention"``, ``"batch_norm"``,
            ``"matrix_products"``, ``"upsampled_cross_entropy"`` (argmax included).

    Returns:
        How many launches are now ready (several can share a variant).

    Raises:
        TypeError: a dtype is none that Triton serves.
        ValueError: an unknown operator.
        RuntimeError: Triton does not serve the device, with the reason.

    Example:
        >>> import torch, annnet_kernels as ak
        >>> if torch.cuda.is_available():
        ...     ready = ak.warmup((torch.bfloat16,), "cuda")
    """
    for index, dtype in enumerate(dtypes):
        if dtype not in checks.FLOAT_DTYPES or dtype == torch.float64:
            raise TypeError(f"dtypes[{index}]: expected float32, bfloat16 or float16, got {dtype!r}")
    for index, operator in enumerate(operators):
        if operator not in _LAUNCH_MODULES:
            raise ValueError(f"operators[{index}]: expected one of {', '.join(_LAUNCH_MODULES)}, got {operator!r}")
    chosen = torch.device("cuda" if device is None else device)
    reason = _reason_against(chosen)
    if reason is not None:
        raise RuntimeError(f"warmup: Triton cannot serve {chosen}: {reason}")
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    like = torch.empty(0, device=chosen)
    ready = 0
    with torch.cuda.device(like.device):
        for operator in operators:
            kernels = importlib.import_module(f"annnet_kernels.kernels.{operator}")
            description = importlib.import_module("annnet_kernels.kernels.launch").device_of(like)
            for name, _, launch in kernels.launch_variants(description):
                if name in names:
                    launch.kernel.warmup(**launch.arguments, grid=launch.grid, **launch.options)
                    ready += 1
    return ready


def _reason_against(device: torch.device) -> str | None:
    """Why Triton kernels cannot be compiled for ``device``; None if they can."""
    if device.type != "cuda":
        return "it compiles for CUDA devices only"
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    return why_not("triton", "pyramid_pool", device, torch.float32)
