"""The pooling and its prologue held to the error rule: plain PyTorch's operations and the truth, with all gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from helpers import SEEDS, Results, assert_as_accurate_as_plain, random_map
from torch import Tensor

import annnet_kernels as ak
from annnet_kernels import pyramid, reference

GRAD_LAYOUTS = ("tokens", "channels", "slice", "expanded")
PYRAMID = (1, 3, 6, 8)
ROUNDING = {torch.float32: 1e-6, torch.float64: 3e-15, torch.bfloat16: 4e-3, torch.float16: 5e-4}
"""Half of the last digit in 16 bits; a few digits of the sums in 32 and 64."""


def random_token_gradient(
    batch: int, channels: int, tokens: int, dtype: torch.dtype, layout: str = "tokens", device: str = "cpu"
) -> Tensor:
    """(B, C, T): ``tokens`` lie token-major as the pooled tokens do; ``expanded`` is what ``sum()`` hands back."""
    if layout == "expanded":
        return torch.randn((), dtype=torch.float64, device=device).to(dtype).expand(batch, channels, tokens)
    x = torch.randn(batch, 2 * tokens, channels, dtype=torch.float64, device=device).to(dtype).transpose(1, 2)
    return {"tokens": x[..., :tokens], "channels": x[..., :tokens].contiguous(), "slice": x[..., ::2]}[layout]


def levels(sizes: Sequence[int | tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Heights and widths."""
    pairs = [(s, s) if isinstance(s, int) else s for s in sizes]
    return [h for h, _ in pairs], [w for _, w in pairs]


def assert_rounded(value: Tensor, truth: Tensor, magnitude: Tensor) -> None:
    """Every element is right but for rounding; ``magnitude`` is the truth of absolute values, as sums may cancel."""
    limits = torch.finfo(value.dtype)
    assert value.shape == truth.shape
    assert ((value.double() - truth).abs() <= ROUNDING[value.dtype] * magnitude + limits.tiny * limits.eps).all()


def assert_pool_accurate(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    backend: str | None,
    layout: str = "nchw",
    grad_layout: str = "tokens",
    sizes: Sequence[int | tuple[int, int]] = PYRAMID,
    device: str = "cpu",
    seeds: int = SEEDS,
) -> None:
    """Tokens and the map's gradient."""
    heights, widths = levels(sizes)
    batch, channels, _, _ = shape

    def run(seed: int) -> tuple[Results, Results, Results]:
        x = random_map(shape, dtype, layout, device).requires_grad_()
        tokens = pyramid.num_tokens(heights, widths)
        grad = random_token_gradient(batch, channels, tokens, dtype, grad_layout, device)
        with ak.use_backend(backend):
            pooled = ak.pyramid_pool(x, sizes)
        ours = {"tokens": pooled, "dx": torch.autograd.grad(pooled, x, grad)[0]}
        return ours, _plain(x, grad, heights, widths), _plain(x.double(), grad.double(), heights, widths)

    assert_as_accurate_as_plain(run, dtype, seeds=seeds)


def _plain(x: Tensor, grad: Tensor, heights: list[int], widths: list[int]) -> Results:
    """One adaptive average pooling per level, concatenated, and PyTorch's own gradient."""
    leaf = x.detach().contiguous().requires_grad_()
    tokens = reference.pyramid_pool(leaf, heights, widths)
    return {"tokens": tokens, "dx": torch.autograd.grad(tokens, leaf, grad)[0]}


def random_norm(channels: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
    """A table of mean, invstd, weight and bias; some weights are negative."""
    table = torch.randn(4, channels, device=device, dtype=dtype)
    table[1] = table[1].abs() + 0.5
    return table


def assert_rectified_accurate(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    backend: str,
    layout: str = "nchw",
    grad_layout: str = "tokens",
    with_tokens: bool = True,
    with_map: bool = True,
    with_statistics: bool = True,
    map_layout: str | None = None,
    sizes: Sequence[int | tuple[int, int]] = PYRAMID,
    device: str = "cpu",
    seeds: int = SEEDS,
) -> None:
    """The pooling of relu(batch norm(y)) and its backward: tokens, the sums, and the gradient of y."""
    heights, widths = levels(sizes)
    batch, channels, _, _ = shape
    statistics = torch.promote_types(dtype, torch.float32)

    def run(seed: int) -> tuple[Results, Results, Results]:
        y, norm = random_map(shape, dtype, layout, device), random_norm(channels, device, statistics)
        tokens = pyramid.num_tokens(heights, widths)
        grad_tokens = (
            random_token_gradient(batch, channels, tokens, dtype, grad_layout, device) if with_tokens else None
        )
        grad_map = random_map(shape, dtype, map_layout or layout, device) if with_map else None
        mean_sums = torch.randn(2, channels, device=device, dtype=statistics) * 0.1 if with_statistics else None
        operators = torch.ops.annnet
        with ak.use_backend(backend):
            pooled = operators.pyramid_pool(y, norm, heights, widths)
        gradients, sums = (grad_tokens, grad_map), None if mean_sums is None else 4 * mean_sums
        ours = {
            "tokens": pooled,
            "sums": operators.bn_relu_bwd_sums(y, norm, *gradients, heights, widths, backend),
            "dy": operators.bn_relu_bwd_input(y, norm, *gradients, sums, 4, heights, widths, backend),
        }
        operands = (y, norm, *gradients, mean_sums)
        doubled = [None if x is None else x.double() for x in operands]
        return ours, _plain_rectified(*operands, heights, widths), _plain_rectified(*doubled, heights, widths)

    assert_as_accurate_as_plain(run, dtype, seeds=seeds)


def _plain_rectified(
    y: Tensor,
    norm: Tensor,
    grad_tokens: Tensor | None,
    grad_map: Tensor | None,
    mean_sums: Tensor | None,
    heights: list[int],
    widths: list[int],
) -> Results:
    """The formulas, z rounded to the dtype of y as a block that writes it does; in float64, the truth."""
    columns = norm[:, None, :, None, None]
    normal = (y.to(norm.dtype) - columns[0]) * columns[1]
    z = (normal * columns[2] + columns[3]).to(y.dtype).relu()
    spread = 0 if grad_map is None else grad_map
    if grad_tokens is not None:
        spread = spread + _plain(z, grad_tokens, heights, widths)["dx"]
    gradient = torch.where(normal * columns[2] + columns[3] <= 0, 0, spread).to(norm.dtype)
    sums = torch.stack([gradient.sum((0, 2, 3)), (gradient * normal).sum((0, 2, 3))])
    centred = gradient
    if mean_sums is not None:
        centred = gradient - mean_sums[0][None, :, None, None] - normal * mean_sums[1][None, :, None, None]
    dy = (columns[2] * columns[1] * centred).to(y.dtype)
    return {"tokens": reference.pyramid_pool(z, heights, widths), "sums": sums, "dy": dy}
