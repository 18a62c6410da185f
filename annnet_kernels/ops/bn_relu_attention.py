"""annnet::asymmetric_attention_bn_relu: attention whose queries are normalised and rectified as they are loaded.

The query z = relu((y − mean) · invstd · weight + bias) is never written, and the sum with ``addend`` is written once:
out = softmax(scale · z Kᵀ) V + addend, by the in-place operator into ``addend`` itself. The backward operator returns
the gradient of z, which ``bn_relu_bwd_sums`` and ``bn_relu_bwd_input`` carry on to y. They are steps of the blocks' own
autograd Functions and have none themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..layouts import empty_map, empty_tokens, is_channels_last
from ..reference import prologue as reference
from .asymmetric_attention import attention_bwd_flops, attention_flops
from .registration import register


def _allocate(
    y: Tensor, mean: Tensor, invstd: Tensor, weight: Tensor, bias: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    batch, height, width = y.shape[0], *y.shape[2:]
    return empty_map(y, (batch, value.shape[1], height, width), is_channels_last(y)), _allocate_logsumexp(y)


def _allocate_logsumexp(y: Tensor, *_: Any) -> Tensor:
    return y.new_empty((y.shape[0], y.shape[2] * y.shape[3]), dtype=torch.promote_types(y.dtype, torch.float32))


def _allocate_bwd(
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
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = y.shape
    dz = empty_map(y, (batch, channels, height, width), is_channels_last(y)) if needs[0] else y.new_empty((0,))
    dkey = empty_tokens(key, *key.shape) if needs[1] else key.new_empty((0,))
    dvalue = empty_tokens(value, *value.shape) if needs[2] else value.new_empty((0,))
    return dz, dkey, dvalue


def _flops(y: Any, mean: Any, invstd: Any, weight: Any, bias: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return attention_flops(y, key, value)


def _flops_bwd(
    grad_out: Any,
    y: Any,
    mean: Any,
    invstd: Any,
    weight: Any,
    bias: Any,
    key: Any,
    value: Any,
    logsumexp: Any,
    scale: float,
    needs: Sequence[bool],
    *_: Any,
    **__: Any,
) -> int:
    return attention_bwd_flops(grad_out, y, key, value, logsumexp, scale, needs)


register(
    "asymmetric_attention_bn_relu(Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, Tensor key,"
    " Tensor value, Tensor? addend, float scale) -> (Tensor out, Tensor logsumexp)",
    allocate=_allocate,
    reference=reference.asymmetric_attention_bn_relu_out,
    triton_module="asymmetric_attention",
    flops=_flops,
)
# addend is a dense map (B, C_v, H, W), NCHW or channels_last.
register(
    "asymmetric_attention_bn_relu_(Tensor y, Tensor mean, Tensor invstd, Tensor weight, Tensor bias, Tensor key,"
    " Tensor value, Tensor(a!) addend, float scale) -> Tensor logsumexp",
    allocate=_allocate_logsumexp,
    reference=reference.asymmetric_attention_bn_relu_out,
    triton_module="asymmetric_attention",
    flops=_flops,
    written=7,
)
# needs: which of dz, dkey and dvalue are wanted; the others come back empty.
register(
    "asymmetric_attention_bn_relu_bwd(Tensor grad_out, Tensor y, Tensor mean, Tensor invstd, Tensor weight,"
    " Tensor bias, Tensor key, Tensor value, Tensor logsumexp, float scale, bool[] needs, str? backend)"
    " -> (Tensor dz, Tensor dkey, Tensor dvalue)",
    allocate=_allocate_bwd,
    reference=reference.asymmetric_attention_bn_relu_bwd_out,
    triton_module="asymmetric_attention",
    flops=_flops_bwd,
)
