"""Triton kernels of the normalising tail: statistics, forward, sums and gradient. B batch, C channels, N pixels.

A program owns a chunk of the channels of one image and a split of its pixels, which it walks in blocks. The vectors of
its channels are read once. Parts are summed by a second kernel in a fixed order, without atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .operands import load_map, pixel_pointers, store_map

_SIZES = ["pixel_groups", "width", "split_pixels", "relu"]


@triton.jit
def _own_split(n_channels, n_pixels, split_pixels, chunk, CHANNELS_INNER: tl.constexpr):
    """Image, first channel, split and number of splits; programs that follow each other read neighbouring memory."""
    n_chunks = tl.cdiv(n_channels, chunk.size)
    n_splits = tl.cdiv(n_pixels, split_pixels)
    index = tl.program_id(0)
    if CHANNELS_INNER:
        which, split = index % n_chunks, index // n_chunks % n_splits
    else:
        split, which = index % n_splits, index // n_splits % n_chunks
    return (index // (n_chunks * n_splits)).to(tl.int64), which * chunk.size, split, n_splits


@triton.jit
def _load_block(map, batch, first, inside, width, channel, chunk, BLOCK_PIXELS: tl.constexpr):
    """(pixels, chunk) of a map in float32, zero where there is nothing."""
    pixels = pixel_pointers(map, batch, first, width, BLOCK_PIXELS)
    return load_map(map, None, pixels, inside, channel, chunk).to(tl.float32)


@triton.jit
def _load_vector(pointer, channels, exists):
    return tl.load(pointer + channels, mask=exists, other=0.0)[None, :]


@triton.jit
def _load_factor(factor_ptr, batch, n_channels, channels, exists):
    """The dropout's factors of one image, 1 where there is no dropout."""
    if factor_ptr is None:
        return 1.0
    else:
        return _load_vector(factor_ptr + batch * n_channels, channels, exists)


@triton.jit
def _gradient_of_normalised(z, grad, factor, relu):
    """g: ``grad`` where the ReLU lets z pass, NaN included."""
    return tl.where((z <= 0.0) & (relu != 0), 0.0, grad * factor)


