"""The two operators in standard operators, for export to ONNX with free batch, height and width.

While ``torch.onnx.export`` traces a module, the public functions take these forms and the blocks call their norms as
modules, so that the graph holds standard operators only. A program that ``torch.export`` made before holds this
package's operators: it is converted with :func:`translation_table`.

Pooling is two matrix products made from the geometry of the bins, which follows the size of the map in the graph: rows
of all levels, then columns of all levels, and of their combinations those of one level. A pixel that is not finite
therefore spoils its whole channel of tokens, where the operators keep it to the bins that hold it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..runtime import tracers

if TYPE_CHECKING:
    from ..blocks.collapse import Parts, Projection


def exporting() -> bool:
    """Whether an exporter to ONNX is tracing; the first two questions are cheap and seldom answered with yes."""
    return (tracers.exporting() or tracers.jit_tracing()) and tracers.exporting_to_onnx()


def pyramid_pool(x: Tensor, heights: Sequence[int], widths: Sequence[int]) -> Tensor:
    """(B, C, H, W) → (B, C, T), its sums in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rows, columns = _averages(wide, 2, heights), _averages(wide, 3, widths)
    levels = rows @ (wide @ columns.transpose(0, 1))
    return levels.flatten(2).index_select(2, _constant(token_positions(heights, widths), x)).to(x.dtype)


def _averages(x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
    """(bins of all levels, length of ``dim``): 1 / the bin's length where it holds the pixel, else 0.

    Bin i of S holds pixel p if p < ⌈(i+1)·length/S⌉ and p ≥ ⌊i·length/S⌋: exact without a division.
    """
    length = x.shape[dim]
    numbers, counts = (_constant(values, x)[:, None] for values in bins(sizes))
    pixel = torch.arange(length, device=x.device)
    held = (pixel * counts < (numbers + 1) * length) & ((pixel + 1) * counts > numbers * length)
    weights = held.to(x.dtype)
    return weights / weights.sum(1, keepdim=True)


def bins(sizes: Sequence[int]) -> tuple[list[int], list[int]]:
    """Number of each bin in its level, and how many the level has."""
    return [i for size in sizes for i in range(size)], [size for size in sizes for _ in range(size)]


def token_positions(heights: Sequence[int], widths: Sequence[int]) -> list[int]:
    """Where each token is among all pairs of a row bin and a column bin, of whatever levels."""
    total, top, left, positions = sum(widths), 0, 0, []
    for height, width in zip(heights, widths, strict=True):
        positions += [(top + i) * total + left + j for i in range(height) for j in range(width)]
        top, left = top + height, left + width
    return positions


def _constant(values: list[int], like: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]  # it becomes a constant
        return torch.tensor(values, device=like.device)


def asymmetric_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(B, Cv, H, W), and the attention (B, T, N) with its softmax in float32 at least; the map is not transposed."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    logits = (key.to(dtype) * scale).transpose(1, 2) @ query.flatten(2).to(dtype)
    attention = logits.softmax(dim=1)
    out = value @ attention.to(value.dtype)
    return out.view(query.shape[0], value.shape[1], query.shape[2], query.shape[3]), attention


def block_forward(parts: Parts, low: Tensor, high: Tensor) -> Tensor:
    """The output of a block, every weight as it is, so that the graph holds it as an initializer.

    The value path runs on the pooled tokens, as in the collapse, and its biases are added behind the attention: a
    constant that passed through it would take on how far the runtime's sums of its rows are from 1. The value's bias
    passes W as one more token, so that W stays one convolution. The halves of the bottleneck's weight stay together: in
    a graph they would be computed, and tools that quantise weights look for constant ones.
    """
    query = _projected(parts.query, high)
    key = query if parts.is_shared() else _projected(parts.key, low)
    heights, widths = zip(*parts.pool_sizes(), strict=True)
    tokens = pyramid_pool(key, heights, widths)
    count = tokens.shape[2]
    value = F.conv2d(pyramid_pool(low, heights, widths)[:, :, :, None], parts.value.weight)
    if parts.value.bias is not None:
        bias = parts.value.bias.to(value.dtype)[None, :, None, None].expand(value.shape[0], -1, -1, -1)
        value = torch.cat([value, bias], dim=2)
    value = F.conv2d(value, parts.out.weight)
    out, _ = asymmetric_attention(query, tokens, value[:, :, :count, 0], query.shape[1] ** -0.5)
    if parts.value.bias is not None:
        out = out + value[:, :, count:]
    if parts.out.bias is not None:
        out = out + parts.out.bias.to(out.dtype)[:, None, None]
    if parts.join is not None:
        out = parts.join(torch.cat([out, high], dim=1))
        for module in parts.tail:
            out = module(out)
    return out


def _projected(projection: Projection, x: Tensor) -> Tensor:
    projected: Tensor = projection.activation(projection.norm(projection.conv(x)))
    return projected


def upsampled(logits: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """(B, K, H, W) in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.interpolate(wide, size, mode="bilinear", align_corners=align_corners)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """How to write this package's operators in ONNX, for ``torch.onnx.export`` of an already exported program.

    A module needs no table: ``torch.onnx.export(module, ...)`` finds standard operators in it.

    Returns:
        What ``torch.onnx.export`` takes as ``custom_translation_table``: operators and the functions that write them.

    Raises:
        ModuleNotFoundError: onnxscript, which PyTorch's exporter needs, is not installed.

    Example:
        >>> import torch, annnet_kernels as ak
        >>> block = ak.APNB(8, 8, key_channels=4, value_channels=4).eval()
        >>> program = torch.export.export(block, (torch.randn(1, 8, 16, 16),))
        >>> model = torch.onnx.export(program, custom_translation_table=ak.onnx.translation_table(), verbose=False)
    """
    try:
        from .translation import TABLE
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"translation_table: needs onnxscript ({error})", name=error.name) from error
    return dict(TABLE)
