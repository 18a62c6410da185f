"""annnet::matrix_product: products of weights and pooled tokens, read and written in whatever dtype they have.

The matrices have as many rows as there are tokens or channels, so on a GPU each of them is one short launch, and a cast
ahead of it or behind it would be one more. The product is as accurate as in float32 (of float64, in float64), whatever
autocast says. On other devices :func:`matrix_product` is ``torch.mm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..autocast import no_autocast
from ..reference.operators import accumulator_of
from .registration import register, steps


def _allocate(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty((a.shape[0], b.shape[1]), dtype=dtype)


def _flops(a_shape: Sequence[int], b_shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


register(
    "matrix_product(Tensor a, Tensor b, ScalarType dtype) -> Tensor",
    allocate=_allocate,
    reference=reference.matrix_product_out,
    triton_module="matrix_product",
    flops=_flops,
)


def launches(device: torch.device) -> bool:
    """Whether work on this device is launched, so that a cast costs a launch of its own."""
    return device.type == "cuda"


def matrix_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a (M, K) times b (K, N) in ``dtype``; not differentiable."""
    if launches(a.device):
        product: Tensor = steps.matrix_product(a, b, dtype)
        return product
    wide = accumulator_of(a.dtype, b.dtype)
    with no_autocast(a.device.type):
        return torch.mm(a.to(wide), b.to(wide)).to(dtype)
