"""Launches of norms and of the normalising tail; see ``batch_norm_kernels``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layouts import empty_map
from .batch_norm_kernels import (
    batch_norm_map_kernel,
    batch_norm_merge_kernel,
    batch_norm_sums_kernel,
    batch_norm_table_kernel,
    batch_norm_update_kernel,
)
from .bn_relu_pool import plan_total
from .launch import CopyBack, Device, Launch, device_of
from .operands import chunk_argument, map_argument, pixel_multiple
from .plans import do_not_repeat, planned, scratch
from .pyramid_pool import layout_examples
from .tiles import NORM_MAP_BLOCKS, NormTile, norm_split_pixels, norm_tile

_MERGE_PARTS, _MERGE_CHANNELS, _MERGE_WARPS = 64, 8, 4
"""Few channels per program: a block's narrowest norm, of 256, then has 32 programs, and their divisions in float64 do
not wait for each other."""
_TABLE_CHANNELS, _TABLE_WARPS = 128, 4


@planned
def batch_norm_moments(y: Tensor, moments: Tensor) -> list[Launch]:
    return plan_moments(y, moments, device_of(y))


@planned
def batch_norm_table(
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_bias: Tensor | None,
    eps: float,
    table: Tensor,
) -> list[Launch]:
    return plan_table((mean, var, weight, bias, conv_bias), eps, table)


@planned
def batch_norm_update(
    y: Tensor,
    moments: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    count: Tensor | None,
    eps: float,
    momentum: float | None,
    calls: int,
    table: Tensor,
) -> list[Launch | CopyBack]:
    mean, var = map(_contiguous, (running_mean, running_var))
    weight, bias, conv_bias = map(_contiguous, (weight, bias, conv_bias))
    update = Update(table, weight, bias, conv_bias, mean, var, count)
    launches = plan_update(y, moments, update, eps, momentum, calls, device_of(y))
    pairs = (mean, running_mean), (var, running_var)
    copies = [CopyBack(dense, x) for dense, x in pairs if dense is not None and x is not None and dense is not x]
    return [*launches, *copies]


@planned
def batch_norm_apply(y: Tensor, norm: Tensor, channel_scale: Tensor | None, relu: bool, out: Tensor) -> list[Launch]:
    return plan_map(y, None, norm, channel_scale, relu, out)


@planned
def batch_norm_bwd_sums(
    grad_out: Tensor, y: Tensor, norm: Tensor, channel_scale: Tensor | None, relu: bool, sums: Tensor
) -> list[Launch]:
    return plan_sums(y, grad_out, norm, channel_scale, relu, sums, device_of(y))


@planned
def batch_norm_bwd_input(
    grad_out: Tensor,
    y: Tensor,
    norm: Tensor,
    channel_scale: Tensor | None,
    relu: bool,
    sums: Tensor | None,
    count: int,
    dy: Tensor,
) -> list[Launch]:
    return plan_map(y, grad_out, norm, channel_scale, relu, dy, sums, count)


class Update(NamedTuple):
    """The table (4, C) that a kernel writes, and the module's vectors (C) and count that it reads and moves."""

    table: Any
    weight: Any
    bias: Any
    conv_bias: Any
    running_mean: Any
    running_var: Any
    count: Any


def plan_map(
    y: Tensor,
    grad: Tensor | None,
    norm: Tensor,
    channel_scale: Tensor | None,
    relu: bool,
    out: Tensor,
    sums: Tensor | None = None,
    count: int = 1,
) -> list[Launch]:
    """out = the normalised map, or the gradient of y where ``grad`` is given."""
    tile = norm_tile(y.stride(1) == 1, y.shape[1])
    split_pixels = NORM_MAP_BLOCKS * tile.pixels
    programs, arguments = _walk(y, grad, out, tile, split_pixels)
    arguments |= {
        "norm_ptr": _contiguous(norm),
        "factor_ptr": _contiguous(channel_scale),
        "sums_ptr": _contiguous(sums),
        "per_value": 1.0 / max(count, 1),
        "relu": int(relu),
    }
    return (
        [Launch(batch_norm_map_kernel, (programs,), arguments, tile.warps, tile.stages, tile.max_registers)]
        if programs
        else []
    )


