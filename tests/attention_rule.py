"""The attention held to the error rule: shapes that bite, tokens in every layout, plain PyTorch's operations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from helpers import FACTOR, SEEDS, Results, assert_as_accurate_as_plain, random_map
from torch import Tensor

import annnet_kernels as ak

TOKEN_LAYOUTS = ("tokens", "channels", "slice", "expanded")

ONE_HOT_FACTOR = 30.0
"""Instead of 1.5 where logits are in the hundreds: the error is that of the few pixels with nearly tied logits, and by
luck of the draw one side has none. What is tested there is that nothing overflows."""

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def random_tokens(
    batch: int, channels: int, tokens: int, dtype: torch.dtype, layout: str = "tokens", device: str = "cpu"
) -> Tensor:
    """(B, C, T): ``tokens`` are token-major as ``pyramid_pool`` returns them, ``channels`` are contiguous."""
    x = torch.randn(batch, tokens, channels, dtype=torch.float64, device=device).to(dtype).transpose(1, 2)
    if layout == "tokens":
        return x
    if layout == "channels":
        return x.contiguous()
    if layout == "slice":
        return x.repeat_interleave(2, dim=2)[:, :, ::2]
    if layout == "expanded":
        return x[:1].expand(batch, channels, tokens)
    raise ValueError(f"layout: unknown layout {layout!r}")


def plain_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The published operations; in float64, the truth."""
    attention = torch.softmax(torch.matmul(query.flatten(2).transpose(1, 2), key) * scale, dim=-1)
    return torch.matmul(attention, value.transpose(1, 2)).transpose(1, 2).unflatten(2, query.shape[2:])


def with_gradients(attention: Attention, operands: tuple[Tensor, ...], grad: Tensor, scale: float) -> Results:
    leaves = [x.detach().requires_grad_() for x in operands]
    out = attention(*leaves, scale)
    gradients = torch.autograd.grad(out, leaves, grad.to(out.dtype))
    return dict(zip(("out", "dquery", "dkey", "dvalue"), (out, *gradients), strict=True))


def assert_accurate(
    shape: tuple[int, int, int, int, int, int],
    dtype: torch.dtype,
    backend: str | None,
    map_layout: str = "nchw",
    token_layout: str = "tokens",
    magnitude: float = 1.0,
    scale: float | None = None,
    device: str = "cpu",
    seeds: int = SEEDS,
) -> None:
    """Output and three gradients by the error rule; ``shape`` is (B, Ck, Cv, H, W, T).

    ``magnitude`` multiplies the query: with the default scale it is the standard deviation of the logits.
    """
    batch, key_channels, value_channels, height, width, tokens = shape
    factor = key_channels**-0.5 if scale is None else scale

    def run(seed: int) -> tuple[Results, Results, Results]:
        operands = (
            random_map((batch, key_channels, height, width), dtype, map_layout, device, magnitude),
            random_tokens(batch, key_channels, tokens, dtype, token_layout, device),
            random_tokens(batch, value_channels, tokens, dtype, token_layout, device),
        )
        grad = random_map((batch, value_channels, height, width), dtype, map_layout, device)
        with ak.use_backend(backend):
            ours = with_gradients(ak.asymmetric_attention, operands, grad, factor)
        plain = with_gradients(plain_attention, operands, grad, factor)
        truth = with_gradients(plain_attention, tuple(x.double() for x in operands), grad, factor)
        return ours, plain, truth

    assert_as_accurate_as_plain(run, dtype, factor=FACTOR if magnitude < 100 else ONE_HOT_FACTOR, seeds=seeds)
