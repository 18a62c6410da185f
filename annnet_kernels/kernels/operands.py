"""Maps and tokens as kernel arguments, and how a kernel reads and writes them by strides.

Triton specialises every integer in these tuples on 1 and on divisibility by 16, so a compiled variant depends on
layout and alignment. The size of the image stays outside of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Map(NamedTuple):
    """A (B, C, H, W) tensor. ``row_stride`` is None where one stride leads through all pixels.

    Of a map that is not there every field is None, and kernels ask for its pointer: Triton 3.6 cannot compare a tuple
    that holds a None.
    """

    pointer: Any
    channels: Any
    batch_stride: Any
    channel_stride: Any
    pixel_stride: Any
    row_stride: Any


class Tokens(NamedTuple):
    """A (B, C, T) tensor."""

    pointer: Any
    channels: Any
    count: Any
    batch_stride: Any
    channel_stride: Any
    token_stride: Any


class Strides(NamedTuple):
    """Strides of a (B, C, H, W) or (B, H, W) tensor that no compiled variant depends on: each is made by ``run_time``.

    A stride that a loop needs is an argument of its own too, named in ``do_not_specialize``: what ``integer`` makes of
    it would be held in registers throughout (gradient of a normed map in bfloat16, sm_90: 135 against 128).
    """

    batch: Any
    channel: Any
    row: Any
    column: Any


class Strided(NamedTuple):
    """A tensor by its strides; of one that is not there ``pointer`` is None."""

    pointer: Any
    strides: Any


class TokenStrides(NamedTuple):
    """Strides of a (B, C, T) tensor, likewise. ``token_major``, constexpr: the channels of a token are side by side."""

    batch: Any
    channel: Any
    token: Any
    token_major: Any


class Chunk(NamedTuple):
    """How channels are walked, constexpr: ``size`` at a time, ``masked`` where that does not divide their count."""

    size: Any
    masked: Any


def map_argument(x: Tensor | None) -> Map:
    """``x`` as a kernel argument."""
    if x is None:
        return Map(*(None,) * len(Map._fields))
    batch, channel, row, column = x.stride()
    channels, height, width = x.shape[1:]
    if height == 1 or row == width * column:
        return Map(x, channels, batch, channel, column, None)
    if width == 1:
        return Map(x, channels, batch, channel, row, None)
    return Map(x, channels, batch, channel, column, row)


def tokens_argument(x: Tensor) -> Tokens:
    """``x`` as a kernel argument."""
    return Tokens(x, *x.shape[1:], *x.stride())


_OFFSET = 2**40
_BEYOND_32_BITS = tl.constexpr(_OFFSET)


def run_time(value: int) -> int:
    """``value`` as part of a tuple, so that no compiled variant depends on it; kernels take it back by ``integer``.

    Triton specialises whole numbers inside of a tuple on 1, on divisibility by 16 and on whether they fit 32 bits, even
    if ``do_not_specialize`` names the tuple. An odd number beyond 32 bits is the same to it whatever the value.
    """
    return 2 * (value + _OFFSET) + 1


@triton.jit
def integer(value):
    """What ``run_time`` was given, 64-bit."""
    return (value >> 1) - _BEYOND_32_BITS


def strides_argument(x: Tensor | None) -> Strides:
    """Strides of a map; zeros where there is none."""
    batch, *channel, row, column = (0, 0, 0) if x is None else x.stride()
    return Strides(*map(run_time, (batch, *(channel or [0]), row, column)))


def strided_argument(x: Tensor | None) -> Strided:
    """``x`` as a kernel argument."""
    return Strided(x, strides_argument(x))


def token_strides_argument(x: Tensor | None, token_major: bool) -> TokenStrides:
    """Strides of tokens; zeros where there are none."""
    batch, channel, token = (0, 0, 0) if x is None else x.stride()
    return TokenStrides(run_time(batch), run_time(channel), run_time(token), tl.constexpr(token_major))


def chunk_argument(channels: int, size: int) -> Chunk:
    """``channels`` walked ``size`` at a time."""
    return Chunk(tl.constexpr(size), tl.constexpr(channels % size != 0))


def pixel_multiple(pixels: int, maps: Sequence[Map]) -> int:
    """16 where the count of pixels is a multiple of it and a map has its pixels side by side, else 1.

    Only there does the count decide whether a masked load can be a vector.
    """
    side_by_side = any(m.pixel_stride == 1 for m in maps)
    return 16 if side_by_side and pixels % 16 == 0 else 1


# Offsets are 64-bit throughout: 32-bit ones within a tile cost registers instead of saving them (forward, bfloat16,
# sm_90: 128 against 113), since the compiler cannot fold their extension.


@triton.jit
def pixel_pointers(map, batch, first, width, BLOCK_PIXELS: tl.constexpr):
    """Pointers (BLOCK_PIXELS,) to the first channel of consecutive pixels of one image."""
    pixels = first + tl.arange(0, BLOCK_PIXELS)
    image = map.pointer + batch * map.batch_stride
    if map.row_stride is None:
        return image + pixels.to(tl.int64) * map.pixel_stride
    else:
        rows, columns = pixels // width, pixels % width
        return image + rows.to(tl.int64) * map.row_stride + columns.to(tl.int64) * map.pixel_stride


@triton.jit
def _map_tile(map, pixels, inside, first, chunk):
    """Pointers and mask (pixels, chunk) of a map from channel ``first`` on."""
    channels = first + tl.arange(0, chunk.size)
    mask = inside[:, None]
    if chunk.masked:
        mask = mask & (channels < map.channels)[None, :]
    return pixels[:, None] + (channels.to(tl.int64) * map.channel_stride)[None, :], mask


@triton.jit
def load_norm(norm_ptr, n_channels, channels, AXIS: tl.constexpr):
    """Mean, invstd, weight and bias of these channels from a table (4, C), with a dimension inserted at ``AXIS``."""
    exists = channels < n_channels
    mean = tl.load(norm_ptr + channels, mask=exists, other=0.0)
    invstd = tl.load(norm_ptr + n_channels + channels, mask=exists, other=0.0)
    weight = tl.load(norm_ptr + 2 * n_channels + channels, mask=exists, other=0.0)
    bias = tl.load(norm_ptr + 3 * n_channels + channels, mask=exists, other=0.0)
    return (
        tl.expand_dims(mean, AXIS), tl.expand_dims(invstd, AXIS), tl.expand_dims(weight, AXIS),
        tl.expand_dims(bias, AXIS),
    )  # fmt: skip


@triton.jit
def rectified(values, mean, invstd, weight, bias):
    """relu((y − mean) · invstd · weight + bias) in float32; a NaN stays NaN (maximum(z, 0) would drop it)."""
    normal = (values.to(tl.float32) - mean) * invstd * weight + bias
    return tl.where(normal <= 0.0, 0.0, normal)


@triton.jit
def load_map(map, norm, pixels, inside, first, chunk):
    """(pixels, chunk) from channel ``first`` on, zero outside; with ``norm``, a table (4, C), relu(bn) of them.

    ``pixels`` are the map's pixel pointers, ``inside`` says which of them exist.
    """
    pointers, mask = _map_tile(map, pixels, inside, first, chunk)
    values = tl.load(pointers, mask=mask, other=0.0)
    if norm is not None:
        channels = first + tl.arange(0, chunk.size)
        mean, invstd, weight, bias = load_norm(norm, map.channels, channels, 0)
        values = rectified(values, mean, invstd, weight, bias).to(values.dtype)
    return values


@triton.jit
def store_map(map, values, pixels, inside, first, chunk):
    """Write (pixels, chunk) values in the dtype of the map."""
    pointers, mask = _map_tile(map, pixels, inside, first, chunk)
    tl.store(pointers, values.to(map.pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_tokens(tokens, batch, first_token, first, chunk, BLOCK_TOKENS: tl.constexpr):
    """(BLOCK_TOKENS, chunk) of the tokens of one image, zero beyond the last token and channel."""
    rows = first_token + tl.arange(0, BLOCK_TOKENS)
    channels = first + tl.arange(0, chunk.size)
    mask = (rows < tokens.count)[:, None]
    if chunk.masked:
        mask = mask & (channels < tokens.channels)[None, :]
    row_offsets = rows.to(tl.int64) * tokens.token_stride
    channel_offsets = channels.to(tl.int64) * tokens.channel_stride
    image = tokens.pointer + batch * tokens.batch_stride
    return tl.load(image + row_offsets[:, None] + channel_offsets[None, :], mask=mask, other=0.0)