def plan_moments(y: Tensor, moments: Tensor, device: Device) -> list[Launch]:
    """moments (3, C) of y: count, mean and Σ (y − mean)²."""
    if y.numel() == 0:
        moments.zero_()
        do_not_repeat()
        return []
    nothing = Update(*(None,) * len(Update._fields))
    return _plan_merge(y, moments, nothing, 0.0, 0.0, 0, device)


def plan_update(
    y: Tensor, moments: Tensor | None, update: Update, eps: float, momentum: float | None, calls: int, device: Device
) -> list[Launch]:
    """The norm of y, or of given moments, and what ``calls`` calls of it make of the running statistics."""
    if moments is None and y.numel() == 0:
        moments = y.new_zeros((3, y.shape[1]), dtype=torch.float64)
    if moments is None:
        return _plan_merge(y, None, update, eps, momentum, calls, device)
    arguments = {
        "moments_ptr": moments.contiguous(),
        "update": update,
        "n_channels": y.shape[1],
        "BLOCK_CHANNELS": _TABLE_CHANNELS,
        **_update_arguments(update, eps, momentum, calls),
    }
    programs = _update_programs(update, momentum, y.shape[1], _TABLE_CHANNELS)
    return [Launch(batch_norm_update_kernel, (programs,), arguments, _TABLE_WARPS, 1)]


