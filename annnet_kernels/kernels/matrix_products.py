"""Launches of the products of weights and tokens; see ``matrix_products_kernels``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.operators import matrix_of
from .launch import Device, Launch, device_of
from .matrix_products_kernels import matrix_product_kernel
from .operands import run_time
from .plans import planned
from .pyramid_pool import is_aligned

_ROWS, _COLUMNS = 64, 64
_HOPPER, _OTHERS = (32, 4, 3), (16, 8, 2)
"""Depth of a step, warps and stages. Hopper's products read shared memory; elsewhere those of a deeper step spill."""

_PRECISION = "tf32x3"
"""Three products of TF32 halves on tensor cores: an error like float32's, at several times the rate of its units."""


class Matrix(NamedTuple):
    """A matrix as a kernel argument."""

    pointer: Any
    row_stride: Any
    column_stride: Any


@planned
def matrix_products(*arguments: Any) -> list[Launch]:
    """The matrices, left, right and like of a program, and its products."""
    known = [x for x in arguments if isinstance(x, Tensor)]
    left, right, _ = (x for x in arguments if not isinstance(x, Tensor))
    device = device_of(known[0])
    targets = known[len(known) - len(left) :]
    factors = ((matrix_of(known, i), matrix_of(known, j)) for i, j in zip(left, right, strict=True))
    return [launch for (a, b), out in zip(factors, targets, strict=True) for launch in plan(a, b, out, device)]


def plan(a: Tensor, b: Tensor, out: Tensor, device: Device) -> list[Launch]:
    """out = a b."""
    rows, columns = a.shape[0], b.shape[1]
    aligned = all(map(_is_aligned, (a, b)))
    depth, warps, stages = _HOPPER if device.capability[0] == 9 else _OTHERS
    programs = -(-rows // _ROWS) * -(-columns // _COLUMNS)
    arguments = {
        "a": Matrix(a, *(a.stride() if aligned else map(run_time, a.stride()))),
        "b": Matrix(b, *(b.stride() if aligned else map(run_time, b.stride()))),
        "out_ptr": out,
        "rows": rows,
        "columns": columns,
        "depth": a.shape[1],
        "BLOCK_ROWS": _ROWS,
        "BLOCK_COLUMNS": _COLUMNS,
        "BLOCK_DEPTH": depth,
        "ALIGNED": aligned,
        "PRECISION": _PRECISION,
    }
    return [Launch(matrix_product_kernel, (programs,), arguments, warps, stages)] if programs else []


def _is_aligned(matrix: Tensor) -> bool:
    """Whether its rows or columns are dense and begin at multiples of 16 elements."""
    inner, outer = sorted(matrix.stride())
    return inner == 1 and outer % 16 == 0 and is_aligned(matrix)


def launch_variants(device: Device) -> Iterator[tuple[str, str, Launch]]:
    """(dtype, layout, launch): tokens and weights as they lie in a chain's forward and backward products."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = torch.empty((880, 1024), dtype=dtype, device="meta")
        wide = torch.empty((880, 1024), device="meta")
        weight = torch.empty((1024, 1024), device="meta")
        for (a, b), out in itertools.product(
            ((rows, weight.t()), (rows, weight), (rows.t(), wide), (wide.t(), rows), (wide, weight)), (rows, weight)
        ):
            target = torch.empty((a.shape[0], b.shape[1]), dtype=out.dtype, device="meta")
            yield str(dtype).removeprefix("torch."), "dense", plan(a, b, target, device)[0]
