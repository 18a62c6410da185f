"""Compiles, in several processes, the Triton kernels that the stages of a first call launch."""

from __future__ import annotations

import importlib

import torch

from annnet_kernels.kernels.launch import Launch, device_of

from ..compile_table.table import specialise

MODULES = ("asymmetric_attention", "bn_relu_pool", "pyramid_pool", "batch_norm", "matrix_products")
DTYPE = "bfloat16"
LAYOUTS = ("channels_last", "nchw")
"""Those of the blocks come first. Whatever else a test or a case launches is compiled when it is launched."""
_NOT_MEASURED = ("channel-major", "channels_last, odd")


def launches(device: torch.device) -> list[Launch]:
    """One launch of every kernel variant that the first call measures, the most important first."""
    description = device_of(torch.empty(0, device=device))
    major, minor = description.capability
    found: dict[str, tuple[int, Launch]] = {}
    for module in MODULES:
        kernels = importlib.import_module(f"annnet_kernels.kernels.{module}")
        for dtype, label, launch in kernels.launch_variants(description):
            layout = label.lower()
            rank = next((i for i, name in enumerate(LAYOUTS) if layout.startswith(name)), None)
            if dtype != DTYPE or rank is None or any(word in layout for word in _NOT_MEASURED):
                continue
            *_, key = specialise(launch, 10 * major + minor)
            found.setdefault(key, (rank, launch))
    return [launch for _, launch in sorted(found.values(), key=lambda item: item[0])]


def compile_share(share: int, shares: int, device: torch.device) -> int:
    """Compile every ``shares``-th of them, beginning with number ``share`` (from 1); how many these were."""
    chosen = launches(device)[share - 1 :: shares]
    for launch in chosen:
        launch.kernel.warmup(**launch.arguments, grid=launch.grid, **launch.options)
    return len(chosen)
