"""Values of tokens: pooled features carried through a chain of weights, forward and backward in few launches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .functions import is_traced
from .matrix_products import WIDE, Program, matrix_products
from .normalized import Gradients

Order = Any
"""How a chain of matrices is multiplied: the number of one of them, or a pair of orders."""


def program_of(order: Order, count: int, like: int) -> Program:
    """The products of ``order`` over ``count`` matrices, wide on the way; the last has the dtype of matrix ``like``."""
    steps = _steps(order)
    numbers: dict[Order, int] = {**{i: i for i in range(count)}, **{step: count + i for i, step in enumerate(steps)}}
    left, right = ([numbers[step[side]] for step in steps] for side in (0, 1))
    return Program(left, right, [like if step == order else WIDE for step in steps])


def _steps(order: Order) -> list[Order]:
    """Every product of ``order``, each behind those that it is made from."""
    return [] if isinstance(order, int) else [*_steps(order[0]), *_steps(order[1]), order]


def order_of(rows: Tensor, weights: Sequence[Tensor]) -> Order:
    """How to multiply rows (R, C) with weights (C_out, C_in): at the fewest operations.

    Traced code multiplies the weights behind the first ahead of the rest: comparing sizes would tie it to the batch
    that it was traced with.
    """
    if not is_traced() and isinstance(rows.shape[0], int):  # a symbol where make_fx traces
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
    """tokens (B, C, T), weights (C_v, C), (C_o, C_v) and, if given, (C_out, C_o) → (B, C_out, T).

    Sums are float32 at least, and so are the products on the way.

    These are outputs, too, because the backward pass needs them.
    """

    @staticmethod
    def forward(
        tokens: Tensor, value_weight: Tensor, out_weight: Tensor, context_weight: Tensor | None
    ) -> tuple[Tensor, ...]:
        weights = _present(value_weight, out_weight, context_weight)
        leaves = _leaves(tokens, weights)
        *made, values = matrix_products(leaves, program_of(order_of(leaves[0], weights), len(leaves), like=0))
        return _tokens_of(values, tokens), *made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        tokens, *given = inputs
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
            return (None,) * 4
        needed = ctx.needs_input_grad
        leaves = _leaves(tokens, weights)
        drows, *dweights = chain_gradients(order_of(leaves[0], weights), leaves, made, needed, _rows_of(grad))
        dtokens = None if drows is None else _tokens_of(drows, tokens)
        shaped = [None if g is None else g.view_as(w) for g, w in zip(dweights, weights, strict=True)]
        return dtokens, *shaped, *(None,) * (3 - len(shaped))


def chain_gradients(
    order: Order, leaves: Sequence[Tensor], made: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of rows and weights: leaves are the rows and the transposed weights, ``made`` the products on the way.

    That of a weight is made as it lies in memory, not transposed.
    """
    program, places = gradient_program(order, len(leaves), tuple(needed[: len(leaves)]))
    gradients = matrix_products([*leaves, *made, grad], program) if program.left else []
    return [None if place is None else gradients[place] for place in places]


@cache
def gradient_program(order: Order, count: int, needed: tuple[bool, ...]) -> tuple[Program, list[int | None]]:
    """Products that make the gradients of the leaves, from leaves, products on the way, and the gradient of the last.

    Beside the program, which of its products is the gradient of each leaf.
    """
    steps = _steps(order)
    numbers: dict[Order, int] = {**{i: i for i in range(count)}, **{step: count + i for i, step in enumerate(steps)}}
    first = count + len(steps)  # the number of the first product; the gradient stands where the last of the steps would
    gradients: dict[Order, int] = {order: first - 1}
    program = Program([], [], [])

    def reaches(side: Order) -> bool:
        return needed[side] if isinstance(side, int) else any(map(reaches, side))

    for step in reversed(steps):
        if step not in gradients:
            continue
        own = gradients[step]
        for side, a, b in ((step[0], own, ~numbers[step[1]]), (step[1], ~numbers[step[0]], own)):
            if not reaches(side):
                continue
            if isinstance(side, int) and side > 0:
                a, b = ~b, ~a  # the transpose of the product
            gradients[side] = first + len(program.left)
            program.left.append(a)
            program.right.append(b)
            program.like.append(side if isinstance(side, int) else WIDE)
    return program, [gradients[i] - first if i in gradients else None for i in range(count)]


def _present(*weights: Tensor | None) -> list[Tensor]:
    return [weight for weight in weights if weight is not None]


def _leaves(tokens: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The matrices of the chain, whose product has a row per token."""
    return [_rows_of(tokens), *(weight.view(weight.shape[:2]).t() for weight in weights)]


def _rows_of(tokens: Tensor) -> Tensor:
    """(B, C, T) → (B · T, C), without a copy where tokens are token-major."""
    rows = tokens.transpose(1, 2)
    if is_traced():
        return rows.reshape(-1, tokens.shape[1])
    return (rows if rows.is_contiguous() else rows.contiguous()).view(-1, tokens.shape[1])


def _tokens_of(rows: Tensor, like: Tensor) -> Tensor:
    """(B · T, C) → (B, C, T), with batch and tokens of ``like``."""
    return rows.view(like.shape[0], like.shape[2], rows.shape[1]).transpose(1, 2)
