"""The only place that chooses tiles, warps and stages: pure functions of dimensions, dtype and architecture.

The compile table (``python -m benchmarks.codegen``) holds every row to: no spills, tensor-core instructions in 16-bit
products, and the shared memory of the architecture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Attention


@dataclass(frozen=True)
class AttentionTile:
    """One program's block: ``pixels`` × ``tokens`` logits, channels walked ``chunk`` at a time."""

    pixels: int
    tokens: int
    key_chunk: int
    value_chunk: int
    warps: int
    stages: int


def attention_tile(
    key_channels: int,
    value_channels: int,
    tokens: int,
    dtype: torch.dtype,
    precision: str,
    shared_memory: int,
) -> AttentionTile:
    """Tile of the kernels that own a block of pixels.

    Args:
        precision: ``"tf32"`` or ``"ieee"``; the latter keeps float32 away from tensor cores.
        shared_memory: bytes that one block may use.
    """
    # More than 128 tokens are walked in blocks; 64 spare the small pyramids half of the padding.
    block_tokens = 64 if tokens <= 64 else 128
    if dtype.itemsize == 2:
        # 128 pixels × 128 tokens fill 64 registers per thread with logits; chunks of 256 spill. A third stage hides
        # more latency where there is memory for it.
        widest, pixels, stages = 64, 128, 3 if shared_memory > 128 * 1024 else 2
    elif precision == "tf32":
        widest, pixels, stages = 32, 128, 2
    else:
        # Without tensor cores a product is unrolled into fused multiply-adds: short chunks keep the operands few.
        widest, pixels, stages = 16, 64, 2
    return AttentionTile(
        pixels, block_tokens, channel_chunk(key_channels, widest), channel_chunk(value_channels, widest), 8, stages
    )


def channel_chunk(channels: int, widest: int) -> int:
    """The widest power of two, at least 16, that leaves less than half of a chunk of padding behind ``channels``."""
    chunk = widest
    while chunk > 16 and -channels % chunk >= chunk // 2:
        chunk //= 2
    return chunk


@dataclass(frozen=True)
class TokenGradientTile:
    """One program's block of a token gradient: ``tokens`` × ``chunk`` sums over ``pixels`` at a time."""

    pixels: int
    tokens: int
    chunk: int
    warps: int
    stages: int


def token_gradient_tile(
    channels: int, tokens: int, dtype: torch.dtype, precision: str, shared_memory: int
) -> TokenGradientTile:
    """Tile of the product that sums over pixels."""
    block_tokens = 64 if tokens <= 64 else 128
    if dtype.itemsize == 2:
        # A column chunk of 128 reads the probabilities once per 128 channels; 64 pixels × 3 stages are 96 KiB.
        return TokenGradientTile(
            64, block_tokens, channel_chunk(channels, 128), 8, 3 if shared_memory > 128 * 1024 else 2
        )
    if precision == "tf32":
        return TokenGradientTile(32, block_tokens, channel_chunk(channels, 64), 8, 2)
    return TokenGradientTile(16, block_tokens, channel_chunk(channels, 64), 8, 2)


def pixel_splits(pixels: int, programs: int, multiprocessors: int, block_pixels: int) -> int:
    """Into how many parts a sum over pixels is split, so that ``programs`` per part give one wave.

    A part has at least four blocks: its partial sums are written and read once more.
    """
    return max(1, min(multiprocessors // programs, pixels // (4 * block_pixels)))
