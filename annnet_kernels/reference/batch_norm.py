"""Norms and the normalising tail in plain PyTorch: moments, tables, BatchNorm + ReLU + channel scale, and gradients."""

from __future__ import annotations

import torch
from torch import Tensor


def finished(x: Tensor, norm: Tensor | None) -> Tensor:
    """``x`` itself, or relu((x − mean) · invstd · weight + bias) in the dtype of the table."""
    return x if norm is None else _scaled(_centred(x, norm), norm).relu()


def batch_norm_moments_out(y: Tensor, moments: Tensor) -> None:
    if y.numel() == 0:
        moments.zero_()
        return
    count = y.numel() // y.shape[1]
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    var, mean = torch.var_mean(wide, dim=(0, 2, 3), correction=0)
    # An infinite mean is infinite in BatchNorm; the updates of var_mean make it NaN.
    mean = torch.where(mean.isnan(), wide.mean((0, 2, 3)), mean)
    moments.copy_(torch.stack((torch.full_like(mean, count), mean, var.double() * count)))


def batch_norm_table_out(
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_bias: Tensor | None,
    eps: float,
    table: Tensor,
) -> None:
    table[0] = mean if conv_bias is None else mean.to(table.dtype) - conv_bias.to(table.dtype)
    table[1] = torch.rsqrt(var.to(table.dtype) + eps)
    table[2] = 1 if weight is None else weight
    table[3] = 0 if bias is None else bias


def batch_norm_update_out(
    y: Tensor,
    moments: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    conv_bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    count: Tensor | None,
    eps: float,
    momentum: float | None,
    calls: int,
    table: Tensor,
) -> None:
    if moments is None:
        moments = y.new_empty((3, y.shape[1]), dtype=torch.float64)
        batch_norm_moments_out(y, moments)
    values, mean, deviation = moments.unbind()
    batch_norm_table_out(y, mean, deviation / values.clamp_min(1), weight, bias, None, eps, table)
    unbiased = deviation / (values - 1)
    mean = mean if conv_bias is None else mean + conv_bias
    for call in range(calls):
        factor: float | Tensor = 1 / (count + call + 1) if momentum is None and count is not None else momentum or 0.0
        for running, statistic in ((running_mean, mean), (running_var, unbiased)):
            if running is not None:
                wide = running.double()
                running.copy_(torch.where(values > 0, wide + (statistic - wide) * factor, wide))
    if count is not None:
        count += calls


def batch_norm_apply_out(y: Tensor, norm: Tensor, channel_scale: Tensor | None, relu: bool, out: Tensor) -> None:
    z = finished(y, norm) if relu else _scaled(_centred(y, norm), norm)
    out.copy_(z if channel_scale is None else z * channel_scale[:, :, None, None])


def batch_norm_bwd_sums_out(
    grad_out: Tensor, y: Tensor, norm: Tensor, channel_scale: Tensor | None, relu: bool, sums: Tensor
) -> None:
    normal = _centred(y, norm)
    g = _gradient_of_normalised(grad_out, normal, norm, channel_scale, relu)
    terms = torch.stack((g, g * normal))
    sums.copy_(terms.sum((1, 3, 4), dtype=torch.float64))


def batch_norm_bwd_input_out(
    grad_out: Tensor,
    y: Tensor,
    norm: Tensor,
    channel_scale: Tensor | None,
    relu: bool,
    sums: Tensor | None,
    count: int,
    dy: Tensor,
) -> None:
    normal = _centred(y, norm)
    g = _gradient_of_normalised(grad_out, normal, norm, channel_scale, relu)
    if sums is not None:
        mean_g, mean_gy = sums / count
        g = g - _per_channel(mean_g) - normal * _per_channel(mean_gy)
    _, invstd, weight, _ = norm
    dy.copy_(g * _per_channel(weight * invstd))


def _centred(y: Tensor, norm: Tensor) -> Tensor:
    """ŷ = (y − mean) · invstd."""
    mean, invstd, _, _ = norm
    return (y.to(norm.dtype) - _per_channel(mean)) * _per_channel(invstd)


def _scaled(normal: Tensor, norm: Tensor) -> Tensor:
    """z = weight · ŷ + bias."""
    _, _, weight, bias = norm
    return normal * _per_channel(weight) + _per_channel(bias)


def _gradient_of_normalised(
    grad_out: Tensor, normal: Tensor, norm: Tensor, channel_scale: Tensor | None, relu: bool
) -> Tensor:
    """The gradient with respect to z, zero where the ReLU holds back; NaN lets it pass."""
    g = grad_out.to(normal.dtype)
    if channel_scale is not None:
        g = g * channel_scale[:, :, None, None]
    if relu:
        g = torch.where(_scaled(normal, norm) <= 0, 0, g)
    return g


def _per_channel(vector: Tensor) -> Tensor:
    return vector[:, None, None]
