"""annnet::matrix_products: products of weights and pooled tokens, read and written in whatever dtype they have.

A factor is a matrix, a weight (C_out, C_in, 1, 1), or tokens (B, C, T), a row per token. There are as many rows as
tokens or channels, so on a GPU each product is one short launch, and a cast ahead of it or behind it would be one more.
Several products that build on each other are one call. They are as accurate as in float32 (of float64, in float64),
whatever autocast says. On other devices they are calls of ``torch.mm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..layouts import empty_tokens
from ..reference.operators import accumulator_of, as_matrix
from ..runtime.autocast import no_autocast
from . import registration
from .registration import is_batch_of_gradients, register, steps


class Program(NamedTuple):
    """Products in their order. A factor has a number; the products follow behind the factors that are given.

    ``~number`` is its transpose. ``like`` says which factor has the dtype and the form of each product: that of tokens
    has their batch, that of a weight is a weight. Or it is :data:`WIDE`.
    """

    left: list[int]
    right: list[int]
    like: list[int]


WIDE = -1
"""In the place of a factor whose dtype and form a product gets: a matrix, float32, or float64 where a factor is."""


def _allocate(
    factors: Sequence[Tensor], left: Sequence[int], right: Sequence[int], like: Sequence[int]
) -> list[Tensor]:
    sizes = [_size_of(x.shape) for x in factors]
    wide = accumulator_of(*(x.dtype for x in factors))
    products = []
    for i, j, source in zip(left, right, like, strict=True):
        size = sizes[i][0] if i >= 0 else sizes[~i][1], sizes[j][1] if j >= 0 else sizes[~j][0]
        sizes.append(size)
        if source == WIDE:
            products.append(factors[0].new_empty(size, dtype=wide))
        else:
            products.append(_empty_like(factors[source], size))
    return products


def _size_of(shape: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a factor."""
    return (shape[0] * shape[2], shape[1]) if len(shape) == 3 else (shape[0], shape[1])


def _empty_like(source: Tensor, size: tuple[int, int]) -> Tensor:
    """Memory for a product of ``size`` that has the form of ``source``."""
    if source.dim() == 3:
        return empty_tokens(source, source.shape[0], size[1], source.shape[2])
    return source.new_empty(size if source.dim() == 2 else (*size, 1, 1))


def _flops(shapes: Sequence[Sequence[int]], left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    sizes, total = list(map(_size_of, shapes)), 0
    for i, j in zip(left, right, strict=True):
        rows, depth = sizes[i] if i >= 0 else reversed(sizes[~i])
        columns = sizes[j][1] if j >= 0 else sizes[~j][0]
        sizes.append((rows, columns))
        total += 2 * rows * depth * columns
    return total


register(
    "matrix_products(Tensor[] factors, int[] left, int[] right, int[] like) -> Tensor[]",
    allocate=_allocate,
    reference=reference.matrix_products_out,
    triton_module="matrix_products",
    flops=_flops,
)


def _stand_for_many(factors: Sequence[Tensor]) -> bool:
    """Whether a transform batches the products, which PyTorch's own know how to do."""
    return torch._C._are_functorch_transforms_active() or any(map(is_batch_of_gradients, factors))


def matrix_products(factors: Sequence[Tensor], program: Program) -> list[Tensor]:
    """The products of a program, each in its dtype and form; not differentiable."""
    if registration.launches(factors[0]) and not _stand_for_many(factors):
        products: list[Tensor] = steps.matrix_products(list(factors), *program)
        return products
    matrices, wide = list(map(as_matrix, factors)), accumulator_of(*(x.dtype for x in factors))
    with no_autocast(factors[0].device.type):
        for i, j in zip(program.left, program.right, strict=True):
            a, b = (matrices[n] if n >= 0 else matrices[~n].t() for n in (i, j))
            matrices.append(torch.mm(a.to(wide), b.to(wide)))
    made = matrices[len(factors) :]
    return [x if source == WIDE else _formed(x, factors[source]) for x, source in zip(made, program.like, strict=True)]


def _formed(product: Tensor, source: Tensor) -> Tensor:
    """A product in the dtype and form of ``source``."""
    product = product.to(source.dtype)
    if source.dim() == 3:
        return product.view(source.shape[0], source.shape[2], product.shape[1]).transpose(1, 2)
    return product if source.dim() == 2 else product[:, :, None, None]
