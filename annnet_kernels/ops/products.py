"""annnet::matrix_product, pointwise_convolution: products of weights with maps and each other, where C++ is faster.

PyTorch's own products of float32 on a CPU leave much of it unused: on an AMD EPYC (Zen 5, two cores, 500 GFLOP/s)
``torch.mm`` reaches 180, and the library's 1 × 1 convolution of a map in NCHW 290 to 410, in its weight gradient 290 to
330. These operators reach 380 to 440 in all of them. In channels_last the library is the faster one.

They are steps of the Functions here and have no derivative of their own. What they do not serve goes to PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import native
from ..autocast import autocast_dtype
from ..backends import requested_backend
from ..layouts import is_channels_last
from .functions import apply
from .registration import register


def _allocate(a: Tensor, b: Tensor, bias: Tensor | None, summed: bool, *_: Any) -> Tensor:
    return a.new_empty((1 if summed else a.shape[0], a.shape[1], b.shape[2]))


def _reference(a: Tensor, b: Tensor, bias: Tensor | None, summed: bool, out: Tensor) -> None:
    product = torch.bmm(a, b)
    if summed:
        product = product.sum(0, keepdim=True)
    out.copy_(product if bias is None else product + bias[:, None])


def _flops(a: Any, b: Any, *_: Any, **__: Any) -> int:
    images, rows, depth = a
    return 2 * int(images * rows * depth * b[2])


def _allocate_convolution(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((x.shape[0], weight.shape[0], *x.shape[2:]))


def _allocate_convolution_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool], *_: Any
) -> tuple[Tensor, ...]:
    shapes = x.shape, weight.shape, weight.shape[:1]
    return tuple(x.new_empty(shape if needed else (0,)) for shape, needed in zip(shapes, needs, strict=True))


def _reference_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    out.copy_(F.conv2d(x, weight, bias))


def _reference_convolution_bwd(grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool], *out: Tensor) -> None:
    for target, gradient in zip(out, _library_gradients(grad, x, weight, needs), strict=True):
        if gradient is not None:
            target.copy_(gradient)


def _library_gradients(grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]) -> tuple[Any, ...]:
    geometry = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    gradients: tuple[Any, ...] = torch.ops.aten.convolution_backward(
        grad, x, weight, [weight.shape[0]], *geometry, list(needs)
    )
    return gradients


def _convolution_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * int(math.prod(x) * weight[0])


def _convolution_bwd_flops(grad: Any, x: Any, weight: Any, needs: Sequence[bool], *_: Any, **__: Any) -> int:
    return sum(needs[:2]) * _convolution_flops(x, weight)


# (B, M, K) (B, K, N) + bias (M) → (B, M, N), or, summed over B, (1, M, N). Any strides; a bias is not summed.
register(
    "matrix_product(Tensor a, Tensor b, Tensor? bias, bool summed) -> Tensor",
    allocate=_allocate,
    reference=_reference,
    triton_module=None,
    native_dtype=torch.float32,
    flops=_flops,
)
# x (B, C, H, W), weight (C_out, C, 1, 1), bias (C_out) → (B, C_out, H, W), in NCHW.
register(
    "pointwise_convolution(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    allocate=_allocate_convolution,
    reference=_reference_convolution,
    triton_module=None,
    native_dtype=torch.float32,
    flops=_convolution_flops,
)
# needs: which of dx, dweight and dbias are wanted; the others come back empty.
register(
    "pointwise_convolution_bwd(Tensor grad, Tensor x, Tensor weight, bool[] needs, str? backend)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    allocate=_allocate_convolution_bwd,
    reference=_reference_convolution_bwd,
    triton_module=None,
    native_dtype=torch.float32,
    flops=_convolution_bwd_flops,
)


def _is_served(a: Tensor, b: Tensor) -> bool:
    """Whether the C++ product makes these, of float32 as they are; what is exported keeps standard operators."""
    return (
        a.device.type == "cpu"
        and b.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and requested_backend() in (None, "native")
        and native.is_loaded()
        and autocast_dtype("cpu") is None
        and not torch.compiler.is_exporting()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    )


def serves_convolution(x: Tensor, weight: Tensor) -> bool:
    """Whether C++ makes the pointwise convolution of x with weight, rather than the library."""
    return not is_channels_last(x) and _is_served(x, weight)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    product: Tensor = torch.ops.annnet.matrix_product(a[None], b[None], None, False)
    return product.squeeze(0)


class MatrixProduct(torch.autograd.Function):
    """a (M, K), b (K, N) → a b. The gradient of a transposed operand is transposed, as a weight's own would be."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return _multiply(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.transposed = [operand.stride(0) == 1 for operand in inputs]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        a, b = ctx.saved_tensors
        da = db = None
        if ctx.needs_input_grad[0]:
            da = _multiply(b, grad.t()).t() if ctx.transposed[0] else _multiply(grad, b.t())
        if ctx.needs_input_grad[1]:
            db = _multiply(grad.t(), a).t() if ctx.transposed[1] else _multiply(a.t(), grad)
        return da, db


class PointwiseConvolution(torch.autograd.Function):
    """x (B, C, H, W), weight (C_out, C, 1, 1), bias (C_out) or None → (B, C_out, H, W), in NCHW."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out: Tensor = torch.ops.annnet.pointwise_convolution(x, weight, bias)
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        return convolution_gradients(grad, x, weight, ctx.needs_input_grad, served=True)


def convolution_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool], *, served: bool
) -> tuple[Any, ...]:
    """Gradients of x, weight and bias, None where ``needs`` says no; by C++ where it made the output."""
    if not served:
        return _library_gradients(grad, x, weight, needs)
    gradients = torch.ops.annnet.pointwise_convolution_bwd(grad, x, weight, list(needs), "native")
    return tuple(gradient if needed else None for gradient, needed in zip(gradients, needs, strict=True))


def matrix_product(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) (K, N) → (M, N), with gradients."""
    product: Tensor = apply(MatrixProduct, a, b) if _is_served(a, b) else torch.mm(a, b)
    return product


def chain_product(matrices: Sequence[Tensor]) -> Tensor:
    """The product of all, in the order that takes the fewest operations."""
    if len(matrices) == 1:
        return matrices[0]
    split = _cheapest_chain((matrices[0].shape[0], *(matrix.shape[1] for matrix in matrices)))[1]
    return matrix_product(chain_product(matrices[:split]), chain_product(matrices[split:]))


@cache
def _cheapest_chain(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Multiplications of the product of matrices (sizes[0], sizes[1]), (sizes[1], sizes[2]), …, and its last split."""
    if len(sizes) <= 2:
        return 0, 0

    def cost(split: int) -> int:
        own = sizes[0] * sizes[split] * sizes[-1]
        return own + _cheapest_chain(sizes[: split + 1])[0] + _cheapest_chain(sizes[split:])[0]

    return min((cost(split), split) for split in range(1, len(sizes) - 1))


def pointwise_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of x (B, C, H, W) with a weight (C_out, C, 1, 1), with gradients, in the layout of x."""
    if not serves_convolution(x, weight):
        return F.conv2d(x, weight, bias)
    out: Tensor = apply(PointwiseConvolution, x, weight, bias)
    return out
