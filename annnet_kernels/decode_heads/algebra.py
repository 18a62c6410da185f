"""A convolution over maps that are resized and concatenated first, made at each map's own resolution.

A convolution is linear in each of the maps that it reads, and bilinear resizing mixes pixels but no channels. So

    conv(W, cat_i resize(Z_i)) = Σ_i Σ_taps shift_tap(resize(W_i,tap Z_i)),

where W_i are the columns of W that read map i. The products over channels run on the pixels of Z_i, which are fewer
than those of the result; neither the resized maps nor their concatenation exists. With zero padding, a tap that
reaches over the border adds nothing. Resizing is separable: one product with a matrix along the width, one along the
height; the shifts of the taps are in these matrices.

A linear layer ahead of the resizing, L_i x_i + b_i, folds into W_i L_i. The weights of bilinear resizing sum to 1, so
its bias passes: without taps, the result is Σ_i resize(W_i L_i x_i) + Σ_i W_i b_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime.autocast import autocast_dtype, no_autocast
from ..runtime.tracers import exporting, jit_tracing

Size = tuple[int, int]


def convolve_resized(
    maps: Sequence[Tensor], weight: Tensor, bias: Tensor | None, size: Size, align_corners: bool
) -> Tensor:
    """conv(weight, cat_i resize(maps[i])): bilinear resizing to ``size``, zero padding that keeps the size.

    Args:
        maps: Z_i (B, C_i, h_i, w_i), all of one dtype, in any strides. Maps of the result's size are not resized.
        weight: (C_out, Σ C_i, k, k), k odd, its columns in the order of the maps.
        bias: (C_out) or None.
        size: (H, W) of the result.
        align_corners: as ``torch.nn.functional.interpolate`` takes it.

    Returns:
        (B, C_out, H, W) in the dtype that a convolution of the maps would have, autocast included.
    """
    columns = weight.split([z.shape[1] for z in maps], dim=1)
    dtype = _result_dtype(maps[0])
    with no_autocast(maps[0].device.type):
        terms = [(z.to(dtype), w.to(dtype)) for z, w in zip(maps, columns, strict=True)]
        return _sum_of_resized(terms, bias, size, align_corners)


def fuse_projected(
    maps: Sequence[Tensor],
    projections: Sequence[tuple[Tensor, Tensor | None]],
    weight: Tensor,
    bias: Tensor | None,
    size: Size,
    align_corners: bool,
) -> Tensor:
    """conv1×1(weight, cat_i resize(L_i x_i + b_i)): the linear layers fold into the convolution.

    Args:
        maps: x_i (B, C_i, h_i, w_i).
        projections: pairs of L_i (C, C_i) and b_i (C) or None.
        weight: (C_out, n·C, 1, 1), its columns in the order of the maps.
        bias: (C_out) or None.
        size, align_corners: as in :func:`convolve_resized`.

    Returns:
        (B, C_out, H, W).
    """
    columns = weight.flatten(1).split([linear.shape[0] for linear, _ in projections], dim=1)
    dtype = _result_dtype(maps[0])
    with no_autocast(maps[0].device.type):
        # PyTorch takes what the linear layers leave for channels_last, but not in a batch of one
        layout = torch.channels_last if maps[0].shape[0] > 1 else torch.contiguous_format
        constant = None if bias is None else _wide(bias)
        terms = []
        for x, column, (linear, offset) in zip(maps, columns, projections, strict=True):
            if offset is not None:
                passed = _wide(column) @ _wide(offset)
                constant = passed if constant is None else constant + passed
            if _folds(x, column, linear):
                x, column = x.to(dtype), _wide(column) @ _wide(linear)
            else:
                x = F.conv2d(x.to(dtype), linear.to(dtype)[:, :, None, None])
            terms.append((x.contiguous(memory_format=layout), column.to(dtype)[:, :, None, None]))
        return _sum_of_resized(terms, constant, size, align_corners)


def _result_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a convolution of ``x`` returns; PyTorch's autocast leaves float64 alone."""
    chosen = autocast_dtype(x)
    return x.dtype if chosen is None or x.dtype == torch.float64 else chosen


