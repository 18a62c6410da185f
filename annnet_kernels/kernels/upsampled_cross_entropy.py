"""Launches of the upsampled cross-entropy and argmax; see ``upsampled_kernels``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ..layouts import empty_map
from ..upsampling import ratio
from .launch import Device, Launch, run_all
from .operands import run_time, strided_argument
from .upsampled_gradient_kernels import GradientTile, upsampled_gradient_kernel
from .upsampled_kernels import Axis, Weights, upsampled_argmax_kernel, upsampled_loss_kernel

_COLUMNS, _WARPS = 128, 4
_MOST_ROWS = 8
_MOST_LANE_CLASSES = 8
"""With eight classes a lane keeps 32 corners and 32 gradients of them in registers."""
_ALL_REGISTERS = 255
"""Left to itself, ptxas holds the kernels with label smoothing to fewer and spills up to 16 bytes (sm_90)."""


def upsampled_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    per_pixel: bool,
    gradient: bool,
    losses: Tensor,
    sums: Tensor,
    unit_gradient: Tensor,
) -> None:
    if target.numel() == 0:
        for output in (sums, unit_gradient):
            output.zero_()
        return
    operands, options = (logits, target, weight), (ignore_index, label_smoothing, align_corners)
    logsumexp = losses.new_empty(target.shape) if gradient else None
    forward = plan_loss(operands, options, losses if per_pixel else None, logsumexp)
    run_all([forward], logits)
    partial: Tensor = forward.arguments["partial_ptr"]
    torch.sum(partial.view(logits.shape[0], -1, 2), 1, out=sums)
    if logsumexp is not None:
        bottom = torch.empty_like(unit_gradient)
        run_all([plan_gradient(operands, options, None, logsumexp, unit_gradient, bottom)], logits)
        unit_gradient.add_(bottom)


def upsampled_cross_entropy_bwd(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None,
    grad: Tensor,
    ignore_index: int,
    label_smoothing: float,
    align_corners: bool,
    dlogits: Tensor,
) -> None:
    if target.numel() == 0:
        return
    operands, options = (logits, target, weight), (ignore_index, label_smoothing, align_corners)
    logsumexp = grad.new_empty(target.shape)
    top, bottom = (torch.empty_like(dlogits, dtype=torch.float32) for _ in range(2))
    forward = plan_loss(operands, options, None, logsumexp)
    run_all([forward, plan_gradient(operands, options, grad, logsumexp, top, bottom)], logits)
    torch.add(top, bottom, out=dlogits)


def upsampled_argmax(logits: Tensor, size: Sequence[int], align_corners: bool, out: Tensor) -> None:
    if out.numel():
        run_all([plan_argmax(logits, align_corners, out)], logits)


def _geometry(logits: Tensor, rows: int, columns: int, align_corners: bool) -> dict[str, Any]:
    height, width = (
        Axis(*map(run_time, (cells, pixels, *ratio(cells, pixels, align_corners))))
        for cells, pixels in zip(logits.shape[2:], (rows, columns), strict=True)
    )
    return {
        "n_classes": logits.shape[1],
        "rows": height,
        "columns": width,
        "logits": strided_argument(logits),
        "logits_channel_stride": logits.stride(1),
    }


def _options(target: Tensor, weight: Tensor | None, ignore_index: int, smoothing: float) -> dict[str, Any]:
    total = None if weight is None or not smoothing else weight.sum()
    return {
        "target": strided_argument(target),
        "weights": Weights(None if weight is None else weight.contiguous(), total),
        "ignore_index": ignore_index,
        "smoothing": float(smoothing),
        "SMOOTHING": smoothing > 0,
    }


def _tile(cells: int, pixels: int) -> dict[str, int]:
    """As many rows at a time as lie between two rows of cells, in powers of two."""
    most = -(-pixels // cells)
    return {"ROWS": min(_MOST_ROWS, 1 << (most - 1).bit_length()), "BLOCK_COLUMNS": _COLUMNS}


def _pixel_programs(logits: Tensor, columns: int) -> int:
    return logits.shape[0] * (logits.shape[2] + 1) * -(-columns // _COLUMNS)


def plan_loss(
    operands: tuple[Tensor, Tensor, Tensor | None],
    options: tuple[int, float, bool],
    losses: Tensor | None,
    logsumexp: Tensor | None,
) -> Launch:
    """Loss and logsumexp of each pixel where there is memory for them, and the programs' sums of losses and weights."""
    logits, target, weight = operands
    ignore_index, smoothing, align_corners = options
    _, rows, columns = target.shape
    programs = _pixel_programs(logits, columns)
    arguments = {
        **_options(target, weight, ignore_index, smoothing),
        "losses_ptr": losses,
        "logsumexp_ptr": logsumexp,
        "partial_ptr": logits.new_empty((programs, 2), dtype=torch.float32),
        **_geometry(logits, rows, columns, align_corners),
        **_tile(logits.shape[2], rows),
    }
    return Launch(upsampled_loss_kernel, (programs,), arguments, _WARPS, 1, _ALL_REGISTERS)