def plan_table(vectors: tuple[Tensor | None, ...], eps: float, table: Tensor) -> list[Launch]:
    """The table of given mean, var, weight, bias and bias of the convolution ahead."""
    names = ("mean_ptr", "var_ptr", "weight_ptr", "bias_ptr", "conv_bias_ptr")
    arguments = {
        **dict(zip(names, map(_contiguous, vectors), strict=True)),
        "table_ptr": table,
        "n_channels": table.shape[1],
        "eps": float(eps),
        "BLOCK_CHANNELS": _TABLE_CHANNELS,
    }
    return [Launch(batch_norm_table_kernel, (-(-table.shape[1] // _TABLE_CHANNELS),), arguments, _TABLE_WARPS, 1)]


def _update_arguments(update: Update, eps: float, momentum: float | None, calls: int) -> dict[str, Any]:
    averages = momentum is None and update.count is not None  # over the count; without one PyTorch moves nothing
    return {"eps": float(eps), "momentum": None if averages else float(momentum or 0.0), "calls": calls}


def _update_programs(update: Update, momentum: float | None, channels: int, block: int) -> int:
    """One where the running statistics depend on the count, which one program moves; else one per block."""
    return 1 if momentum is None and update.count is not None else -(-channels // block)


def _plan_merge(
    y: Tensor,
    moments: Tensor | None,
    update: Update,
    eps: float,
    momentum: float | None,
    calls: int,
    device: Device,
) -> list[Launch]:
    """A pass over y, then one over its parts that writes ``moments`` or, where there are none, the norm."""
    launch, parts, split_pixels = _plan_sums(y, None, None, None, False, 3, device)
    pixels, channels = y.shape[2] * y.shape[3], y.shape[1]
    arguments = {
        "partial_ptr": launch.arguments["partial_ptr"],
        "moments_ptr": moments,
        "update": update,
        "parts": parts,
        "splits": parts // y.shape[0],
        "n_pixels": pixels,
        "split_pixels": split_pixels,
        "n_channels": channels,
        "BLOCK_PARTS": _MERGE_PARTS,
        "BLOCK_CHANNELS": _MERGE_CHANNELS,
        **_update_arguments(update, eps, momentum, calls),
    }
    programs = _update_programs(update, momentum, channels, _MERGE_CHANNELS)
    return [launch, Launch(batch_norm_merge_kernel, (programs,), arguments, _MERGE_WARPS, 1)]


def plan_sums(
    y: Tensor, grad: Tensor, norm: Tensor, channel_scale: Tensor | None, relu: bool, sums: Tensor, device: Device
) -> list[Launch]:
    """sums = (Σ g, Σ g·ŷ)."""
    if y.numel() == 0:
        sums.zero_()
        do_not_repeat()
        return []
    launch, parts, _ = _plan_sums(y, grad, norm, channel_scale, relu, 2, device)
    return [launch, plan_total(launch.arguments["partial_ptr"], parts, sums)]


def _plan_sums(
    y: Tensor,
    grad: Tensor | None,
    norm: Tensor | None,
    channel_scale: Tensor | None,
    relu: bool,
    rows: int,
    device: Device,
) -> tuple[Launch, int, int]:
    """The pass that writes ``rows`` partial sums per part; how many parts there are, and the pixels of a split."""
    batch, channels, height, width = y.shape
    tile = norm_tile(y.stride(1) == 1, channels)
    programs_per_split = batch * -(-channels // tile.channels)
    split_pixels = norm_split_pixels(height * width, programs_per_split, device.multiprocessors, tile.pixels)
    parts = batch * -(-height * width // split_pixels)
    programs, arguments = _walk(y, grad, None, tile, split_pixels)
    arguments |= {
        "norm_ptr": _contiguous(norm),
        "factor_ptr": _contiguous(channel_scale),
        "partial_ptr": scratch(y, (parts, rows, channels), torch.float32),
        "relu": int(relu),
    }
    return (
        Launch(batch_norm_sums_kernel, (programs,), arguments, tile.warps, tile.stages, tile.max_registers),
        parts,
        split_pixels,
    )


def _walk(
    y: Tensor, grad: Tensor | None, out: Tensor | None, tile: NormTile, split_pixels: int
) -> tuple[int, dict[str, Any]]:
    """How many programs walk the maps, and the arguments that say how."""
    batch, channels, height, width = y.shape
    maps = {"y": map_argument(y), "grad": map_argument(grad)}
    if out is not None:
        maps["out"] = map_argument(out)
    multiple = pixel_multiple(height * width, tuple(maps.values()))
    arguments = {
        **maps,
        "pixel_groups": height * width // multiple,
        "width": width,
        "split_pixels": split_pixels,
        "chunk": chunk_argument(channels, tile.channels),
        "PIXEL_MULTIPLE": multiple,
        "CHANNELS_INNER": y.stride(1) == 1,
        "BLOCK_PIXELS": tile.pixels,
    }
    return batch * -(-channels // tile.channels) * -(-height * width // split_pixels), arguments


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def launch_variants(device: Device) -> Iterator[tuple[str, str, Launch]]:
    """(dtype, layout, launch) of what the blocks launch: the maps lie alike, the input may be strided."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, y in layout_examples(dtype):
            dense = empty_map(y, tuple(y.shape), name.startswith("channels_last"))  # type: ignore[arg-type]
            channels = y.shape[1]
            norm = y.new_empty((4, channels), dtype=torch.float32)
            rows = y.new_empty((2, channels), dtype=torch.float32)
            launches = _norm_variants(y, norm, device)
            for factor in (y.new_empty(y.shape[:2], dtype=torch.float32), None):
                launches += plan_map(y, None, norm, factor, True, dense)
                launches += plan_sums(y, dense, norm, factor, True, rows, device)
                for sums in (rows, None):
                    launches += plan_map(y, dense, norm, factor, True, dense, sums)
            for launch in launches:
                yield str(dtype).removeprefix("torch."), name, launch


def _norm_variants(y: Tensor, table: Tensor, device: Device) -> list[Launch]:
    """Norms of the published blocks in training, with and without a convolution's bias, and in evaluation."""
    vector, count = table[0], y.new_empty((), dtype=torch.int64)
    moments = y.new_empty((3, y.shape[1]), dtype=torch.float64)
    launches = [
        *plan_moments(y, moments, device),
    ]
    for conv_bias in (vector, None):
        launches += plan_table((vector, vector, vector, vector, conv_bias), 1e-5, table)
        update = Update(table, vector, vector, conv_bias, vector, vector, count)
        for given in (None, moments):
            launches += plan_update(y, given, update, 1e-5, 0.1, 1, device)
    return launches
