"""Launches of the pooling kernels: the layout of a call, its parts, its scratch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..layouts import empty_map, empty_tokens
from ..pyramid import POOL_SIZES, num_tokens
from .launch import Device, Launch, device_of
from .operands import strides_argument, token_strides_argument
from .plans import do_not_repeat, planned, scratch
from .pool_kernels import pyramid_pool_combine_kernel, pyramid_pool_fwd_kernel
from .pool_spread_kernels import pyramid_pool_bwd_kernel
from .pool_walk import Walk
from .tiles import (
    PoolTile,
    least_pool_rows,
    pool_cut_cost,
    pool_split_rows,
    pool_tile,
    pool_tile_columns,
)

_COMBINE_CHANNELS, _COMBINE_WARPS = 128, 1
LEAST_SPREAD_ROWS = 16
"""Rows of a split that only writes: it has no partial sums, but makes the gradient of its first bins anew."""


@planned
def pyramid_pool(
    x: Tensor, norm: Tensor | None, heights: Sequence[int], widths: Sequence[int], out: Tensor
) -> list[Launch]:
    return plan_forward(x, norm, heights, widths, out, device_of(x))


@planned
def pyramid_pool_bwd(
    grad: Tensor,
    addend: Tensor | None,
    map_size: Sequence[int],
    heights: Sequence[int],
    widths: Sequence[int],
    channels_last: bool,
    dx: Tensor,
) -> list[Launch]:
    if addend is not None and addend is not dx:
        dx.copy_(addend)
        do_not_repeat()
    return plan_backward(grad, heights, widths, dx, device_of(grad), adds=addend is not None)


class Layout(NamedTuple):
    """How the maps of a call lie in memory, all of them: what a compiled variant depends on, beside the dtype."""

    inner: str
    """The dimension with stride 1: ``"channels"``, ``"columns"`` or ``"none"``."""
    vector: int
    """Elements in 16 bytes if every vector along ``inner`` starts at a multiple of 16 bytes, else 1."""


def layout_of(*maps: Tensor) -> Layout:
    """The layout that all of ``maps`` (of equal shape) have in common."""
    for inner, dim, others in (("columns", 3, (0, 1, 2)), ("channels", 1, (0, 2, 3))):
        if all(_offsets_fit(x) and (x.stride(dim) == 1 or x.shape[dim] == 1) for x in maps):
            vector = 16 // maps[0].element_size()
            aligned = maps[0].shape[dim] % vector == 0 and all(
                is_aligned(x) and all(x.stride(d) % vector == 0 or x.shape[d] == 1 for d in others) for x in maps
            )
            return Layout(inner, vector if aligned else 1)
    return Layout("none", 1)


def is_aligned(x: Tensor) -> bool:
    """Whether ``x`` starts at a multiple of 16 bytes; what has no memory counts as freshly allocated."""
    return x.is_meta or x.data_ptr() % 16 == 0


def _offsets_fit(x: Tensor) -> bool:
    """Whether 32-bit offsets reach from any element to 64 channels and columns further."""
    return bool(64 * (abs(x.stride(1)) + abs(x.stride(3))) < 2**31)


Levels = tuple[tuple[tl.constexpr, ...], ...]


def levels_argument(heights: Sequence[int], widths: Sequence[int]) -> Levels:
    """Per level its bins, rows × columns, and the sums over the earlier levels of tokens, rows and columns."""
    levels = []
    tokens = rows = columns = 0
    for h, w in zip(heights, widths, strict=True):
        levels.append(tuple(map(tl.constexpr, (h, w, tokens, rows, columns))))
        tokens, rows, columns = tokens + h * w, rows + h, columns + w
    return tuple(levels)


class Parts(NamedTuple):
    """How a map is cut: the kernels' size arguments, and the grid."""

    sizes: dict[str, int]
    splits: int
    tiles: int
    programs: int