@triton.jit(do_not_specialize=_SIZES)
def batch_norm_map_kernel(
    y,
    grad,
    norm,
    factor_ptr,
    means_ptr,
    out,
    pixel_groups,
    width,
    split_pixels,
    relu,
    chunk,
    PIXEL_MULTIPLE: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """out = factor · act(z), or the gradient of y where ``grad`` is given.

    Grid: (B · ⌈C / chunk⌉ · ⌈N / split_pixels⌉,). y, grad, out (B, C, H, W) by strides, factor (B, C), means (2, C):
    Σ g / n and Σ g·ŷ / n, None for frozen statistics.
    """
    n_pixels = pixel_groups * PIXEL_MULTIPLE
    batch, channel, split, _ = _own_split(y.channels, n_pixels, split_pixels, chunk, CHANNELS_INNER)
    channels = channel + tl.arange(0, chunk.size)
    exists = channels < y.channels
    mean = _load_vector(norm.mean, channels, exists)
    invstd = _load_vector(norm.invstd, channels, exists)
    scale = invstd * _load_vector(norm.weight, channels, exists)
    bias = _load_vector(norm.bias, channels, exists)
    factor = _load_factor(factor_ptr, batch, y.channels, channels, exists)
    if means_ptr is not None:
        offset = _load_vector(means_ptr, channels, exists)
        slope = _load_vector(means_ptr + y.channels, channels, exists) * invstd

    for block in range(0, split_pixels, BLOCK_PIXELS):
        first = split * split_pixels + block
        inside = first + tl.arange(0, BLOCK_PIXELS) < n_pixels
        centred = _load_block(y, batch, first, inside, width, channel, chunk, BLOCK_PIXELS) - mean
        z = centred * scale + bias
        if grad.pointer is None:
            # Not maximum(z, 0), which turns NaN into 0.
            values = tl.where((z < 0.0) & (relu != 0), 0.0, z) * factor
        else:
            g = _load_block(grad, batch, first, inside, width, channel, chunk, BLOCK_PIXELS)
            g = _gradient_of_normalised(z, g, factor, relu)
            if means_ptr is not None:
                g = g - offset - centred * slope
            values = g * scale
        out_pixels = pixel_pointers(out, batch, first, width, BLOCK_PIXELS)
        store_map(out, values, out_pixels, inside, channel, chunk)


@triton.jit
def _sum_over_pixels(values):
    """Σ over the first dimension: eight at a time, then their sums in float64, of which there are few."""
    groups = tl.reshape(values, (values.shape[0] // 8, 8, values.shape[1]))
    return tl.sum(tl.sum(groups, 1).to(tl.float64), 0).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES)
def batch_norm_sums_kernel(
    y,
    grad,
    norm,
    factor_ptr,
    partial_ptr,
    pixel_groups,
    width,
    split_pixels,
    relu,
    chunk,
    PIXEL_MULTIPLE: tl.constexpr,
    CHANNELS_INNER: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    """Per part Σ g and Σ g·ŷ, or without ``grad`` a shift K, Σ (y − K) and Σ (y − K)².

    Grid: (B · ⌈C / chunk⌉ · ⌈N / split_pixels⌉,). partial (B · splits, 2 or 3, C). K is about the mean of the first
    block: far from zero, nothing is lost when the square of the mean is subtracted.
    """
    n_pixels = pixel_groups * PIXEL_MULTIPLE
    batch, channel, split, n_splits = _own_split(y.channels, n_pixels, split_pixels, chunk, CHANNELS_INNER)
    channels = channel + tl.arange(0, chunk.size)
    exists = channels < y.channels
    ROWS: tl.constexpr = 3 if grad.pointer is None else 2
    partial = partial_ptr + (batch * n_splits + split) * ROWS * y.channels + channels
    if grad.pointer is None:
        shift = _shift_of_block(y, batch, split * split_pixels, n_pixels, width, channel, chunk, BLOCK_PIXELS)
        tl.store(partial, shift, mask=exists)
        partial += y.channels
        mean = shift[None, :]
    else:
        mean = _load_vector(norm.mean, channels, exists)
        invstd = _load_vector(norm.invstd, channels, exists)
        scale = invstd * _load_vector(norm.weight, channels, exists)
        bias = _load_vector(norm.bias, channels, exists)
        factor = _load_factor(factor_ptr, batch, y.channels, channels, exists)

    sums = tl.zeros((BLOCK_PIXELS, chunk.size), tl.float32)
    products = tl.zeros((BLOCK_PIXELS, chunk.size), tl.float32)
    for block in range(0, split_pixels, BLOCK_PIXELS):
        first = split * split_pixels + block
        inside = first + tl.arange(0, BLOCK_PIXELS) < n_pixels
        centred = _load_block(y, batch, first, inside, width, channel, chunk, BLOCK_PIXELS) - mean
        if grad.pointer is None:
            centred = tl.where(inside[:, None], centred, 0.0)
            sums += centred
            products += centred * centred
        else:
            g = _load_block(grad, batch, first, inside, width, channel, chunk, BLOCK_PIXELS)
            g = _gradient_of_normalised(centred * scale + bias, g, factor, relu)
            sums += g
            products += g * (centred * invstd)
    tl.store(partial, _sum_over_pixels(sums), mask=exists)
    tl.store(partial + y.channels, _sum_over_pixels(products), mask=exists)


@triton.jit
def _shift_of_block(y, batch, first, n_pixels, width, channel, chunk, BLOCK_PIXELS: tl.constexpr):
    """About the mean of a block, 0 if that is not finite: an infinite shift would turn an infinite mean into NaN.

    Bits far below the values are cut off: y − K would lose them for every y of a binade alike, an error that does not
    average out.
    """
    inside = first + tl.arange(0, BLOCK_PIXELS) < n_pixels
    values = _load_block(y, batch, first, inside, width, channel, chunk, BLOCK_PIXELS)
    share = 1.0 / tl.minimum(BLOCK_PIXELS, n_pixels - first).to(tl.float32)
    mean = tl.sum(values, 0) * share
    # Keeps multiples of about 2^-11 of the root mean square.
    coarse = tl.sqrt(tl.sum(values * values, 0) * share) * 4096.0
    shift = mean + coarse - coarse
    return tl.where(shift - shift == 0.0, shift, 0.0)


@triton.jit(do_not_specialize=["splits", "n_pixels", "split_pixels", "n_channels", "parts"])
def batch_norm_merge_kernel(
    partial_ptr,
    statistics_ptr,
    parts,
    splits,
    n_pixels,
    split_pixels,
    n_channels,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """statistics (2, C) = mean and biased variance from the parts (parts, 3, C), in float64 and in a fixed order.

    Grid: (⌈C / BLOCK_CHANNELS⌉,).
    """
    channels = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    total = (parts // splits).to(tl.float64) * n_pixels
    sums = tl.zeros((BLOCK_PARTS, BLOCK_CHANNELS), tl.float64)
    for first in range(0, parts, BLOCK_PARTS):
        count, shift, shifted, _ = _load_parts(
            partial_ptr, first, parts, splits, n_pixels, split_pixels, channels, n_channels, BLOCK_PARTS
        )
        sums += count * shift + shifted
    mean = tl.sum(sums, 0) / total
    moments = tl.zeros((BLOCK_PARTS, BLOCK_CHANNELS), tl.float64)
    for first in range(0, parts, BLOCK_PARTS):
        count, shift, shifted, squares = _load_parts(
            partial_ptr, first, parts, splits, n_pixels, split_pixels, channels, n_channels, BLOCK_PARTS
        )
        rest = shifted / tl.maximum(count, 1.0)
        distance = tl.where(count > 0.0, shift + rest - mean[None, :], 0.0)
        moments += squares - shifted * rest + count * distance * distance
    var = tl.sum(moments, 0) / total
    exists = channels < n_channels
    tl.store(statistics_ptr + channels, mean.to(tl.float32), mask=exists)
    tl.store(statistics_ptr + n_channels + channels, tl.where(var < 0.0, 0.0, var).to(tl.float32), mask=exists)


@triton.jit
def _load_parts(
    partial_ptr, first, parts, splits, n_pixels, split_pixels, channels, n_channels, BLOCK_PARTS: tl.constexpr
):
    """Pixels behind each part, its shift and its two sums, in float64; zero where there is no part."""
    part = first + tl.arange(0, BLOCK_PARTS)
    count = tl.minimum(split_pixels, n_pixels - part % splits * split_pixels)
    count = tl.where(part < parts, count, 0).to(tl.float64)[:, None]
    pointers = partial_ptr + part.to(tl.int64)[:, None] * (3 * n_channels) + channels[None, :]
    mask = (part < parts)[:, None] & (channels < n_channels)[None, :]
    shift = tl.load(pointers, mask=mask, other=0.0).to(tl.float64)
    sums = tl.load(pointers + n_channels, mask=mask, other=0.0).to(tl.float64)
    squares = tl.load(pointers + 2 * n_channels, mask=mask, other=0.0).to(tl.float64)
    return count, shift, sums, squares
