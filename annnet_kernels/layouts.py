"""The memory layouts of the tensors that operators create."""

from __future__ import annotations

import torch


def is_channels_last(x: torch.Tensor) -> bool:
    """Whether the channels of a (B, C, H, W) map lie next to each other; slices of such maps count."""
    return x.stride(1) == 1 and x.stride(2) > 1 and x.stride(3) > 1


def empty_map(like: torch.Tensor, shape: tuple[int, int, int, int], channels_last: bool) -> torch.Tensor:
    """An uninitialised (B, C, H, W) map, dense in NCHW or in channels_last."""
    batch, channels, height, width = shape
    if channels_last:
        return like.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)
    return like.new_empty(shape)


def empty_tokens(like: torch.Tensor, batch: int, channels: int, tokens: int) -> torch.Tensor:
    """An uninitialised (B, C, T) tensor whose memory is token-major, (B, T, C).

    A row of 110 tokens is 220 or 440 bytes and defeats vector loads; a row of channels does not.
    """
    return like.new_empty((batch, tokens, channels)).transpose(1, 2)
