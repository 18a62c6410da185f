"""The collapse: everything that is linear behind the attention moves onto the pooled tokens, exactly.

With A the N × T attention (its rows sum to 1), P the pooling (its columns sum to 1) and W_1, W_2 the two halves of the
bottleneck, the published chain

    value map → pooling → A V → W → concatenation with X_h → bottleneck

equals

    A U + X_h W_2ᵀ + c,    U = (Pᵀ X_l) W_vᵀ Wᵀ W_1ᵀ    (T rows),    c = W_1 (W b_v + b) + b_1.

The value map, the context map, its projection, the concatenation and half of the bottleneck are never made. The biases
stay out of U: a constant common to all tokens would cost the gradients of query and key accuracy, since the softmax's
backward has to cancel it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .functional import asymmetric_attention, pyramid_pool


class Projection(NamedTuple):
    """1 × 1 convolution, norm, ReLU: makes queries or keys."""

    conv: nn.Conv2d
    norm: nn.Module
    activation: nn.Module


class Parts(NamedTuple):
    """The modules of an AFNB or APNB, whatever their names; ``key is query`` in an APNB."""

    key: Projection
    query: Projection
    value: nn.Conv2d
    out: nn.Conv2d
    join: nn.Conv2d | None
    tail: Sequence[nn.Module]
    pools: Sequence[nn.AdaptiveAvgPool2d]
    containers: Sequence[nn.Module]

    @property
    def pool_sizes(self) -> list[tuple[int, int]]:
        return [cast("tuple[int, int]", pool.output_size) for pool in self.pools]


def collapsed_forward(parts: Parts, low: Tensor, high: Tensor) -> Tensor:
    """The block's output (B, C_out, H, W) from low (B, C_l, H_l, W_l) and high (B, C_h, H, W)."""
    if parts.key is parts.query:
        query = _project(parts.query, high, calls=2)
        key = pyramid_pool(query, parts.pool_sizes)
    else:
        query = _project(parts.query, high, calls=1)
        key = pyramid_pool(_project(parts.key, low, calls=1), parts.pool_sizes)
    value = _token_values(parts, pyramid_pool(low, parts.pool_sizes)).to(query.dtype)
    constant = _constant(parts)
    context = asymmetric_attention(query, key, value)
    if parts.join is None:
        return context + constant.to(context.dtype)[:, None, None]
    weight = parts.join.weight[:, parts.out.out_channels :]
    out = context + F.conv2d(high, weight, constant.to(weight.dtype))
    for module in parts.tail:
        out = module(out)
    return out


def _project(projection: Projection, x: Tensor, calls: int) -> Tensor:
    """relu(norm(conv(x))), computed once; ``calls`` is how often the published block does it."""
    rectified: Tensor = projection.activation(_normalise(projection.norm, projection.conv(x), calls))
    return rectified


def _normalise(norm: nn.Module, y: Tensor, calls: int) -> Tensor:
    """norm(y), leaving the running statistics of ``calls`` calls behind."""
    out: Tensor
    stateful = norm.training and any(True for _ in norm.buffers())
    if calls == 1 or not stateful:
        out = norm(y)
        return out
    if type(norm) is not nn.BatchNorm2d or norm.running_mean is None or norm.running_mean.dtype == torch.bfloat16:
        with torch.no_grad():
            for _ in range(calls - 1):
                norm(y)
        out = norm(y)
        return out
    # With momentum 1 the "running" statistics are the batch's own, from the pass that normalises.
    mean, var = torch.empty_like(norm.running_mean), torch.empty_like(norm.running_mean)
    out = F.batch_norm(y, mean.zero_(), var.zero_(), norm.weight, norm.bias, True, 1.0, norm.eps)
    for _ in range(calls):
        _update_running_statistics(norm, mean, var)
    return out


