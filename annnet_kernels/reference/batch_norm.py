"""The normalising tail in plain PyTorch: statistics, BatchNorm + ReLU + channel scale, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def batch_norm_statistics_out(y: Tensor, statistics: Tensor) -> None:
    if y.numel() == 0:
        statistics.fill_(torch.nan)
        return
    wide = y.to(statistics.dtype)
    var, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
    # An infinite mean is infinite in BatchNorm; the updates of var_mean make it NaN.
    mean = torch.where(mean.isnan(), wide.mean((0, 2, 3)), mean)
    torch.stack((mean, var), out=statistics)


def batch_norm_apply_out(
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    channel_scale: Tensor | None,
    relu: bool,
    out: Tensor,
) -> None:
    z = _normalised(y, mean, invstd) * _per_channel(weight) + _per_channel(bias)
    if relu:
        z = z.relu()
    out.copy_(z if channel_scale is None else z * channel_scale[:, :, None, None])


def batch_norm_bwd_sums_out(
    grad_out: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    channel_scale: Tensor | None,
    relu: bool,
    sums: Tensor,
) -> None:
    normal = _normalised(y, mean, invstd)
    g = _gradient_of_normalised(grad_out, normal, weight, bias, channel_scale, relu)
    terms = torch.stack((g, g * normal))
    sums.copy_(terms.sum((1, 3, 4), dtype=torch.float64))


def batch_norm_bwd_input_out(
    grad_out: Tensor,
    y: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    channel_scale: Tensor | None,
    relu: bool,
    mean_sums: Tensor | None,
    dy: Tensor,
) -> None:
    normal = _normalised(y, mean, invstd)
    g = _gradient_of_normalised(grad_out, normal, weight, bias, channel_scale, relu)
    if mean_sums is not None:
        g = g - _per_channel(mean_sums[0]) - normal * _per_channel(mean_sums[1])
    dy.copy_(g * _per_channel(weight * invstd))


def _normalised(y: Tensor, mean: Tensor, invstd: Tensor) -> Tensor:
    return (y.to(mean.dtype) - _per_channel(mean)) * _per_channel(invstd)


def _gradient_of_normalised(
    grad_out: Tensor, normal: Tensor, weight: Tensor, bias: Tensor, channel_scale: Tensor | None, relu: bool
) -> Tensor:
    """The gradient with respect to weight · ŷ + bias, zero where the ReLU holds back; NaN lets it pass."""
    g = grad_out.to(normal.dtype)
    if channel_scale is not None:
        g = g * channel_scale[:, :, None, None]
    if relu:
        g = torch.where(normal * _per_channel(weight) + _per_channel(bias) <= 0, 0, g)
    return g


def _per_channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]
