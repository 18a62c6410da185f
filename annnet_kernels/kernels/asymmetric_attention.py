"""Launches of the attention kernels: which kernels serve a call, with which tiles, through which scratch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
from .launch import Device, Launch, device_of, product_precision, run_all
from .operands import Map, Norm, chunk_argument, map_argument, pixel_multiple, tokens_argument
from .tiles import AttentionTile, attention_tile, pixel_splits, token_gradient_tile

_SUM_BLOCK = 1024


def asymmetric_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor, logsumexp: Tensor
) -> None:
    _forward(query, None, key, value, None, scale, out, logsumexp)


def asymmetric_attention_bwd(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    scale: float,
    needs: Sequence[bool],
    dquery: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
) -> None:
    _backward(grad_out, query, None, key, value, logsumexp, scale, needs, (dquery, dkey, dvalue))


def asymmetric_attention_bn_relu(
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    key: Tensor,
    value: Tensor,
    addend: Tensor | None,
    scale: float,
    out: Tensor,
    logsumexp: Tensor,
) -> None:
    _forward(y, Norm(mean, invstd, weight, bias), key, value, addend, scale, out, logsumexp)


def asymmetric_attention_bn_relu_bwd(
    grad_out: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    scale: float,
    needs: Sequence[bool],
    dz: Tensor,
    dkey: Tensor,
    dvalue: Tensor,
) -> None:
    norm = Norm(mean, invstd, weight, bias)
    _backward(grad_out, y, norm, key, value, logsumexp, scale, needs, (dz, dkey, dvalue))


def _forward(
    query: Tensor,
    norm: Norm | None,
    key: Tensor,
    value: Tensor,
    addend: Tensor | None,
    scale: float,
    out: Tensor,
    logsumexp: Tensor,
) -> None:
    precision, device = product_precision(query.dtype), device_of(query)
    run_all(plan_forward(query, norm, key, value, addend, scale, out, logsumexp, precision, device), query)


def _backward(
    grad: Tensor,
    query: Tensor,
    norm: Norm | None,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    scale: float,
    needs: Sequence[bool],
    gradients: Sequence[Tensor],
) -> None:
    precision, device = product_precision(query.dtype), device_of(query)
    dquery, dkey, dvalue = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
    launches = plan_backward(grad, query, norm, key, value, logsumexp, scale, dquery, dkey, dvalue, precision, device)
    run_all(launches, query)


def plan_forward(
    query: Tensor,
    norm: Norm | None,
    key: Tensor,
    value: Tensor,
    addend: Tensor | None,
    scale: float,
    out: Tensor,
    logsumexp: Tensor,
    precision: str,
    device: Device,
) -> list[Launch]:
    """out = softmax(scale · QKᵀ) V + addend."""
    maps = (map_argument(query), map_argument(addend), map_argument(out))
    tile = _tile(maps, norm, key, value, precision, False, device)
    blocks = query.shape[0] * -(-logsumexp.shape[1] // tile.pixels)
    if blocks == 0:
        return []
    arguments = {
        "query": maps[0],
        "norm": norm,
        "key": tokens_argument(key),
        "value": tokens_argument(value),
        "addend": maps[1],
        "out": maps[2],
        "logsumexp_ptr": logsumexp,
        **_sizes(query, maps),
        **_tile_constants(query, key, value, tile),
        "scale": scale,
        "PRECISION": precision,
    }
    return [Launch(asymmetric_attention_fwd_kernel, (blocks,), arguments, tile.warps, tile.stages, tile.max_registers)]


def plan_backward(
    grad: Tensor,
    query: Tensor,
    norm: Norm | None,
    key: Tensor,
    value: Tensor,
    logsumexp: Tensor,
    scale: float,
    dquery: Tensor | None,
    dkey: Tensor | None,
    dvalue: Tensor | None,
    precision: str,
    device: Device,
) -> list[Launch]:
    """The gradients that are not None; ``dquery`` is that of the normalised query."""
    batch, pixels = logsumexp.shape
    maps = grad_map, query_map, dquery_map = map_argument(grad), map_argument(query), map_argument(dquery)
    tile = _tile(maps, norm, key, value, precision, True, device)
    one_block = key.shape[2] <= tile.tokens
    blocks = batch * -(-pixels // tile.pixels)
    if blocks == 0 or (dquery is None and dkey is None and dvalue is None):
        return []

    def scratch(wanted: bool) -> Tensor | None:
        return query.new_empty((batch, pixels, scratch_tokens)) if wanted else None

    scratch_tokens = -(-key.shape[2] // 16) * 16
    attention = scratch(dvalue is not None)
    dlogits = scratch(dkey is not None or (dquery is not None and not one_block))
    common = {
        "scratch_tokens": scratch_tokens,
        **_sizes(query, maps),
        "scale": scale,
        "PRECISION": precision,
    }
    arguments = {
        **common,
        "grad": grad_map,
        "query": query_map,
        "norm": norm,
        "key": tokens_argument(key),
        "value": tokens_argument(value),
        "logsumexp_ptr": logsumexp,
        "dquery": dquery_map if one_block else map_argument(None),
        "attention_ptr": attention,
        "dlogits_ptr": dlogits,
        **_tile_constants(query, key, value, tile),
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
        launches += _token_gradient(query_map, norm, dlogits, dkey, common, device)
    if dvalue is not None:
        launches += _token_gradient(grad_map, None, attention, dvalue, {**common, "scale": 1.0}, device)
    return launches


def _token_gradient(
    map: Map, norm: Norm | None, scratch: Tensor | None, out: Tensor, common: dict[str, Any], device: Device
) -> list[Launch]:
    """out = scale · scratchᵀ × map."""
    assert scratch is not None
    batch, channels, tokens = out.shape
    pixels = scratch.shape[1]
    tile = token_gradient_tile(channels, tokens, out.dtype, common["PRECISION"], norm is not None, device.shared_memory)
    tiles = -(-channels // tile.chunk) * -(-tokens // tile.tokens)
    splits = pixel_splits(pixels, tiles * batch, device.multiprocessors, tile.pixels)
    split_pixels = -(-pixels // (splits * tile.pixels)) * tile.pixels
    splits = -(-pixels // split_pixels)
    target = out if splits == 1 else out.new_empty((splits, *out.shape), dtype=torch.float32)
    arguments = {
        **common,
        "map": map,
        "norm": norm,
        "scratch_ptr": scratch,
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


def _tile(
    maps: Sequence[Map],
    norm: Norm | None,
    key: Tensor,
    value: Tensor,
    precision: str,
    backward: bool,
    device: Device,
) -> AttentionTile:
    return attention_tile(
        key.shape[1],
        value.shape[1],
        key.shape[2],
        key.dtype,
        precision,
        backward,
        norm is not None,
        any(m.channel_stride not in (None, 1) for m in maps),
        any(m.row_stride is not None for m in maps),
        device.capability,
        device.shared_memory,
    )


def _sizes(query: Tensor, maps: Sequence[Map]) -> dict[str, Any]:
    height, width = query.shape[2:]
    multiple = pixel_multiple(height * width, maps)
    return {
        "pixel_groups": height * width // multiple,
        "width": width,
        "PIXEL_MULTIPLE": multiple,
    }


def _tile_constants(query: Tensor, key: Tensor, value: Tensor, tile: AttentionTile) -> dict[str, Any]:
    return {
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
            _Example(_BLOCK_WIDTHS, layout, needs=needs, normalised=True, addends=("none", "map", "constant")),
            _Example(_BLOCK_WIDTHS, layout, tokens="channel-major"),
            *(_Example(w, layout, normalised=n) for w in (_MANY_TOKENS, *others) for n in (False, True)),
        ]
        for example in examples:
            label = f"{layout}, {example.tokens} tokens{', normalised' * example.normalised}"
            for launch in example.launches(dtype, precision, device):
                yield str(dtype).removeprefix("torch."), label, launch


@dataclass(frozen=True)
class _Example:
    """Tensors without memory, as a call would bring them."""

    widths: tuple[int, int, int]
    layout: str
    tokens: str = "token-major"
    normalised: bool = False
    addends: Sequence[str] = ("map",)
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
        norm = Norm(*[like.new_empty(key_channels, dtype=torch.float32)] * 4) if self.normalised else None
        launches = []
        addends = {"none": None, "map": out, "constant": out.new_empty(value_channels, 1, 1).expand_as(out)}
        for addend in self.addends if self.normalised else ("none",):
            launches += plan_forward(query, norm, key, value, addends[addend], 1.0, out, logsumexp, precision, device)
        gradients = (
            empty_map(like, (self.batch, key_channels, height, width), is_channels_last(query)),
            empty_tokens(like, *key.shape),
            empty_tokens(like, *value.shape),
        )
        for needs in self.needs:
            dquery, dkey, dvalue = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
            launches += plan_backward(
                out, query, norm, key, value, logsumexp, 1.0, dquery, dkey, dvalue, precision, device
            )
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
