"""Launches of the attention kernels: which kernels serve a call, with which tiles, through which scratch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..layouts import empty_map, empty_tokens, is_channels_last
from .attention_kernels import (
    asymmetric_attention_bwd_pixels_kernel,
    asymmetric_attention_bwd_query_kernel,
    asymmetric_attention_bwd_tokens_kernel,
    asymmetric_attention_fwd_kernel,
    asymmetric_attention_sum_splits_kernel,
)
from .batch_norm import plan_moments
from .launch import Device, Launch, device_of, product_precision
from .operands import Map, chunk_argument, map_argument, pixel_multiple, tokens_argument
from .plans import planned, scratch
from .tiles import AttentionCase, AttentionTile, attention_tile, pixel_splits, token_gradient_tile

_SUM_BLOCK = 1024


class Operands(NamedTuple):
    """What both directions read: queries (B, Ck, H, W) as raw maps with their table, keys and values."""

    query: Tensor
    norm: Tensor | None
    key: Tensor
    value: Tensor
    scale: float
    precision: str


@planned
def asymmetric_attention(
    query: Tensor,
    norm: Tensor | None,
    key: Tensor,
    value: Tensor,
    skip: Tensor | None,
    constant: Tensor | None,
    scale: float,
    statistics: bool,
    out: Tensor,
    logsumexp: Tensor,
    moments: Tensor,
) -> list[Launch]:
    device = device_of(query)
    operands = Operands(query, norm, key, value, scale, product_precision(query.dtype))
    launches = plan_forward(operands, skip, constant, out, logsumexp, device)
    return [*launches, *plan_moments(out, moments, device)] if statistics else launches


@planned
def asymmetric_attention_bwd(
    grad_out: Tensor,
    query: Tensor,
    norm: Tensor | None,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    scale: float,
    needs: Sequence[bool],
    *gradients: Tensor,
) -> list[Launch]:
    wanted = [g if needed else None for g, needed in zip(gradients, needs, strict=True)]
    operands = Operands(query, norm, key, value, scale, product_precision(query.dtype))
    return plan_backward(grad_out, operands, logsumexp, wanted, device_of(query))


def plan_forward(
    operands: Operands, skip: Tensor | None, constant: Tensor | None, out: Tensor, logsumexp: Tensor, device: Device
) -> list[Launch]:
    """out = softmax(scale · QKᵀ) V + skip + constant."""
    query_map, skip_map, out_map = maps = map_argument(operands.query), map_argument(skip), map_argument(out)
    tile = _tile(maps, operands, False, device)
    blocks = out.shape[0] * -(-logsumexp.shape[1] // tile.pixels)
    if blocks == 0:
        return []
    arguments = {
        **_operand_arguments(operands, query_map, tile),
        "skip": skip_map,
        "constant_ptr": constant,
        "out": out_map,
        "logsumexp_ptr": logsumexp,
        **_common_arguments(operands, maps),
        "STAGES": tile.skip_stages,
    }
    return [Launch(asymmetric_attention_fwd_kernel, (blocks,), arguments, tile.warps, tile.stages, tile.max_registers)]


def plan_backward(
    grad: Tensor,
    operands: Operands,
    logsumexp: Tensor,
    gradients: Sequence[Tensor | None],
    device: Device,
) -> list[Launch]:
    """The gradients of the query, as it enters the products, of key and value; those that are not None."""
    query, key = operands.query, operands.key
    dquery, dkey, dvalue = gradients
    batch, pixels = logsumexp.shape
    maps = grad_map, query_map, dquery_map = map_argument(grad), map_argument(query), map_argument(dquery)
    tile = _tile(maps, operands, True, device)
    one_block = key.shape[2] <= tile.tokens
    blocks = batch * -(-pixels // tile.pixels)
    if blocks == 0 or (dquery is None and dkey is None and dvalue is None):
        return []

    def memory(wanted: bool) -> Tensor | None:
        return scratch(query, (batch, pixels, scratch_tokens)) if wanted else None

    scratch_tokens = -(-key.shape[2] // 16) * 16
    attention = memory(dvalue is not None)
    dlogits = memory(dkey is not None or (dquery is not None and not one_block))
    common = {"scratch_tokens": scratch_tokens, **_common_arguments(operands, maps)}
    arguments = {
        **common,
        "grad": grad_map,
        **_operand_arguments(operands, query_map, tile),
        "logsumexp_ptr": logsumexp,
        "dquery": dquery_map if one_block else map_argument(None),
        "attention_ptr": attention,
        "dlogits_ptr": dlogits,
    }
    launches = [
        Launch(
            asymmetric_attention_bwd_pixels_kernel, (blocks,), arguments, tile.warps, tile.stages, tile.max_registers
        )
    ]
    if dquery is not None and not one_block:
        arguments = {
            **common,
            "dlogits_ptr": dlogits,
            "key": tokens_argument(key),
            "dquery": dquery_map,
            "chunk": chunk_argument(key.shape[1], tile.key_chunk),
            "BLOCK_PIXELS": tile.pixels,
            "BLOCK_TOKENS": tile.tokens,
        }
        grid = (blocks, -(-key.shape[1] // tile.key_chunk))
        launches.append(
            Launch(asymmetric_attention_bwd_query_kernel, grid, arguments, tile.warps, tile.stages, tile.max_registers)
        )
    if dkey is not None:
        launches += _token_gradient(query_map, operands.norm, dlogits, dkey, common, device)
    if dvalue is not None:
        launches += _token_gradient(grad_map, None, attention, dvalue, {**common, "scale": 1.0}, device)
    return launches


def _token_gradient(
    map: Map, norm: Tensor | None, weights: Tensor | None, out: Tensor, common: dict[str, Any], device: Device
) -> list[Launch]:
    """out = scale · weightsᵀ × map."""
    assert weights is not None
    batch, channels, tokens = out.shape
    pixels = weights.shape[1]
    tile = token_gradient_tile(channels, tokens, out.dtype, common["PRECISION"], norm is not None, device.shared_memory)
    tiles = -(-channels // tile.chunk) * -(-tokens // tile.tokens)
    at_once = tile.per_multiprocessor * device.multiprocessors
    splits = pixel_splits(pixels, tiles * batch, at_once, tile.pixels)
    split_pixels = -(-pixels // (splits * tile.pixels)) * tile.pixels
    splits = -(-pixels // split_pixels)
    target = out if splits == 1 else scratch(out, (splits, *out.shape), torch.float32)
    arguments = {
        **common,
        "map": map,
        "norm": norm,
        "scratch_ptr": weights,
        "out_ptr": target,
        "split_pixels": split_pixels,
        "n_tokens": tokens,
        "chunk": chunk_argument(channels, tile.chunk),
        "BLOCK_PIXELS": tile.pixels,
        "BLOCK_TOKENS": tile.tokens,
    }
    launches = [
        Launch(
            asymmetric_attention_bwd_tokens_kernel,
            (tiles, splits, batch),
            arguments,
            tile.warps,
            tile.stages,
            tile.max_registers,
        )
    ]
    if splits > 1:
        size = out.numel()
        arguments = {"partials_ptr": target, "out_ptr": out, "splits": splits, "size": size, "BLOCK": _SUM_BLOCK}
        launches.append(
            Launch(
                asymmetric_attention_sum_splits_kernel, (-(-size // _SUM_BLOCK),), arguments, num_warps=4, num_stages=1
            )
        )
    return launches


def _tile(maps: Sequence[Map], operands: Operands, backward: bool, device: Device) -> AttentionTile:
    return attention_tile(
        AttentionCase(
            operands.key.shape[1],
            operands.value.shape[1],
            operands.key.shape[2],
            operands.key.dtype,
            operands.precision,
            backward,
            normalised=operands.norm is not None,
            nchw=any(m.channel_stride not in (None, 1) for m in maps),
            strided=any(m.row_stride is not None for m in maps),
            token_major=operands.key.stride(1) == operands.value.stride(1) == 1,
            capability=device.capability,
            shared_memory=device.shared_memory,
        )
    )


def _common_arguments(operands: Operands, maps: Sequence[Map]) -> dict[str, Any]:
    """What every kernel that reads ``maps`` is given."""
    height, width = operands.query.shape[2:]
    multiple = pixel_multiple(height * width, maps)
    return {
        "pixel_groups": height * width // multiple,
        "width": width,
        "scale": operands.scale,
        "PIXEL_MULTIPLE": multiple,
        "PRECISION": operands.precision,
    }


def _operand_arguments(operands: Operands, query: Map, tile: AttentionTile) -> dict[str, Any]:
    """What a kernel that owns a block of pixels is given of the operands."""
    key, value = operands.key, operands.value
    return {
        "query": query,
        "norm": operands.norm,
        "key": tokens_argument(key),
        "value": tokens_argument(value),
        "ONE_BLOCK": key.shape[2] <= tile.tokens,
        "key_chunk": chunk_argument(key.shape[1], tile.key_chunk),
        "value_chunk": chunk_argument(value.shape[1], tile.value_chunk),
        "BLOCK_PIXELS": tile.pixels,
        "BLOCK_TOKENS": tile.tokens,
    }


_SIZES = {"channels_last": (97, 97), "NCHW aligned": (96, 96), "NCHW odd": (97, 97), "strided": (97, 97)}
_DTYPES = ((torch.bfloat16, "ieee"), (torch.float16, "ieee"), (torch.float32, "ieee"), (torch.float32, "tf32"))
_ALL_GRADIENTS = (True, True, True)
_BLOCK_WIDTHS = (256, 512, 110)
_MANY_TOKENS = (256, 2048, 300)
_OTHER_WIDTHS = ((80, 19, 110), (13, 16, 110), (256, 256, 50), (48, 96, 1024))
"""(Ck, Cv, T): of the blocks; several blocks of tokens; chunks of every size, whole and masked, and a short block of
tokens."""


def launch_variants(device: Device) -> Iterator[tuple[str, str, Launch]]:
    """(dtype, layout, launch) of everything that gets code of its own on ``device``.

    A backward without some of its gradients is the whole one with code left out, and the code of float16 is that of
    bfloat16 but for the type of its instructions: there, one layout stands for all.
    """
    for (dtype, precision), layout in itertools.product(_DTYPES, _SIZES):
        channels_last = layout == "channels_last"
        if dtype == torch.float16 and not channels_last:
            continue
        needs = tuple(itertools.product((True, False), repeat=3)) if channels_last else (_ALL_GRADIENTS,)
        others = _OTHER_WIDTHS if layout in ("channels_last", "NCHW odd") else ()
        examples = [
            _Example(_BLOCK_WIDTHS, layout, needs=needs),
            _Example(_BLOCK_WIDTHS, layout, needs=needs, normalised=True, skips=(False, True)),
            _Example(_BLOCK_WIDTHS, layout, tokens="channel-major"),
            *(_Example(w, layout, normalised=n) for w in (_MANY_TOKENS, *others) for n in (False, True)),
        ]
        for example in examples:
            label = f"{layout}, {example.tokens} tokens{', normalised' * example.normalised}"
            if example.widths != _BLOCK_WIDTHS:
                label += f", {' × '.join(map(str, example.widths))}"
            for launch in example.launches(dtype, precision, device):
                yield str(dtype).removeprefix("torch."), label, launch


@dataclass(frozen=True)
class _Example:
    """Tensors without memory, as a call would bring them."""

    widths: tuple[int, int, int]
    layout: str
    tokens: str = "token-major"
    normalised: bool = False
    skips: Sequence[bool] = (True,)
    needs: Sequence[Sequence[bool]] = (_ALL_GRADIENTS,)
    batch: int = 8

    def launches(self, dtype: torch.dtype, precision: str, device: Device) -> list[Launch]:
        like = torch.empty(0, dtype=dtype, device="meta")
        key_channels, value_channels, _ = self.widths
        query, key, value = (
            self._map(like, key_channels),
            self._tokens(like, key_channels),
            self._tokens(like, value_channels),
        )
        height, width = query.shape[2:]
        out = empty_map(like, (self.batch, value_channels, height, width), is_channels_last(query))
        logsumexp = like.new_empty((self.batch, height * width), dtype=torch.float32)
        norm = like.new_empty((4, key_channels), dtype=torch.float32) if self.normalised else None
        operands = Operands(query, norm, key, value, 1.0, precision)
        constant = like.new_empty(value_channels, dtype=torch.float32) if self.normalised else None
        launches = []
        for skip in self.skips if self.normalised else (False,):
            launches += plan_forward(operands, out if skip else None, constant, out, logsumexp, device)
        gradients = (
            empty_map(like, (self.batch, key_channels, height, width), is_channels_last(query)),
            empty_tokens(like, *key.shape),
            empty_tokens(like, *value.shape),
        )
        for needs in self.needs:
            wanted = tuple(g if needed else None for g, needed in zip(gradients, needs, strict=True))
            launches += plan_backward(out, operands, logsumexp, wanted, device)
        return launches

    def _map(self, like: Tensor, channels: int) -> Tensor:
        height, width = _SIZES[self.layout]
        if self.layout == "strided":
            return like.new_empty((self.batch, channels, height, width + 3))[..., :width]
        return empty_map(like, (self.batch, channels, height, width), self.layout == "channels_last")

    def _tokens(self, like: Tensor, channels: int) -> Tensor:
        count = self.widths[2]
        if self.tokens == "token-major":
            return empty_tokens(like, self.batch, channels, count)
        return like.new_empty((self.batch, channels, count))
