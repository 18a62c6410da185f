"""``python -m benchmarks accuracy``: errors of both operators, ours and plain PyTorch's, relative to float64.

Every figure is the median over fresh random draws of ‖result − truth‖ / ‖truth‖; the truth is plain PyTorch in float64.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

import annnet_kernels as ak
from annnet_kernels.pyramid import POOL_SIZES

from .providers import plain_attention, plain_pool
from .verify import FACTOR, FLOOR

Operator = Callable[..., Tensor]


class Row(NamedTuple):
    """An operator on random operands of these shapes: a map, then tokens; ``spread`` multiplies the map."""

    name: str
    ours: Operator
    plain: Operator
    shapes: tuple[tuple[int, ...], ...]
    spread: float = 1.0


def _attention_row(batch: int, key: int, value: int, height: int, width: int, tokens: int, spread: float = 1.0) -> Row:
    name = f"attention {key}/{value}, {batch}×{height}×{width}, {tokens} tokens"
    name += f", σ(logits) = {spread:g}" if spread != 1 else ""
    shapes = ((batch, key, height, width), (batch, key, tokens), (batch, value, tokens))
    return Row(name, ak.asymmetric_attention, plain_attention, shapes, spread)


def _pool_row(batch: int, channels: int, height: int, width: int) -> Row:
    name = f"pooling {channels}, {batch}×{height}×{width}"
    return Row(name, lambda x: ak.pyramid_pool(x, POOL_SIZES), plain_pool, ((batch, channels, height, width),))


ROWS = (
    _attention_row(2, 19, 48, 33, 40, 110),
    _attention_row(1, 80, 96, 33, 40, 110),
    _attention_row(1, 256, 256, 65, 65, 110),
    _attention_row(1, 512, 512, 33, 40, 110),
    _attention_row(1, 256, 2048, 17, 23, 110),
    _attention_row(1, 64, 64, 33, 40, 1),
    _attention_row(1, 64, 64, 33, 40, 1024),
    _attention_row(64, 64, 64, 1, 1, 110),
    _attention_row(1, 256, 256, 33, 40, 110, spread=8.0),
    _attention_row(1, 256, 256, 33, 40, 110, spread=16.0),
    _pool_row(2, 64, 97, 97),
    _pool_row(1, 19, 65, 129),
    _pool_row(2, 48, 5, 3),
)


def run(device: torch.device, seeds: int, console: Console) -> int:
    """Print the table; 1 if a median of ours is beyond the project's rule."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    table = Table(box=box.SIMPLE_HEAD, title=f"error, ours / plain, medians of {seeds} draws, {device}")
    for heading in ("operator", "dtype", "output", "map gradient", "key gradient", "value gradient"):
        table.add_column(heading)
    failed = 0
    for row in ROWS:
        for dtype in dtypes:
            cells = []
            for mine, theirs in _medians(row, dtype, device, seeds):
                within = mine <= FACTOR * theirs + FLOOR[str(dtype).removeprefix("torch.")]
                failed += not within
                cells.append(f"{mine:.1e} / {theirs:.1e}" + ("" if within else " BEYOND"))
            table.add_row(row.name, str(dtype).removeprefix("torch."), *cells)
    console.print(table)
    console.print(f"Rule: ours at most {FACTOR} × plain + rounding floor; beyond it: {failed}.")
    return int(failed > 0)


def _medians(row: Row, dtype: torch.dtype, device: torch.device, seeds: int) -> list[tuple[float, float]]:
    """(ours, plain) of the output and of every operand's gradient."""
    draws = [list(_errors(row, dtype, device)) for _ in range(seeds)]
    return [
        (statistics.median(mine for mine, _ in column), statistics.median(theirs for _, theirs in column))
        for column in zip(*draws, strict=True)
    ]


def _errors(row: Row, dtype: torch.dtype, device: torch.device) -> Iterator[tuple[float, float]]:
    """One draw: (ours, plain) of the output and of every operand's gradient."""

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.float64).to(dtype)

    operands = [draw(row.shapes[0]) * row.spread]
    # Tokens lie as pyramid_pool returns them.
    operands += [draw((batch, tokens, channels)).transpose(1, 2) for batch, channels, tokens in row.shapes[1:]]
    upstream = draw(tuple(row.plain(*operands).shape))
    results = (
        _with_gradients(function, [x.to(kind) for x in operands], upstream.to(kind))
        for function, kind in ((row.ours, dtype), (row.plain, dtype), (row.plain, torch.float64))
    )
    for ours, plain, truth in zip(*results, strict=True):
        yield _error(ours, truth), _error(plain, truth)


def _with_gradients(function: Operator, operands: list[Tensor], upstream: Tensor) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in operands]
    out = function(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


def _error(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm().clamp_min(1e-300))  # of one token, dQ and dK are zero