def plan_gradient(
    operands: tuple[Tensor, Tensor, Tensor | None],
    options: tuple[int, float, bool],
    grad: Tensor | None,
    logsumexp: Tensor,
    top: Tensor,
    bottom: Tensor,
) -> Launch:
    """The gradient's parts from below (``top``) and above (``bottom``) each row of cells."""
    logits, target, weight = operands
    ignore_index, smoothing, align_corners = options
    batch, rows, columns = target.shape
    classes, height, width = logits.shape[1:]
    tile, step = gradient_tile(classes, width), ratio(width, columns, align_corners)
    groups = -(-classes // (tile.lane_classes * tile.classes))
    blocks = -(-width // (tile.cells - 1))
    arguments = {
        **_options(target, weight, ignore_index, smoothing),
        "grad": strided_argument(grad),
        "grad_column_stride": 0 if grad is None else grad.stride(2),
        "target_column_stride": target.stride(2),
        "logsumexp_ptr": logsumexp,
        "top": strided_argument(top),
        "bottom_ptr": bottom,
        **_geometry(logits, rows, columns, align_corners),
        **{f"column_{name}": value for name, value in zip(("step", "start", "divisor"), step, strict=True)},
        "tile": GradientTile(*map(tl.constexpr, tile)),
    }
    return Launch(
        upsampled_gradient_kernel, (batch * (height + 1) * groups * blocks,), arguments, _WARPS, 1, _ALL_REGISTERS
    )


def gradient_tile(classes: int, width: int) -> GradientTile:
    """The tile of 128 lanes that leaves the fewest idle: its cells side by side, and the classes of a lane."""
    choices = []
    for cells in (16, 32):
        lanes = 32 * _WARPS // cells
        groups = -(-classes // (lanes * _MOST_LANE_CLASSES))
        of_lane = -(-classes // (lanes * groups))
        work = of_lane * lanes * groups * cells * -(-width // (cells - 1))
        choices.append((work, GradientTile(of_lane, lanes, cells)))
    return min(choices, key=lambda choice: choice[0])[1]


def plan_argmax(logits: Tensor, align_corners: bool, out: Tensor) -> Launch:
    """The class of each pixel."""
    _, rows, columns = out.shape
    arguments = {
        "out_ptr": out,
        **_geometry(logits, rows, columns, align_corners),
        **_tile(logits.shape[2], rows),
    }
    return Launch(upsampled_argmax_kernel, (_pixel_programs(logits, columns),), arguments, _WARPS, 1, _ALL_REGISTERS)


_EXAMPLES = ((19, 65, 513), (21, 65, 513), (150, 64, 512))
"""Classes, cells and pixels along an axis, of Cityscapes, VOC and ADE20K: what a lane holds depends on the classes."""


def launch_variants(device: Device) -> Iterator[tuple[str, str, Launch]]:
    """(dtype, layout, launch) for the usual sizes and options; strides and sizes are arguments, and compile nothing."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        like = torch.empty(0, dtype=dtype, device="meta")
        for example in _EXAMPLES:
            for launch in _variants_of(like, *example):
                yield str(dtype).removeprefix("torch."), "any", launch


def _variants_of(like: Tensor, classes: int, cells: int, pixels: int) -> Iterator[Launch]:
    logits = empty_map(like, (2, classes, cells, cells), False)
    pixel = logits.new_empty((2, pixels, pixels), dtype=torch.float32)
    weights = pixel.new_empty(classes)
    top, bottom = (torch.empty_like(logits, dtype=torch.float32) for _ in range(2))
    for label, weight, smoothing in ((torch.int64, None, 0.0), (torch.uint8, None, 0.0), (torch.int64, weights, 0.1)):
        operands = (logits, pixel.new_empty(pixel.shape, dtype=label), weight)
        options = (255, smoothing, False)
        for losses, logsumexp in ((None, None), (pixel, None), (None, pixel)):
            yield plan_loss(operands, options, losses, logsumexp)
        for grad in (None, pixel):
            yield plan_gradient(operands, options, grad, pixel, top, bottom)
    yield plan_argmax(logits, False, pixel.new_empty(pixel.shape, dtype=torch.int64))