def parts_of(x: Tensor, layout: Layout, tile: PoolTile, least_rows: int, device: Device) -> Parts:
    """Tiles of columns and splits of rows of ``x``."""
    batch, channels, height, width = x.shape
    multiple = layout.vector if layout.inner == "columns" else 1
    tile_columns = pool_tile_columns(width, tile.columns, multiple)
    tiles = -(-width // tile_columns)
    blocks = batch * -(-channels // tile.channels) * tiles
    split_rows = pool_split_rows(height, max(1, blocks), device.multiprocessors, least_rows)
    splits = -(-height // split_rows)
    sizes = {
        "n_channels": channels,
        "height": height,
        "width": width,
        "tile_columns": tile_columns,
        "split_rows": split_rows,
    }
    return Parts(sizes, splits, tiles, blocks * splits)


def walk_argument(layout: Layout, tile: PoolTile, levels: Levels) -> Walk:
    """How a kernel walks maps of this layout."""
    sizes = (layout.inner, layout.vector, tile.channels, tile.columns, tile.rows_ahead, tile.stages)
    inner, vector, channels, columns, rows_ahead, stages = map(tl.constexpr, sizes)
    return Walk(inner, vector, channels, columns, rows_ahead, stages, levels)


def plan_forward(
    x: Tensor, norm: Tensor | None, heights: Sequence[int], widths: Sequence[int], out: Tensor, device: Device
) -> list[Launch]:
    """out = tokens of x, or of the normalised and rectified x. ``out`` is token-major."""
    if x.shape[0] == 0:
        return []
    transposed = _is_low(x, heights, widths, norm is None)
    if transposed:
        x, heights, widths = x.transpose(2, 3), widths, heights
    layout = layout_of(x)
    tile = pool_tile(layout.inner, layout.vector, x.dtype, light=norm is None)
    parts = parts_of(x, layout, tile, least_pool_rows(x.shape[3], widths, x.dtype), device)
    levels = levels_argument(heights, widths)
    slots = sum((h + parts.splits - 1) * (w + parts.tiles - 1) for h, w in zip(heights, widths, strict=True))
    cut = parts.splits > 1 or parts.tiles > 1
    partial = scratch(x, (x.shape[0], slots, x.shape[1]) if cut else (0,), torch.float32)
    arguments: dict[str, Any] = {
        "x_ptr": x,
        "norm_ptr": None if norm is None else norm.contiguous(),
        "out_ptr": out,
        "partial_ptr": partial,
        **parts.sizes,
        "transposed": int(transposed),
        "x_strides": strides_argument(x),
        "x_row_stride": x.stride(2),
        "walk": walk_argument(layout, tile, levels),
    }
    launches = [
        Launch(pyramid_pool_fwd_kernel, (parts.programs,), arguments, tile.warps, tile.stages, tile.max_registers)
    ]
    if cut:
        arguments = {
            "partial_ptr": partial,
            "out_ptr": out,
            **parts.sizes,
            "transposed": int(transposed),
            "levels": levels,
            "BLOCK_CHANNELS": _COMBINE_CHANNELS,
        }
        grid = (num_tokens(heights, widths), -(-x.shape[1] // _COMBINE_CHANNELS), x.shape[0])
        launches.append(Launch(pyramid_pool_combine_kernel, grid, arguments, _COMBINE_WARPS, 1))
    return launches


def _is_low(x: Tensor, heights: Sequence[int], widths: Sequence[int], light: bool) -> bool:
    """Whether a map has so few rows that its walk goes from left to right: cuts cost less there, and too much here."""
    layout = layout_of(x)
    columns = pool_tile(layout.inner, layout.vector, x.dtype, light).columns
    cost, other = (
        pool_cut_cost(x.shape[a], x.shape[b], bins, columns, x.dtype)
        for a, b, bins in ((2, 3, heights), (3, 2, widths))
    )
    return other < cost > 0.1


def plan_backward(
    grad: Tensor, heights: Sequence[int], widths: Sequence[int], dx: Tensor, device: Device, adds: bool = False
) -> list[Launch]:
    """dx = the gradient of the tokens, spread; added to what dx holds where ``adds``."""
    if dx.shape[0] == 0:
        return []
    layout = layout_of(dx)
    token_major = is_token_major(grad, layout)
    tile = pool_tile(layout.inner, layout.vector, dx.dtype, light=token_major)
    parts = parts_of(dx, layout, tile, LEAST_SPREAD_ROWS, device)
    arguments = {
        "grad_ptr": grad,
        "dx_ptr": dx,
        **parts.sizes,
        "grad_strides": token_strides_argument(grad, token_major),
        "dx_strides": strides_argument(dx),
        "dx_row_stride": dx.stride(2),
        "walk": walk_argument(layout, tile, levels_argument(heights, widths)),
        "ADDS": adds,
    }
    return [Launch(pyramid_pool_bwd_kernel, (parts.programs,), arguments, tile.warps, 1, tile.max_registers)]


def is_token_major(grad: Tensor, layout: Layout) -> bool:
    """Whether the channels of a token lie side by side, and aligned where the map is read in vectors of channels."""
    batch_stride, channel_stride, token_stride = grad.stride()
    if channel_stride != 1 or layout.inner != "channels":
        return channel_stride == 1
    return layout.vector == 1 or (
        is_aligned(grad) and batch_stride % layout.vector == 0 and token_stride % layout.vector == 0
    )


def launch_variants(device: Device) -> Iterator[tuple[str, str, Launch]]:
    """(dtype, layout, launch) for everything that compiles to code of its own, from the plans of meta tensors."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, x in layout_examples(dtype):
            batch, channels, height, width = x.shape
            tokens = empty_tokens(x, batch, channels, num_tokens(POOL_SIZES, POOL_SIZES))
            launches = plan_forward(x, None, POOL_SIZES, POOL_SIZES, tokens, device)
            if name != "strided":
                dx = empty_map(x, (batch, channels, height, width), name.startswith("channels_last"))
                for adds in (False, True):
                    launches += plan_backward(tokens, POOL_SIZES, POOL_SIZES, dx, device, adds)
                launches += plan_backward(tokens.contiguous(), POOL_SIZES, POOL_SIZES, dx, device)
            for launch in launches:
                yield str(dtype).removeprefix("torch."), name, launch


def layout_examples(dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """A meta map of every layout class; float16 moves as bfloat16 does, and one layout stands for all."""
    shape = (8, 256, 97, 97)
    like = torch.empty(0, dtype=dtype, device="meta")
    yield "channels_last", empty_map(like, shape, True)
    if dtype == torch.float16:
        return
    yield "channels_last, odd", empty_map(like, (8, 19, 97, 97), True)
    yield "nchw", empty_map(like, (8, 256, 128, 256), False)
    yield "nchw, odd", empty_map(like, shape, False)
    yield "strided", empty_map(like, (8, 256, 97, 194), False)[..., ::2]
