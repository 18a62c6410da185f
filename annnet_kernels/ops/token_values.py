"""Values of tokens: pooled features carried through a chain of weights, forward and backward in few launches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .functions import is_traced, once_differentiable
from .matrix_products import WIDE, Program, matrix_products
from .normalized import Gradients

Order = Any
"""How a chain of matrices is multiplied: the number of one of them, or a pair of orders."""


@cache
def program_of(order: Order, count: int, like: int) -> Program:
    """The products of ``order`` over rows and weights, wide on the way; the last has the form of factor ``like``."""
    steps = _steps(order)
    numbers = _numbers(steps, count)
    left, right = ([numbers[step[side]] for step in steps] for side in (0, 1))
    return Program(left, right, [like if step == order else WIDE for step in steps])


def _numbers(steps: Sequence[Order], count: int) -> dict[Order, int]:
    """Of the factors and of the products on the way; rows are multiplied with the transpose of a weight."""
    factors = {i: ~i if i else i for i in range(count)}
    return {**factors, **{step: count + i for i, step in enumerate(steps)}}


def _steps(order: Order) -> list[Order]:
    """Every product of ``order``, each behind those that it is made from."""
    return [] if isinstance(order, int) else [*_steps(order[0]), *_steps(order[1]), order]


def order_of(tokens: Tensor, weights: Sequence[Tensor]) -> Order:
    """How to multiply the rows of tokens (B, C, T) with weights (C_out, C_in, 1, 1): at the fewest operations.

    Traced code multiplies the weights behind the first ahead of the rest: comparing sizes would tie it to the batch
    that it was traced with.
    """
    batch, channels, count = tokens.shape
    if not is_traced() and isinstance(batch, int):  # a symbol where make_fx traces
        return cheapest_order((batch * count, channels, *(weight.shape[0] for weight in weights)))
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
        factors = _present(tokens, value_weight, out_weight, context_weight)
        *made, values = matrix_products(factors, program_of(order_of(tokens, factors[1:]), len(factors), like=0))
        return values, *made

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        factors, made = _present(*inputs), output[1:]
        ctx.mark_non_differentiable(*made)
        ctx.set_materialize_grads(False)
        ctx.number = len(factors)
        ctx.save_for_backward(*factors, *made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Gradients:
        if grad is None:
            return (None,) * 4
        saved = ctx.saved_tensors
        factors, made = saved[: ctx.number], saved[ctx.number :]
        order = order_of(factors[0], factors[1:])
        gradients = chain_gradients(order, factors, made, ctx.needs_input_grad, grad)
        return *gradients, *(None,) * (4 - len(gradients))


def chain_gradients(
    order: Order, factors: Sequence[Tensor], made: Sequence[Tensor], needed: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of tokens and weights, from those, the products on the way and the gradient of the last one."""
    program, places = gradient_program(order, len(factors), tuple(needed[: len(factors)]))
    gradients = matrix_products([*factors, *made, grad], program) if program.left else []
    return [None if place is None else gradients[place] for place in places]


@cache
def gradient_program(order: Order, count: int, needed: tuple[bool, ...]) -> tuple[Program, list[int | None]]:
    """Products that make the gradients of the factors, from these, products on the way, and the gradient of the last.

    Beside the program, which of its products is the gradient of each factor. That of a weight is made as it lies in
    memory, not transposed.
    """
    steps = _steps(order)
    numbers = _numbers(steps, count)
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


def _present(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]
