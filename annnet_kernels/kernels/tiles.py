"""The only place that chooses tiles, warps and stages: pure functions of dimensions, dtype and architecture.

The compile table (``python -m tools.compile_table``) holds every row to: no spills, tensor-core instructions in 16-bit
products, and the shared memory of the architecture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Attention

_ALL_REGISTERS = 255
"""Left to itself, ptxas holds some kernels to 80 or 128 registers and spills a few values beyond: float32, normalised
queries, and token gradients."""


@dataclass(frozen=True)
class AttentionTile:
    """One program's block: ``pixels`` × ``tokens`` logits, channels walked ``chunk`` at a time.

    ``skip_stages``: of the forward's loop over value channels where it copies the skip map ahead, else None.
    """

    pixels: int
    tokens: int
    key_chunk: int
    value_chunk: int
    warps: int
    stages: int
    max_registers: int | None
    skip_stages: int | None


def attention_tile(
    key_channels: int,
    value_channels: int,
    tokens: int,
    dtype: torch.dtype,
    precision: str,
    backward: bool,
    normalised: bool,
    nchw: bool,
    strided: bool,
    token_major: bool,
    capability: tuple[int, int],
    shared_memory: int,
) -> AttentionTile:
    """Tile of the kernels that own a block of pixels.

    Args:
        precision: ``"tf32"`` or ``"ieee"``; the latter keeps float32 away from tensor cores.
        backward: whether logits and their gradients are held at once.
        normalised: whether queries are normalised as they are loaded.
        nchw: whether the channels of a map are no neighbours.
        strided: whether a map needs two strides to walk its pixels.
        token_major: whether the channels of a key and of a value are neighbours.
        shared_memory: bytes that one block may use.
    """
    # More than 128 tokens are walked in blocks; 64 spare the small pyramids half of the padding.
    block_tokens = 64 if tokens <= 64 else 128
    several_blocks = tokens > block_tokens
    # Beside the logits, the forward of one block of tokens holds next to nothing.
    heavy = backward or several_blocks
    warp_level = capability[0] not in (9, 10)
    warps, registers = 8, None
    if dtype.itemsize == 2:
        # 128 pixels × 128 tokens fill 64 registers per thread with logits; chunks of 256 spill. A third stage hides
        # more latency where there is memory for it.
        widest_key, widest_value, pixels, stages = 64, 64, 128, 3 if shared_memory > 128 * 1024 else 2
        # Hopper's matrix instructions read shared memory: registers are left for twice the pixels, unless channels that
        # no 16-byte load fits, two strides, or normalised queries in a loop over tokens pass through them.
        through_registers = key_channels % 8 or value_channels % 8 or strided or (normalised and several_blocks)
        if heavy and (capability[0] != 9 or through_registers):
            pixels = 64
        elif capability[0] == 9 and token_major and not several_blocks and not through_registers:
            # Two programs per multiprocessor: one computes while the other waits for memory. Logits and their gradients
            # of 64 pixels fill the registers of 4 warps; normalised queries leave the forward 128 registers per thread
            # if they come in short chunks.
            if backward:
                pixels, warps, registers = 64, 4, _ALL_REGISTERS
            elif normalised and not nchw:
                widest_key, registers = 32, 128
        if backward and through_registers and warp_level and not several_blocks:
            registers = _ALL_REGISTERS
        # Half a chunk of queries less in registers makes 180 of 255 and a spill (sm_120).
        if (warp_level or strided) and (normalised or several_blocks):
            widest_key = 32
            if not backward:
                registers = _ALL_REGISTERS
            elif not several_blocks:
                widest_value, registers = 32, _ALL_REGISTERS
        # Without these Triton spills a few values (sm_100).
        if capability[0] == 10 and backward and nchw and not several_blocks:
            widest_key = 32
        if capability[0] == 10 and nchw and not heavy:
            widest_value = 32
        if capability[0] == 10 and ((several_blocks and backward != normalised) or (strided and backward)):
            registers = _ALL_REGISTERS
    elif precision == "tf32":
        widest_key, widest_value, pixels, stages = 32, 32, 64 if heavy or strided else 128, 2
        if not heavy:
            registers = _ALL_REGISTERS
        elif capability[0] != 9:
            # Wider chunks or twice the pixels spill a few values with any limit of registers (sm_86, sm_120).
            widest_key, widest_value, pixels, registers = 16, 16, 32, _ALL_REGISTERS
    else:
        # Without tensor cores a product is unrolled into fused multiply-adds: short chunks keep the operands few.
        widest_key, widest_value, pixels, stages = 16, 16, 32 if heavy else 64, 2
        if heavy and strided:
            pixels = 16
        registers = _ALL_REGISTERS
    key_chunk, value_chunk = channel_chunk(key_channels, widest_key), channel_chunk(value_channels, widest_value)
    # Maps whose channels are no neighbours are not copied in 16 bytes, and spill with what is kept ahead (sm_100).
    ahead = dtype.itemsize == 2 and not heavy and not nchw
    return AttentionTile(
        pixels, block_tokens, key_chunk, value_chunk, warps, stages, registers, stages if ahead else None
    )


def channel_chunk(channels: int, widest: int) -> int:
    """Channels walked at a time: ``widest``, or less where that would leave half of the last chunk empty."""
    if channels <= 16:
        return 16
    chunk = widest
    while chunk > 32 and -channels % chunk >= chunk // 2:
        chunk //= 2
    return chunk


@dataclass(frozen=True)
class TokenGradientTile:
    """One program's block of a token gradient: ``tokens`` × ``chunk`` sums over ``pixels`` at a time.

    ``per_multiprocessor`` programs run at a time on one multiprocessor.
    """

    pixels: int
    tokens: int
    chunk: int
    warps: int
    stages: int
    max_registers: int | None
    per_multiprocessor: int


def token_gradient_tile(
    channels: int, tokens: int, dtype: torch.dtype, precision: str, normalised: bool, shared_memory: int
) -> TokenGradientTile:
    """Tile of the product that sums over pixels; a ``normalised`` map passes through registers."""
    block_tokens = 64 if tokens <= 64 else 128
    if dtype.itemsize == 2:
        # A column chunk of 128 reads the probabilities once per 128 channels; 64 pixels × 3 stages are 96 KiB.
        chunk = channel_chunk(channels, 64 if normalised else 128)
        stages = 3 if shared_memory > 128 * 1024 else 2
        # About 120 registers per thread: where there is memory for two programs, both fit.
        fitting = 2 if shared_memory >= 2 * 96 * 1024 else 1
        return TokenGradientTile(64, block_tokens, chunk, 8, stages, _ALL_REGISTERS, fitting)
    chunk = channel_chunk(channels, 64)
    return TokenGradientTile(32 if precision == "tf32" else 16, block_tokens, chunk, 8, 2, _ALL_REGISTERS, 1)


def pixel_splits(pixels: int, programs: int, at_once: int, block_pixels: int) -> int:
    """Into how many parts a sum over pixels is split, so that ``programs`` per part give one wave of ``at_once``.

    A part has at least four blocks: its partial sums are written and read once more.
    """
    return max(1, min(at_once // programs, pixels // (4 * block_pixels)))


# Pooling


@dataclass(frozen=True)
class PoolTile:
    """One program's block: ``channels`` × ``columns`` of a map, walked down the rows."""

    channels: int
    columns: int
    warps: int
    stages: int
    rows_ahead: int
    max_registers: int


