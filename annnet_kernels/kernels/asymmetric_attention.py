"""Launches of the attention kernels: which kernels serve a call, with which tiles, through which scratch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .attention_kernels import (
    asymmetric_attention_bwd_pixels_kernel,
    asymmetric_attention_bwd_query_kernel,
    asymmetric_attention_bwd_tokens_kernel,
    asymmetric_attention_fwd_kernel,
    asymmetric_attention_sum_splits_kernel,
)
from .launch import Device, Launch, device_of, product_precision, run_all
from .operands import Map, Norm, map_argument, pixel_multiple, tokens_argument
from .tiles import AttentionTile, attention_tile, pixel_splits, token_gradient_tile

_SUM_BLOCK = 1024


def asymmetric_attention(
    query: Tensor, key: Tensor, value: Tensor, scale: float, out: Tensor, logsumexp: Tensor
) -> None:
    launches = plan_forward(
        query, None, key, value, None, scale, out, logsumexp, product_precision(query.dtype), device_of(query)
    )
    run_all(launches, query)


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
    launches = plan_backward(
        grad_out,
        query,
        None,
        key,
        value,
        logsumexp,
        scale,
        dquery if needs[0] else None,
        dkey if needs[1] else None,
        dvalue if needs[2] else None,
        product_precision(query.dtype),
        device_of(query),
    )
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
    maps = (map_argument(query), None if addend is None else map_argument(addend), map_argument(out))
    tile = _tile(query, key, value, precision, device)
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
        **_sizes(query, key, maps),
        **_tile_constants(query, key, value, tile),
        "scale": scale,
        "PRECISION": precision,
    }
    return [Launch(asymmetric_attention_fwd_kernel, (blocks,), arguments, tile.warps, tile.stages)]


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
    tile = _tile(query, key, value, precision, device)
    one_block = key.shape[2] <= tile.tokens
    blocks = batch * -(-pixels // tile.pixels)
    if blocks == 0 or (dquery is None and dkey is None and dvalue is None):
        return []

    def scratch(wanted: bool) -> Tensor | None:
        return query.new_empty((batch, pixels, scratch_tokens)) if wanted else None

    scratch_tokens = -(-key.shape[2] // 16) * 16
    attention = scratch(dvalue is not None)
    dlogits = scratch(dkey is not None or (dquery is not None and not one_block))
    grad_map, query_map = map_argument(grad), map_argument(query)
    dquery_map = None if dquery is None else map_argument(dquery)
    maps = (grad_map, query_map, dquery_map)
    common = {
        "scratch_tokens": scratch_tokens,
        **_sizes(query, key, maps),
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
        "dquery": dquery_map if one_block else None,
        "attention_ptr": attention,
        "dlogits_ptr": dlogits,
        **_tile_constants(query, key, value, tile),
    }
    launches = [Launch(asymmetric_attention_bwd_pixels_kernel, (blocks,), arguments, tile.warps, tile.stages)]
    if dquery is not None and not one_block:
        arguments = {
            **common,
            "dlogits_ptr": dlogits,
            "key": tokens_argument(key),
            "dquery": dquery_map,
            "KEY_CHANNELS": key.shape[1],
            "KEY_CHUNK": tile.key_chunk,
            "BLOCK_PIXELS": tile.pixels,
            "BLOCK_TOKENS": tile.tokens,
        }
        grid = (blocks, -(-key.shape[1] // tile.key_chunk))
        launches.append(Launch(asymmetric_attention_bwd_query_kernel, grid, arguments, tile.warps, tile.stages))
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
    tile = token_gradient_tile(channels, tokens, out.dtype, common["PRECISION"], device.shared_memory)
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
        "CHANNELS": channels,
        "CHUNK": tile.chunk,
        "BLOCK_PIXELS": tile.pixels,
        "BLOCK_TOKENS": tile.tokens,
    }
    launches = [
        Launch(asymmetric_attention_bwd_tokens_kernel, (tiles, splits, batch), arguments, tile.warps, tile.stages)
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


def _tile(query: Tensor, key: Tensor, value: Tensor, precision: str, device: Device) -> AttentionTile:
    return attention_tile(key.shape[1], value.shape[1], key.shape[2], query.dtype, precision, device.shared_memory)


def _sizes(query: Tensor, key: Tensor, maps: Sequence[Map | None]) -> dict[str, Any]:
    height, width = query.shape[2:]
    multiple = pixel_multiple(height * width, maps)
    return {
        "pixel_groups": height * width // multiple,
        "n_tokens": key.shape[2],
        "width": width,
        "PIXEL_MULTIPLE": multiple,
    }


def _tile_constants(query: Tensor, key: Tensor, value: Tensor, tile: AttentionTile) -> dict[str, Any]:
    return {
        "ONE_BLOCK": key.shape[2] <= tile.tokens,
        "KEY_CHANNELS": key.shape[1],
        "VALUE_CHANNELS": value.shape[1],
        "KEY_CHUNK": tile.key_chunk,
        "VALUE_CHUNK": tile.value_chunk,
        "BLOCK_PIXELS": tile.pixels,
        "BLOCK_TOKENS": tile.tokens,
    }
