"""The float64 truth: what the blocks compute, written from the equations, apart from every other implementation.

Pooling is a product with the explicit matrix P, a 1 × 1 convolution is a product over channels, and batch statistics
are means. It is slow, short, and meant to be checked by eye. Parameters come as a state dict with the published keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..pyramid import regions

EPS = 1e-5
MOMENTUM = 0.1
Parameters = Mapping[str, Tensor]


def pooling_matrix(heights: Sequence[int], widths: Sequence[int], height: int, width: int) -> Tensor:
    """P, (N, T) in float64: P[n, t] = 1 / area(t) where pixel n lies in the rectangle of token t, else 0."""
    rectangles = regions(heights, widths, height, width)
    matrix = torch.zeros(height, width, len(rectangles), dtype=torch.float64)
    for token, r in enumerate(rectangles):
        matrix[r.top : r.bottom, r.left : r.right, token] = 1 / ((r.bottom - r.top) * (r.right - r.left))
    return matrix.flatten(0, 1)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """softmax(scale · Q Kᵀ) V for (B, N, Ck), (B, T, Ck), (B, T, Cv)."""
    return torch.softmax(scale * query @ key.transpose(1, 2), dim=2) @ value


def block(
    parameters: Parameters,
    low: Tensor,
    high: Tensor,
    *,
    training: bool,
    relu: bool,
    pool: tuple[Sequence[int], Sequence[int]] | None = ((1, 3, 6, 8), (1, 3, 6, 8)),
) -> tuple[Tensor, dict[str, Tensor]]:
    """AFNB (``relu=False``), APNB (``low is high``, ``relu=True``) or, with ``pool=None``, the non-local block.

    Dropout is not part of it. Without ``conv_bn_dropout`` keys the result is the context.

    Returns:
        (B, C, H, W), and the running statistics after the call, by their keys.
    """
    running: dict[str, Tensor] = {}
    stage = {k.removeprefix("stages.0."): v for k, v in parameters.items()}
    x_low, x_high = (x.flatten(2).transpose(1, 2) for x in (low, high))
    matrix = torch.eye(x_low.shape[1], dtype=torch.float64) if pool is None else pooling_matrix(*pool, *low.shape[2:])

    def norm(y: Tensor, prefix: str) -> Tensor:
        mean, var = parameters[f"{prefix}.running_mean"], parameters[f"{prefix}.running_var"]
        if training:
            count = y.shape[0] * y.shape[1]
            batch_mean = y.mean(dim=(0, 1))
            batch_var = (y - batch_mean).square().mean(dim=(0, 1))
            mean = running.get(f"{prefix}.running_mean", mean)
            var = running.get(f"{prefix}.running_var", var)
            unbiased = batch_var * count / (count - 1)
            running[f"{prefix}.running_mean"] = ((1 - MOMENTUM) * mean + MOMENTUM * batch_mean).detach()
            running[f"{prefix}.running_var"] = ((1 - MOMENTUM) * var + MOMENTUM * unbiased).detach()
            mean, var = batch_mean, batch_var
        normalised = (y - mean) / torch.sqrt(var + EPS)
        return normalised * parameters[f"{prefix}.weight"] + parameters[f"{prefix}.bias"]

    def linear(x: Tensor, prefix: str) -> Tensor:
        return x @ stage[f"{prefix}.weight"].flatten(1).transpose(0, 1) + stage[f"{prefix}.bias"]

    shared = low is high  # one projection, called twice: its running statistics move twice
    key_prefix, query_prefix = "f_key", "f_key" if shared else "f_query"
    query = torch.relu(norm(linear(x_high, f"{query_prefix}.0"), f"stages.0.{query_prefix}.1.0"))
    key = matrix.T @ torch.relu(norm(linear(x_low, f"{key_prefix}.0"), f"stages.0.{key_prefix}.1.0"))
    value = matrix.T @ linear(x_low, "f_value")
    out = linear(attention(query, key, value, query.shape[2] ** -0.5), "W")
    if "conv_bn_dropout.0.weight" in parameters:
        prefix = "conv_bn_dropout.1.0" if "conv_bn_dropout.1.0.weight" in parameters else "conv_bn_dropout.1"
        out = norm(linear(torch.cat([out, x_high], dim=2), "conv_bn_dropout.0"), prefix)
        out = torch.relu(out) if relu else out
    return out.transpose(1, 2).unflatten(2, high.shape[2:]), running