def pool_tile(inner: str, vector: int, dtype: torch.dtype, light: bool) -> PoolTile:
    """Tile of the kernels that walk down a map.

    Args:
        inner: the dimension that lies side by side in memory: ``"channels"``, ``"columns"`` or ``"none"``.
        vector: elements that one load may take, 1 where the layout is not aligned.
        light: whether the kernel keeps nothing per channel beside the accumulators of the levels.
    """
    if vector > 1:
        # Asynchronous copies into four spare rows of shared memory keep about 32 KiB per multiprocessor under way.
        # 64 channels are 128 bytes in 16 bits; with more than 8 elements per thread the accumulators leave room for
        # one program per multiprocessor only.
        wide = dtype.itemsize == 2 and (light or inner == "columns")
        channels, columns = (64, 32 if wide else 16) if inner == "channels" else (32, 64 if wide else 32)
        warps = 8 if wide else 4
    else:
        channels, columns = (64, 16) if inner == "channels" else (16, 64)
        warps = 8
    # Asynchronous copies take at least 4 bytes: 16-bit elements at odd offsets are loaded ahead into registers.
    stages, rows_ahead = (1, 4) if vector == 1 and dtype.itemsize == 2 else (5, 0)
    # Left to itself, ptxas holds some of these kernels to 64 or 80 registers and spills the rest (sm_80, sm_120).
    return PoolTile(channels, columns, warps, stages, rows_ahead, 128 if light else 224)


