"""The only place that chooses tiles, warps and stages: pure functions of dimensions, dtype and architecture.

The compile table (``python -m tools.compile_table``) holds every row to: no spills, tensor-core instructions in 16-bit
products, and the shared memory of the architecture.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


@dataclass(frozen=True)
class AttentionCase:
    """What the tile of a kernel that owns a block of pixels depends on.

    ``precision``: ``"tf32"`` or ``"ieee"``; the latter keeps float32 away from tensor cores.
    ``backward``: whether logits and their gradients are held at once.
    ``normalised``: whether queries are normalised as they are loaded.
    ``nchw``: whether the channels of a map are no neighbours.
    ``strided``: whether a map needs two strides to walk its pixels.
    ``token_major``: whether the channels of a key and of a value are neighbours.
    ``shared_memory``: bytes that one block may use.
    """

    key_channels: int
    value_channels: int
    tokens: int
    dtype: torch.dtype
    precision: str
    backward: bool
    normalised: bool
    nchw: bool
    strided: bool
    token_major: bool
    capability: tuple[int, int]
    shared_memory: int

    @property
    def block_tokens(self) -> int:
        """More than 128 tokens are walked in blocks; 64 spare the small pyramids half of the padding."""
        return 64 if self.tokens <= 64 else 128

    @property
    def several_blocks(self) -> bool:
        """Whether the tokens are walked in blocks."""
        return self.tokens > self.block_tokens

    @property
    def heavy(self) -> bool:
        """Beside the logits, the forward of one block of tokens holds next to nothing; all else holds more."""
        return self.backward or self.several_blocks

    @property
    def family(self) -> int:
        """9 is Hopper, 10 Blackwell's data centre: their matrix instructions read shared memory."""
        return self.capability[0]

    @property
    def through_registers(self) -> bool:
        """Whether channels that no 16-byte load fits, two strides, or queries in a loop over tokens pass registers."""
        odd = self.key_channels % 8 != 0 or self.value_channels % 8 != 0
        return odd or self.strided or (self.normalised and self.several_blocks)

    @property
    def two_programs(self) -> bool:
        """Whether two programs share a multiprocessor of Hopper: one computes while the other waits for memory."""
        return self.family == 9 and self.token_major and not (self.several_blocks or self.through_registers)

    @property
    def by_warps(self) -> bool:
        """Whether the operands of matrix instructions are registers of a warp."""
        return self.family not in (9, 10)


class Rule(NamedTuple):
    """What a kernel gets in some cases; of two rules that name a setting, the later holds."""

    when: Callable[[AttentionCase], bool]
    why: str
    pixels: int | None = None
    key_chunk: int | None = None
    value_chunk: int | None = None
    warps: int | None = None
    registers: int | None = None


_16_BITS = (
    Rule(lambda _: True, "128 × 128 logits fill 64 registers per thread; chunks of 256 spill", 128, 64, 64, 8),
    Rule(
        lambda c: c.heavy and (c.family != 9 or c.through_registers),
        "operands in registers leave room for half the pixels; Hopper's lie in shared memory",
        pixels=64,
    ),
    Rule(
        lambda c: c.two_programs and c.backward,
        "logits and their gradients of 64 pixels fill the registers of 4 warps: two programs fit",
        pixels=64,
        warps=4,
        registers=_ALL_REGISTERS,
    ),
    Rule(
        lambda c: c.two_programs and not c.backward and c.normalised and not c.nchw,
        "normalised queries leave 128 registers per thread if they come in short chunks: two programs fit",
        key_chunk=32,
        registers=128,
    ),
    Rule(
        lambda c: c.backward and c.through_registers and c.by_warps and not c.several_blocks,
        "ptxas would stop early and spill",
        registers=_ALL_REGISTERS,
    ),
    Rule(
        lambda c: (c.by_warps or c.strided) and (c.normalised or c.several_blocks),
        "half a chunk of queries less in registers makes 180 of 255 and a spill (sm_120)",
        key_chunk=32,
    ),
    Rule(
        lambda c: (c.by_warps or c.strided) and (c.normalised or c.several_blocks) and not c.backward,
        "the same, with what the forward may use",
        registers=_ALL_REGISTERS,
    ),
    Rule(
        lambda c: (c.by_warps or c.strided) and c.normalised and c.backward and not c.several_blocks,
        "the same, and half a chunk of values",
        value_chunk=32,
        registers=_ALL_REGISTERS,
    ),
    Rule(
        lambda c: c.family == 10 and c.nchw and c.backward and not c.several_blocks,
        "Triton spills a few values (sm_100)",
        key_chunk=32,
    ),
    Rule(lambda c: c.family == 10 and c.nchw and not c.heavy, "Triton spills a few values (sm_100)", value_chunk=32),
    Rule(
        lambda c: c.family == 10 and ((c.several_blocks and c.backward != c.normalised) or (c.strided and c.backward)),
        "Triton spills a few values (sm_100)",
        registers=_ALL_REGISTERS,
    ),
)
_TF32 = (
    Rule(lambda _: True, "operands of four bytes: half the chunks of 16 bits", 128, 32, 32, 8),
    Rule(lambda c: c.heavy or c.strided, "logits and their gradients, or pointers, take the registers", pixels=64),
    Rule(lambda c: not c.heavy, "ptxas would stop early and spill", registers=_ALL_REGISTERS),
    Rule(
        lambda c: c.heavy and c.family != 9,
        "wider chunks or twice the pixels spill a few values with any limit (sm_86, sm_120)",
        pixels=32,
        key_chunk=16,
        value_chunk=16,
        registers=_ALL_REGISTERS,
    ),
)
_FLOAT32 = (
    Rule(
        lambda _: True,
        "without tensor cores a product is unrolled into fused multiply-adds: short chunks keep the operands few",
        64,
        16,
        16,
        8,
        _ALL_REGISTERS,
    ),
    Rule(lambda c: c.heavy, "logits and their gradients", pixels=32),
    Rule(lambda c: c.heavy and c.strided, "and pointers of each pixel", pixels=16),
)


def attention_tile(case: AttentionCase) -> AttentionTile:
    """Tile of the kernels that own a block of pixels."""
    is_16_bits = case.dtype.itemsize == 2
    settings: dict[str, int] = {}
    for rule in _16_BITS if is_16_bits else _TF32 if case.precision == "tf32" else _FLOAT32:
        if rule.when(case):
            named = zip(Rule._fields[2:], rule[2:], strict=True)
            settings |= {name: value for name, value in named if value is not None}
    # A third stage hides more latency where there is memory for it.
    stages = 3 if is_16_bits and case.shared_memory > 128 * 1024 else 2
    # Maps whose channels are no neighbours are not copied in 16 bytes, and spill with what is kept ahead (sm_100).
    ahead = is_16_bits and not case.heavy and not case.nchw
    return AttentionTile(
        settings["pixels"],
        case.block_tokens,
        channel_chunk(case.key_channels, settings["key_chunk"]),
        channel_chunk(case.value_channels, settings["value_chunk"]),
        settings["warps"],
        stages,
        settings.get("registers"),
        stages if ahead else None,
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