def _wide(x: Tensor) -> Tensor:
    """``x`` in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _folds(x: Tensor, column: Tensor, linear: Tensor) -> bool:
    """Whether W_i L_i, made first, costs fewer multiply-adds than two products over the pixels of the map.

    A traced graph serves maps of many sizes and always folds.
    """
    if exporting() or jit_tracing() or torch.compiler.is_compiling():
        return True
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    middle, inner = linear.shape
    outer = column.shape[0]
    return outer * middle * inner + pixels * inner * outer <= pixels * middle * (inner + outer)


def _sum_of_resized(
    terms: Sequence[tuple[Tensor, Tensor]], constant: Tensor | None, size: Size, align_corners: bool
) -> Tensor:
    """Σ_i conv(w_i, resize(z_i)) + constant, summed in float32 at least and rounded once to the dtype of the maps."""
    smaller = [(z, w) for z, w in terms if _is_smaller(z, size)]
    whole = [(z, w) for z, w in terms if not _is_smaller(z, size)]
    if not whole:  # a map without weight carries the constant
        z, w = terms[0]
        whole = [(z.new_zeros(z.shape[0], 1, *size), w.new_zeros(w.shape[0], 1, *w.shape[2:]))]
    maps = [
        z if _has_size(z, size) else F.interpolate(z, size, mode="bilinear", align_corners=align_corners)
        for z, _ in whole
    ]  # where resizing makes pixels fewer, the convolution runs behind it
    x, w = (columns[0] if len(whole) == 1 else torch.cat(columns, 1) for columns in (maps, [w for _, w in whole]))
    out = F.conv2d(x, w, None if constant is None else constant.to(x.dtype), padding=w.shape[2] // 2)
    if not smaller:
        return out
    spread = _spread_channels_last if _is_channels_last(out) else _spread_contiguous
    return spread(_wide(out), smaller, align_corners).to(out.dtype)


def _spread_contiguous(total: Tensor, terms: Sequence[tuple[Tensor, Tensor]], align_corners: bool) -> Tensor:
    """total (B, C_out, H, W) + Σ_i conv(w_i, resize(z_i)), row by row of each channel."""
    batch, channels, height, width = total.shape
    along_height, spread = [], []
    for z, w in terms:
        _, inner, taps, _ = w.shape
        rows, columns = (
            resizing_matrix(length, size, align_corners, taps, total.dtype, total.device)
            for length, size in ((z.shape[2], height), (z.shape[3], width))
        )
        by_column = w.permute(3, 0, 2, 1).reshape(-1, inner, 1, 1)  # column tap, channel, row tap
        products = F.conv2d(z, by_column).to(total.dtype).reshape(batch, taps, -1, z.shape[3])
        part = products[:, 0] @ columns[0]
        for tap in range(1, taps):
            part = torch.baddbmm(part, products[:, tap], columns[tap].expand(batch, -1, -1))
        along_height.append(rows.flatten(0, 1))
        spread.append(part.view(batch * channels, taps * z.shape[2], width))
    matrix = torch.cat(along_height).t()
    rows_of_channels = total.reshape(batch * channels, height, width)
    out = torch.baddbmm(rows_of_channels, matrix.expand(batch * channels, -1, -1), torch.cat(spread, 1))
    return out.view(total.shape)


def _spread_channels_last(total: Tensor, terms: Sequence[tuple[Tensor, Tensor]], align_corners: bool) -> Tensor:
    """The same where the channels of a pixel lie side by side: rows of pixels are multiplied for all channels."""
    batch, channels, height, width = total.shape
    along_height, spread = [], []
    for z, w in terms:
        _, inner, taps, _ = w.shape
        rows, columns = (
            resizing_matrix(length, size, align_corners, taps, total.dtype, total.device)
            for length, size in ((z.shape[2], height), (z.shape[3], width))
        )
        by_column = w.permute(3, 2, 0, 1).reshape(-1, inner, 1, 1)  # column tap, row tap, channel
        products = F.conv2d(z.contiguous(memory_format=torch.channels_last), by_column).to(total.dtype)
        products = products.permute(0, 2, 3, 1).reshape(batch * z.shape[2], z.shape[3] * taps, taps, channels)
        across = columns.permute(2, 1, 0).reshape(width, -1).expand(products.shape[0], -1, -1)
        for tap in range(taps):
            part = torch.bmm(across, products[:, :, tap])
            along_height.append(rows[tap])
            spread.append(part.view(batch, z.shape[2], width * channels))
    matrix = torch.cat(along_height).t()
    rows_of_pixels = total.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
    out = torch.baddbmm(rows_of_pixels, matrix.expand(batch, -1, -1), torch.cat(spread, 1))
    return out.view(batch, height, width, channels).permute(0, 3, 1, 2)


def resizing_matrix(
    length: int, size: int, align_corners: bool, taps: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """What ``interpolate(mode="linear")`` from ``length`` to ``size`` pixels multiplies by, once per tap.

    Returns:
        (taps, length, size): entry (t, i, o) is the weight of pixel i in the resized pixel o + t − taps // 2, and 0
        where that is outside the map.
    """
    reach = taps // 2
    pixel = torch.arange(size + 2 * reach, device=device, dtype=torch.float64) - reach
    if align_corners:
        steps: Any = torch.sym_max(size - 1, 1)
        source = pixel * ((length - 1) / steps)
    else:
        source = (pixel + 0.5) * (length / size) - 0.5
    position = torch.arange(length, device=device, dtype=torch.float64)
    weights = (1 - (source.clamp(0, length - 1) - position[:, None]).abs()).clamp(min=0)
    weights = weights * ((pixel >= 0) & (pixel < size))
    return torch.stack([weights[:, tap : tap + size] for tap in range(taps)]).to(dtype)


def _has_size(z: Tensor, size: Size) -> bool:
    return z.shape[2] == size[0] and z.shape[3] == size[1]


def _is_smaller(z: Tensor, size: Size) -> bool:
    return z.shape[2] * z.shape[3] < size[0] * size[1]


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
