"""Launches of the normalising tail; see ``batch_norm_kernels``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..layouts import empty_map
from .batch_norm_kernels import batch_norm_map_kernel, batch_norm_merge_kernel, batch_norm_sums_kernel
from .bn_relu_pool_kernels import bn_relu_sum_parts_kernel
from .launch import Device, Launch, device_of, run_all
from .operands import Norm, chunk_argument, map_argument, pixel_multiple
from .pyramid_pool import layout_examples
from .tiles import NORM_MAP_BLOCKS, NormTile, norm_split_pixels, norm_tile

_MERGE_PARTS, _MERGE_CHANNELS, _MERGE_WARPS = 32, 64, 4


def batch_norm_statistics(y: Tensor, statistics: Tensor) -> None:
    run_all(plan_statistics(y, statistics, device_of(y)), y)


def batch_norm_apply(
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    channel_scale: Tensor | None,
    relu: bool,
    out: Tensor,
) -> None:
    norm = Norm(mean, invstd, weight, bias)
    run_all(plan_map(y, None, norm, channel_scale, None, relu, out), y)


def batch_norm_bwd_sums(
    grad_out: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    channel_scale: Tensor | None,
    relu: bool,
    sums: Tensor,
) -> None:
    norm = Norm(mean, invstd, weight, bias)
    run_all(plan_sums(y, grad_out, norm, channel_scale, relu, sums, device_of(y)), y)


def batch_norm_bwd_input(
    grad_out: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    channel_scale: Tensor | None,
    relu: bool,
    mean_sums: Tensor | None,
    dy: Tensor,
) -> None:
    norm = Norm(mean, invstd, weight, bias)
    run_all(plan_map(y, grad_out, norm, channel_scale, mean_sums, relu, dy), y)


def plan_map(
    y: Tensor,
    grad: Tensor | None,
    norm: Norm,
    channel_scale: Tensor | None,
    mean_sums: Tensor | None,
    relu: bool,
    out: Tensor,
) -> list[Launch]:
    """out = the normalised map, or the gradient of y where ``grad`` is given."""
    tile = norm_tile(y.stride(1) == 1, y.shape[1])
    split_pixels = NORM_MAP_BLOCKS * tile.pixels
    programs, arguments = _walk(y, grad, out, tile, split_pixels)
    arguments |= {
        "norm": _dense(norm),
        "factor_ptr": _contiguous(channel_scale),
        "means_ptr": _contiguous(mean_sums),
        "relu": int(relu),
    }
    return (
        [Launch(batch_norm_map_kernel, (programs,), arguments, tile.warps, tile.stages, tile.max_registers)]
        if programs
        else []
    )


def plan_statistics(y: Tensor, statistics: Tensor, device: Device) -> list[Launch]:
    """statistics = mean and biased variance."""
    if y.numel() == 0:
        statistics.fill_(torch.nan)
        return []
    launch, parts, split_pixels = _plan_sums(y, None, None, None, False, 3, device)
    pixels, channels = y.shape[2] * y.shape[3], y.shape[1]
    arguments = {
        "partial_ptr": launch.arguments["partial_ptr"],
        "statistics_ptr": statistics,
        "parts": parts,
        "splits": parts // y.shape[0],
        "n_pixels": pixels,
        "split_pixels": split_pixels,
        "n_channels": channels,
        "BLOCK_PARTS": _MERGE_PARTS,
        "BLOCK_CHANNELS": _MERGE_CHANNELS,
    }
    merge = Launch(batch_norm_merge_kernel, (-(-channels // _MERGE_CHANNELS),), arguments, _MERGE_WARPS, 1)
    return [launch, merge]


def plan_sums(
    y: Tensor, grad: Tensor, norm: Norm, channel_scale: Tensor | None, relu: bool, sums: Tensor, device: Device
) -> list[Launch]:
    """sums = (Σ g, Σ g·ŷ)."""
    if y.numel() == 0:
        sums.zero_()
        return []
    launch, parts, _ = _plan_sums(y, grad, norm, channel_scale, relu, 2, device)
    arguments = {
        "partial_ptr": launch.arguments["partial_ptr"],
        "sums_ptr": sums,
        "parts": parts,
        "size": sums.numel(),
        "BLOCK_PARTS": _MERGE_PARTS,
        "BLOCK_SIZE": _MERGE_CHANNELS,
    }
    total = Launch(bn_relu_sum_parts_kernel, (-(-sums.numel() // _MERGE_CHANNELS),), arguments, _MERGE_WARPS, 1)
    return [launch, total]


def _plan_sums(
    y: Tensor,
    grad: Tensor | None,
    norm: Norm | None,
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
        "norm": None if norm is None else _dense(norm),
        "factor_ptr": _contiguous(channel_scale),
        "partial_ptr": y.new_empty((parts, rows, channels), dtype=torch.float32),
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


def _dense(norm: Norm) -> Norm:
    return Norm(*(vector.contiguous() for vector in norm))


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def launch_variants(device: Device) -> Iterator[tuple[str, str, Launch]]:
    """(dtype, layout, launch) of what the blocks launch: the maps lie alike, the input may be strided."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, y in layout_examples(dtype):
            dense = empty_map(y, tuple(y.shape), name.startswith("channels_last"))  # type: ignore[arg-type]
            norm = Norm(*(y.new_empty(y.shape[1], dtype=torch.float32) for _ in Norm._fields))
            rows = y.new_empty((2, y.shape[1]), dtype=torch.float32)
            launches = plan_statistics(y, rows, device)
            for factor in (y.new_empty(y.shape[:2], dtype=torch.float32), None):
                launches += plan_map(y, None, norm, factor, None, True, dense)
                launches += plan_sums(y, dense, norm, factor, True, rows, device)
                for means in (rows, None):
                    launches += plan_map(y, dense, norm, factor, means, True, dense)
            for launch in launches:
                yield str(dtype).removeprefix("torch."), name, launch
