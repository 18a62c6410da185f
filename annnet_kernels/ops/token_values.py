"""Values of tokens: pooled features carried through a chain of weights, forward and backward in few launches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..reference.operators import accumulator_of
from .functions import is_traced
from .matrix_product import matrix_product
from .normalized import Gradients

Order = Any
"""How a chain of matrices is multiplied: the number of one of them, or a pair of orders."""


def multiply(order: Order, matrices: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """The product in ``dtype``, and the products on the way to it, as ``_steps`` lists them."""
    products: dict[Order, Tensor] = dict(enumerate(matrices))
    steps = _steps(order)
    wide = accumulator_of(*(matrix.dtype for matrix in matrices))
    for step in steps:
        products[step] = matrix_product(products[step[0]], products[step[1]], dtype if step == order else wide)
    return products[order], [products[step] for step in steps[:-1]]


def _steps(order: Order) -> list[Order]:
    """Every product of ``order``, each behind those that it is made from."""
    return [] if isinstance(order, int) else [*_steps(order[0]), *_steps(order[1]), order]


def order_of(rows: Tensor, weights: Sequence[Tensor]) -> Order:
    """How to multiply rows (R, C) with weights (C_out, C_in): at the fewest operations.

    Traced code multiplies the weights behind the first ahead of the rest: comparing sizes would tie it to the batch
    that it was traced with.
    """
    if not is_traced():
        return cheapest_order((rows.shape[0], rows.shape[1], *(weight.shape[0] for weight in weights)))
    if len(weights) == 1:
        return (0, 1)
    rest: Order = 2
    for number in range(3, len(weights) + 1):
        rest = (rest, number)
    return ((0, 1), rest)


def cheapest_order(sizes: tuple[int, ...]) -> Order:
    """The order with the fewest operations for matrices (sizes[0], sizes[1]), (sizes[1], sizes[2]), …"""
    return _cheapest(sizes, 0)[1]


@cache
def _cheapest(sizes: tuple[int, ...], first: int) -> tuple[int, Order]:
    """Multiplications, and their order, of a chain whose first matrix has the number ``first``."""
    if len(sizes) == 2:
        return 0, first
    choices = []
    for split in range(1, len(sizes) - 1):
        (cost, left), (other, right) = _cheapest(sizes[: split + 1], first), _cheapest(sizes[split:], first + split)
        choices.append((cost + other + sizes[0] * sizes[split] * sizes[-1], (left, right)))
    return min(choices, key=lambda choice: choice[0])


class TokenValues(torch.autograd.Function):
    """tokens (B, C, T), weights (C_v, C), (C_o, C_v) and, if given, (C_out, C_o) → (B, C_out, T) in ``dtype``.

    Sums are float32 at least, and so are the products on the way.

    These are outputs, too, because the backward pass needs them.
    """

    @staticmethod
    def forward(
        tokens: Tensor, dtype: torch.dtype, value_weight: Tensor, out_weight: Tensor, context_weight: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights = _present(value_weight, out_weight, context_weight)
        leaves = _leaves(tokens, weights)
        values, made = multiply(order_of(leaves[0], weights), leaves, dtype)
        return _tokens_of(values, tokens), *made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tokens, _, *given = inputs
        weights, made = _present(*given), output[1:]
        ctx.mark_non_differentiable(*made)
        ctx.set_materialize_grads(False)
        ctx.number = len(weights)
        ctx.save_for_backward(tokens, *weights, *made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Gradients:
        tokens, *others = ctx.saved_tensors
        weights, made = others[: ctx.number], others[ctx.number :]
        if grad is None:
            return (None,) * 5
        needed = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
        leaves = _leaves(tokens, weights)
        drows, *dweights = chain_gradients(order_of(leaves[0], weights), leaves, made, needed, _rows_of(grad))
        dtokens = None if drows is None else _tokens_of(drows, tokens)
        shaped = [None if g is None else g.view_as(w) for g, w in zip(dweights, weights, strict=True)]
        return dtokens, None, *shaped, *(None,) * (3 - len(shaped))


def chain_gradients(
    order: Order, leaves: Sequence[Tensor], made: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of rows and weights: leaves are the rows and the transposed weights, ``made`` as multiply() returns it.

    That of a weight is made as it lies in memory, not transposed.
    """
    steps = _steps(order)
    products: dict[Order, Tensor] = {**dict(enumerate(leaves)), **dict(zip(steps[:-1], made, strict=True))}
    wide = accumulator_of(*(leaf.dtype for leaf in leaves))
    gradients: dict[Order, Tensor] = {order: grad}

    def reaches(side: Order) -> bool:
        return needed[side] if isinstance(side, int) else any(map(reaches, side))

    for step in reversed(steps):
        if step not in gradients:
            continue
        own = gradients.pop(step)
        for side, a, b in ((step[0], own, products[step[1]].t()), (step[1], products[step[0]].t(), own)):
            if not reaches(side):
                continue
            if isinstance(side, int) and side > 0:
                gradients[side] = matrix_product(b.t(), a.t(), leaves[side].dtype)
            else:
                gradients[side] = matrix_product(a, b, leaves[0].dtype if side == 0 else wide)
    return [gradients.get(number) for number in range(len(leaves))]


def _present(*weights: Tensor | None) -> list[Tensor]:
    return [weight for weight in weights if weight is not None]


def _leaves(tokens: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The matrices of the chain, whose product has a row per token."""
    return [_rows_of(tokens), *(weight.view(weight.shape[:2]).t() for weight in weights)]


def _rows_of(tokens: Tensor) -> Tensor:
    """(B, C, T) → (B · T, C), without a copy where tokens are token-major."""
    rows = tokens.transpose(1, 2)
    return (rows if rows.is_contiguous() else rows.contiguous()).view(-1, tokens.shape[1])


def _tokens_of(rows: Tensor, like: Tensor) -> Tensor:
    """(B · T, C) → (B, C, T), with batch and tokens of ``like``."""
    return rows.view(like.shape[0], like.shape[2], rows.shape[1]).transpose(1, 2)
