"""annnet::matrix_products: products of weights and pooled tokens, read and written in whatever dtype they have.

The matrices have as many rows as there are tokens or channels, so on a GPU each product is one short launch, and a cast
ahead of it or behind it would be one more. Several products that build on each other are one call. They are as accurate
as in float32 (of float64, in float64), whatever autocast says. On other devices they are calls of ``torch.mm``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..reference.operators import accumulator_of, matrix_of
from ..runtime.autocast import no_autocast
from .registration import is_batch_of_gradients, register, steps


class Program(NamedTuple):
    """Products in their order. A factor is the number of a matrix, or of a product behind the matrices.

    ``~number`` is its transpose. ``like`` says which matrix has the dtype of each product, or :data:`WIDE`.
    """

    left: list[int]
    right: list[int]
    like: list[int]


WIDE = -1
"""In the place of a matrix whose dtype a product gets: float32, or float64 where a matrix is."""


def _allocate(
    matrices: Sequence[Tensor], left: Sequence[int], right: Sequence[int], like: Sequence[int]
) -> list[Tensor]:
    known, wide = list(matrices), accumulator_of(*(matrix.dtype for matrix in matrices))
    for i, j, source in zip(left, right, like, strict=True):
        shape = known[i].shape[0] if i >= 0 else known[~i].shape[1], known[j].shape[1] if j >= 0 else known[~j].shape[0]
        known.append(matrices[0].new_empty(shape, dtype=wide if source == WIDE else matrices[source].dtype))
    return known[len(matrices) :]


def _flops(shapes: Sequence[Sequence[int]], left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    known, total = [tuple(shape) for shape in shapes], 0
    for i, j in zip(left, right, strict=True):
        rows, depth = known[i] if i >= 0 else reversed(known[~i])
        columns = known[j][1] if j >= 0 else known[~j][0]
        known.append((rows, columns))
        total += 2 * rows * depth * columns
    return total


register(
    "matrix_products(Tensor[] matrices, int[] left, int[] right, int[] like) -> Tensor[]",
    allocate=_allocate,
    reference=reference.matrix_products_out,
    triton_module="matrix_products",
    flops=_flops,
)


def launches(device: torch.device) -> bool:
    """Whether work on this device is launched, so that a cast costs a launch of its own."""
    return device.type == "cuda"


def _stand_for_many(matrices: Sequence[Tensor]) -> bool:
    """Whether a transform batches the products, which PyTorch's own know how to do."""
    return torch._C._are_functorch_transforms_active() or any(map(is_batch_of_gradients, matrices))


def matrix_products(matrices: Sequence[Tensor], program: Program) -> list[Tensor]:
    """The products of a program, each a matrix in its dtype; not differentiable."""
    if launches(matrices[0].device) and not _stand_for_many(matrices):
        products: list[Tensor] = steps.matrix_products(list(matrices), *program)
        return products
    known, wide = list(matrices), accumulator_of(*(matrix.dtype for matrix in matrices))
    with no_autocast(matrices[0].device.type):
        for i, j, source in zip(*program, strict=True):
            a, b = matrix_of(known, i), matrix_of(known, j)
            product = torch.mm(a.to(wide), b.to(wide))
            known.append(product if source == WIDE else product.to(matrices[source].dtype))
    return known[len(matrices) :]
