"""Triton kernels of norms and the normalising tail: moments, tables, forward, sums and gradient.

B batch, C channels, N pixels. A norm is a table (4, C): mean, invstd, weight, bias. A program owns a chunk of the
channels of one image and a split of its pixels, which it walks in blocks. The vectors of its channels are read once.
Parts are summed by a second kernel in a fixed order, without atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .operands import load_map, load_norm, pixel_pointers, store_map

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
    norm_ptr,
    factor_ptr,
    sums_ptr,
    per_value,
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

    Grid: (B · ⌈C / chunk⌉ · ⌈N / split_pixels⌉,). y, grad, out (B, C, H, W) by strides, norm (4, C), factor (B, C),
    sums (2, C): Σ g and Σ g·ŷ, None for frozen statistics; per_value: 1 / n.
    """
    n_pixels = pixel_groups * PIXEL_MULTIPLE
    batch, channel, split, _ = _own_split(y.channels, n_pixels, split_pixels, chunk, CHANNELS_INNER)
    channels = channel + tl.arange(0, chunk.size)
    exists = channels < y.channels
    mean, invstd, weight, bias = load_norm(norm_ptr, y.channels, channels, 0)
    scale = invstd * weight
    factor = _load_factor(factor_ptr, batch, y.channels, channels, exists)
    if sums_ptr is not None:
        offset = _load_vector(sums_ptr, channels, exists) * per_value
        slope = _load_vector(sums_ptr + y.channels, channels, exists) * per_value * invstd

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
            if sums_ptr is not None:
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
    norm_ptr,
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
        mean, invstd, weight, bias = load_norm(norm_ptr, y.channels, channels, 0)
        scale = invstd * weight
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


