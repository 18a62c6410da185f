"""Launches of the gradient of a feature map with a norm; see ``bn_relu_pool_kernels``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..layouts import empty_map, empty_tokens
from ..pyramid import POOL_SIZES, num_tokens
from .bn_relu_pool_kernels import bn_relu_bwd_kernel, bn_relu_sum_parts_kernel
from .launch import Device, Launch, device_of
from .operands import strides_argument, token_strides_argument
from .plans import planned, scratch
from .pyramid_pool import (
    LEAST_SPREAD_ROWS,
    is_token_major,
    layout_examples,
    layout_of,
    levels_argument,
    parts_of,
    plan_forward,
    walk_argument,
)
from .tiles import pool_tile

_SUM_PARTS, _SUM_SIZE, _SUM_WARPS = 64, 16, 4
"""Few sums per program: the narrowest norm of a block, of 256 channels, then has 32 programs."""


@planned
def bn_relu_bwd_sums(
    y: Tensor,
    norm: Tensor,
    grad_tokens: Tensor | None,
    grad_map: Tensor | None,
    heights: Sequence[int],
    widths: Sequence[int],
    sums: Tensor,
) -> list[Launch]:
    return plan_sums(y, norm, Gradients(grad_tokens, grad_map), heights, widths, sums, device_of(y))


@planned
def bn_relu_bwd_input(
    y: Tensor,
    norm: Tensor,
    grad_tokens: Tensor | None,
    grad_map: Tensor | None,
    sums: Tensor | None,
    count: int,
    heights: Sequence[int],
    widths: Sequence[int],
    dy: Tensor,
) -> list[Launch]:
    gradients = Gradients(grad_tokens, grad_map, sums, count)
    return plan_input(y, norm, gradients, heights, widths, dy, device_of(y))


class Gradients(NamedTuple):
    """What the readers of a map hand back, and what batch statistics subtract: Σ g and Σ g·ŷ of ``values`` pixels."""

    tokens: Tensor | None
    map: Tensor | None
    sums: Tensor | None = None
    values: int = 1


def plan_sums(
    y: Tensor,
    norm: Tensor,
    gradients: Gradients,
    heights: Sequence[int],
    widths: Sequence[int],
    sums: Tensor,
    device: Device,
) -> list[Launch]:
    """sums = (Σ g, Σ g·ŷ): one pass over the maps, then over the sums of its parts."""
    launch, parts = _plan_pass(y, norm, gradients, None, heights, widths, device)
    total = plan_total(launch.arguments["out_ptr"], parts, sums)
    return [launch, total] if parts else [total]


def plan_total(partial: Tensor, parts: int, sums: Tensor) -> Launch:
    """sums (2, C) = partial (parts, 2, C) added up in a fixed order."""
    size = sums.numel()
    arguments = {
        "partial_ptr": partial,
        "sums_ptr": sums,
        "parts": parts,
        "size": size,
        "BLOCK_PARTS": _SUM_PARTS,
        "BLOCK_SIZE": _SUM_SIZE,
    }
    return Launch(bn_relu_sum_parts_kernel, (-(-size // _SUM_SIZE),), arguments, _SUM_WARPS, 1)


def plan_input(
    y: Tensor,
    norm: Tensor,
    gradients: Gradients,
    heights: Sequence[int],
    widths: Sequence[int],
    dy: Tensor,
    device: Device,
) -> list[Launch]:
    """dy, from one pass over the maps."""
    launch, parts = _plan_pass(y, norm, gradients, dy, heights, widths, device)
    return [launch] if parts else []


def _plan_pass(
    y: Tensor,
    norm: Tensor,
    gradients: Gradients,
    dy: Tensor | None,
    heights: Sequence[int],
    widths: Sequence[int],
    device: Device,
) -> tuple[Launch, int]:
    """The pass that writes ``dy``, or partial sums where that is None; and how many parts every channel has."""
    layout = layout_of(*(x for x in (y, gradients.map, dy) if x is not None))
    tile = pool_tile(layout.inner, layout.vector, y.dtype, light=False)
    parts = parts_of(y, layout, tile, LEAST_SPREAD_ROWS, device)
    count = y.shape[0] * parts.splits * parts.tiles
    tokens = gradients.tokens
    token_major = tokens is not None and is_token_major(tokens, layout)
    arguments = {
        "y_ptr": y,
        "norm_ptr": norm.contiguous(),
        "grad_ptr": tokens,
        "map_ptr": gradients.map,
        "sums_ptr": gradients.sums,
        "per_value": 1.0 / max(gradients.values, 1),
        "out_ptr": scratch(norm, (count, 2, y.shape[1])) if dy is None else dy,
        **parts.sizes,
        "y_strides": strides_argument(y),
        "y_row_stride": y.stride(2),
        "grad_strides": token_strides_argument(tokens, token_major),
        "map_strides": strides_argument(gradients.map),
        "map_row_stride": 0 if gradients.map is None else gradients.map.stride(2),
        "dy_strides": None if dy is None else strides_argument(dy),
        "dy_row_stride": 0 if dy is None else dy.stride(2),
        "walk": walk_argument(layout, tile, levels_argument(heights, widths)),
    }
    return Launch(bn_relu_bwd_kernel, (parts.programs,), arguments, tile.warps, tile.stages, tile.max_registers), count


def launch_variants(device: Device) -> Iterator[tuple[str, str, Launch]]:
    """(dtype, layout, launch) of what the blocks launch: all maps lie alike, tokens are token-major."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, y in layout_examples(dtype):
            batch, channels, height, width = y.shape
            dense = empty_map(y, (batch, channels, height, width), name.startswith("channels_last"))
            tokens = empty_tokens(y, batch, channels, num_tokens(POOL_SIZES, POOL_SIZES))
            norm = y.new_empty((4, channels), dtype=torch.float32)
            sums = y.new_empty((2, channels), dtype=torch.float32)
            launches = plan_forward(y, norm, POOL_SIZES, POOL_SIZES, tokens, device)
            for gradients in (Gradients(tokens, dense), Gradients(tokens, None), Gradients(None, dense)):
                launches += plan_sums(y, norm, gradients, POOL_SIZES, POOL_SIZES, sums, device)
                for of_batch in (sums, None):
                    complete = gradients._replace(sums=of_batch)
                    launches += plan_input(y, norm, complete, POOL_SIZES, POOL_SIZES, dense, device)
            for launch in launches:
                yield str(dtype).removeprefix("torch."), name, launch