def _update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, unbiased_var: Tensor) -> None:
    """What one training call of ``norm`` does to its buffers."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)
        factor = 1.0 / norm.num_batches_tracked if norm.momentum is None else norm.momentum
        norm.running_mean.lerp_(mean, factor)
        norm.running_var.lerp_(unbiased_var, factor)


def _token_values(parts: Parts, pooled: Tensor) -> Tensor:
    """U, (B, C_out, T): pooled features (B, C_l, T) carried through every later projection, in float32 at least.

    The rows are few (110 per image), so the products are small; ``multi_dot`` picks the cheapest order by counted
    operations at the actual batch.
    """
    batch, _, tokens = pooled.shape
    with torch.autocast(pooled.device.type, enabled=False):
        accumulator = torch.promote_types(pooled.dtype, torch.float32)
        matrices = [conv.weight.flatten(1).t() for conv in (parts.value, parts.out)]
        if parts.join is not None:
            matrices.append(parts.join.weight[:, : parts.out.out_channels].flatten(1).t())
        rows = pooled.transpose(1, 2).flatten(0, 1)
        values: Tensor = torch.linalg.multi_dot([m.to(accumulator) for m in (rows, *matrices)])
        return values.view(batch, tokens, values.shape[1]).transpose(1, 2)


def _constant(parts: Parts) -> Tensor:
    """c, (C_out): what the biases amount to once they have passed through A unchanged; float32 at least."""
    with torch.autocast(parts.value.weight.device.type, enabled=False):
        constant = _affine(parts.out.weight, _bias(parts.value), _bias(parts.out))
        if parts.join is not None:
            context_half = parts.join.weight[:, : parts.out.out_channels]
            constant = _affine(context_half, constant, _bias(parts.join))
        return constant


def _affine(weight: Tensor, x: Tensor, bias: Tensor) -> Tensor:
    return torch.addmv(bias, weight.flatten(1).to(x.dtype), x)


def _bias(conv: nn.Conv2d) -> Tensor:
    accumulator = torch.promote_types(conv.weight.dtype, torch.float32)
    if conv.bias is None:
        return conv.weight.new_zeros(conv.out_channels, dtype=accumulator)
    return conv.bias.to(accumulator)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def why_plain(parts: Parts) -> str | None:
    """Why the block must run its published forward: a module whose forward would be skipped is not what it seems.

    Whoever replaces, hooks or wraps an inner module expects it to be called. None if the collapse may run.
    """
    for kind, module in _skipped(parts):
        actual = type(module)
        if parametrize.is_parametrized(module):
            actual = actual.__bases__[0]
        name = actual.__name__
        if kind is not None and actual is not kind:
            return f"{name} in the place of {kind.__name__}"
        if "forward" in module.__dict__:
            return f"{name} with a forward of its own"
        for hooks in HOOKS:
            if getattr(module, hooks):
                return f"{name} carries {hooks.strip('_').replace('_', ' ')}"
        if isinstance(module, nn.Conv2d) and not _is_pointwise(module):
            return f"{name} is no plain 1 × 1 convolution: {module.extra_repr()}"
        if isinstance(module, nn.AdaptiveAvgPool2d) and not _is_fixed(module):
            return f"{name} keeps a dimension of the map: output_size={module.output_size}"
    return None


def _skipped(parts: Parts) -> Iterator[tuple[type | None, nn.Module]]:
    """The modules that the collapse does not call, with the class each must be (None: any container)."""
    for conv in (parts.value, parts.out, parts.join):
        if conv is not None:
            yield nn.Conv2d, conv
    for pool in parts.pools:
        yield nn.AdaptiveAvgPool2d, pool
    for container in parts.containers:
        yield None, container
    if parts.key is parts.query and type(parts.query.norm) is nn.BatchNorm2d:
        yield nn.BatchNorm2d, parts.query.norm


def _is_pointwise(conv: nn.Conv2d) -> bool:
    """Whether the convolution is a product over channels and nothing else."""
    shape = (conv.kernel_size, conv.stride, conv.padding, conv.groups)
    return shape == ((1, 1), (1, 1), (0, 0), 1)


def _is_fixed(pool: nn.AdaptiveAvgPool2d) -> bool:
    """Whether the pool has a size of its own for both dimensions."""
    size = pool.output_size
    return None not in size if isinstance(size, tuple) else size is not None