@triton.jit(do_not_specialize=["splits", "n_pixels", "split_pixels", "n_channels", "parts", "calls"])
def batch_norm_merge_kernel(
    partial_ptr,
    moments_ptr,
    update,
    parts,
    splits,
    n_pixels,
    split_pixels,
    n_channels,
    eps,
    momentum,
    calls,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """Merge parts (parts, 3, C), in float64 and in a fixed order, into moments (3, C), or into a norm.

    Grid: (programs,); a program takes every ``programs``-th block of channels.
    """
    total = (parts // splits).to(tl.float64) * n_pixels
    for first_channel in range(tl.program_id(0) * BLOCK_CHANNELS, n_channels, tl.num_programs(0) * BLOCK_CHANNELS):
        channels = first_channel + tl.arange(0, BLOCK_CHANNELS)
        sums = tl.zeros((BLOCK_PARTS, BLOCK_CHANNELS), tl.float64)
        for first in range(0, parts, BLOCK_PARTS):
            count, shift, shifted, _ = _load_parts(
                partial_ptr, first, parts, splits, n_pixels, split_pixels, channels, n_channels, BLOCK_PARTS
            )
            sums += count * shift + shifted
        mean = tl.sum(sums, 0) / total
        squares = tl.zeros((BLOCK_PARTS, BLOCK_CHANNELS), tl.float64)
        for first in range(0, parts, BLOCK_PARTS):
            count, shift, shifted, part_squares = _load_parts(
                partial_ptr, first, parts, splits, n_pixels, split_pixels, channels, n_channels, BLOCK_PARTS
            )
            rest = shifted / tl.maximum(count, 1.0)
            distance = tl.where(count > 0.0, shift + rest - mean[None, :], 0.0)
            squares += part_squares - shifted * rest + count * distance * distance
        deviation = tl.sum(squares, 0)
        deviation = tl.where(deviation < 0.0, 0.0, deviation)
        if moments_ptr is not None:
            exists = channels < n_channels
            tl.store(moments_ptr + channels, tl.zeros_like(mean) + total, mask=exists)
            tl.store(moments_ptr + n_channels + channels, mean, mask=exists)
            tl.store(moments_ptr + 2 * n_channels + channels, deviation, mask=exists)
        else:
            _update_norm(update, total, mean, deviation, channels, n_channels, eps, momentum, calls)
    if moments_ptr is None:
        _update_count(update, calls)


@triton.jit(do_not_specialize=["n_channels", "calls"])
def batch_norm_update_kernel(moments_ptr, update, n_channels, eps, momentum, calls, BLOCK_CHANNELS: tl.constexpr):
    """The norm of given moments (3, C). Grid: (programs,); a program takes every ``programs``-th block of channels."""
    for first_channel in range(tl.program_id(0) * BLOCK_CHANNELS, n_channels, tl.num_programs(0) * BLOCK_CHANNELS):
        channels = first_channel + tl.arange(0, BLOCK_CHANNELS)
        exists = channels < n_channels
        count = tl.load(moments_ptr + channels, mask=exists, other=1.0)
        mean = tl.load(moments_ptr + n_channels + channels, mask=exists, other=0.0)
        deviation = tl.load(moments_ptr + 2 * n_channels + channels, mask=exists, other=0.0)
        _update_norm(update, count, mean, deviation, channels, n_channels, eps, momentum, calls)
    _update_count(update, calls)


@triton.jit(do_not_specialize=["n_channels"])
def batch_norm_table_kernel(
    mean_ptr, var_ptr, weight_ptr, bias_ptr, conv_bias_ptr, table_ptr, n_channels, eps, BLOCK_CHANNELS: tl.constexpr
):
    """The table (4, C) of given statistics (C), for a map without its bias. Grid: (⌈C / BLOCK_CHANNELS⌉,)."""
    channels = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    exists = channels < n_channels
    mean = tl.load(mean_ptr + channels, mask=exists, other=0.0).to(tl.float32)
    if conv_bias_ptr is not None:
        mean -= tl.load(conv_bias_ptr + channels, mask=exists, other=0.0).to(tl.float32)
    var = tl.load(var_ptr + channels, mask=exists, other=1.0)
    _store_table(table_ptr, mean, var, weight_ptr, bias_ptr, channels, n_channels, eps)


@triton.jit
def _store_table(table_ptr, mean, var, weight_ptr, bias_ptr, channels, n_channels, eps):
    """Mean, invstd, weight (1 where there is none) and bias (0 where there is none) of these channels."""
    exists = channels < n_channels
    invstd = 1.0 / tl.sqrt(var.to(tl.float64) + eps)
    tl.store(table_ptr + channels, mean.to(tl.float32), mask=exists)
    tl.store(table_ptr + n_channels + channels, invstd.to(tl.float32), mask=exists)
    if weight_ptr is None:
        weight = tl.full(channels.shape, 1.0, tl.float32)
    else:
        weight = tl.load(weight_ptr + channels, mask=exists, other=0.0).to(tl.float32)
    tl.store(table_ptr + 2 * n_channels + channels, weight, mask=exists)
    if bias_ptr is None:
        bias = tl.zeros(channels.shape, tl.float32)
    else:
        bias = tl.load(bias_ptr + channels, mask=exists, other=0.0).to(tl.float32)
    tl.store(table_ptr + 3 * n_channels + channels, bias, mask=exists)


@triton.jit
def _update_norm(update, count, mean, deviation, channels, n_channels, eps, momentum, calls):
    """Store the table of these channels and what ``calls`` calls of the norm make of their running statistics."""
    var = deviation / tl.maximum(count, 1.0)
    _store_table(update.table, mean, var, update.weight, update.bias, channels, n_channels, eps)
    exists = channels < n_channels
    if update.running_mean is not None:
        batch_mean = mean
        if update.conv_bias is not None:
            batch_mean += tl.load(update.conv_bias + channels, mask=exists, other=0.0).to(tl.float64)
        _update_running(update.running_mean, batch_mean, count, update.count, channels, exists, momentum, calls)
    if update.running_var is not None:
        unbiased = deviation / (count - 1.0)
        _update_running(update.running_var, unbiased, count, update.count, channels, exists, momentum, calls)


@triton.jit
def _update_running(running_ptr, statistic, values, count_ptr, channels, exists, momentum, calls):
    """What ``calls`` calls make of running statistics; a map without values moves nothing."""
    running = tl.load(running_ptr + channels, mask=exists, other=0.0).to(tl.float64)
    for call in range(calls):
        if momentum is None:  # noqa: SIM108 Triton compiles both operands of a conditional expression
            factor = 1.0 / (tl.load(count_ptr) + call + 1).to(tl.float64)
        else:
            factor = momentum
        running = tl.where(values > 0.0, running + (statistic - running) * factor, running)
    tl.store(running_ptr + channels, running.to(running_ptr.dtype.element_ty), mask=exists)


@triton.jit
def _update_count(update, calls):
    """One program counts; where the others would read the count, there are none."""
    if update.count is not None:  # noqa: SIM102 Triton compiles both operands of "and"
        if tl.program_id(0) == 0:
            tl.store(update.count, tl.load(update.count) + calls)


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