def pool_tile_columns(width: int, columns: int, multiple: int) -> int:
    """Columns per tile, as even as ``multiple`` allows."""
    tiles = -(-width // columns)
    return -(-width // (tiles * multiple)) * multiple


def pool_cut_cost(height: int, width: int, heights: Sequence[int], columns: int, dtype: torch.dtype) -> float:
    """Bytes of the partial sums on the cuts between tiles of columns, over those of the map.

    A cut crosses one column bin per level, and each of its tokens becomes two partial sums in float32.
    """
    cuts = -(-width // columns) - 1
    return 8 * sum(heights) * cuts / (height * width * dtype.itemsize)


def pool_split_rows(height: int, programs: int, multiprocessors: int, least: int) -> int:
    """Rows per split: at least ``least``, and so few that ``programs`` per split give every multiprocessor eight.

    Two to four run at a time; the rest evens out the load.
    """
    splits = max(1, -(-8 * multiprocessors // programs))
    return min(height, max(least, -(-height // splits)))


def least_pool_rows(width: int, widths: Sequence[int], dtype: torch.dtype) -> int:
    """Rows of a forward split below which its cut costs more than 5 % of the reading of the map.

    A cut crosses one row bin per level and gives each of its tokens one more partial sum, written and read in float32.
    """
    return max(8, -(-160 * sum(widths) // (width * dtype.itemsize)))


# Normalising tail

NORM_MAP_BLOCKS = 4
"""Blocks of pixels per program of a kernel that writes a map: the vectors of its channels are read once for them."""


@dataclass(frozen=True)
class NormTile:
    """One program's block: ``pixels`` × ``channels`` of a map."""

    pixels: int
    channels: int
    warps: int
    stages: int
    max_registers: int


def norm_tile(channels_inner: bool, channels: int) -> NormTile:
    """Tile of the kernels that walk a map once; pixels lie side by side in memory unless channels do."""
    # 16 elements per thread: two 16-byte loads under way per map in 16 bits, four in float32. Side by side lie at
    # least 128 bytes of channels, or 1 KiB of pixels.
    chunk = channel_chunk(channels, 64) if channels_inner else 4
    # Left to itself, ptxas holds some of these kernels to 72 or 96 registers and spills the rest (sm_90).
    return NormTile(2048 // chunk, chunk, warps=4, stages=2, max_registers=128)


def norm_split_pixels(pixels: int, programs: int, multiprocessors: int, block_pixels: int) -> int:
    """Pixels of a part of a sum, whole blocks: eight programs per multiprocessor, at least eight blocks each."""
    splits = max(1, min(-(-8 * multiprocessors // programs), pixels // (8 * block_pixels)))
    return -(-pixels // (splits * block_pixels)) * block_pixels
