"""annnet::matrix_product, pointwise_convolution: products of weights with maps and each other, where C++ is faster.

PyTorch's own products of float32 on a CPU leave much of it unused: on an AMD EPYC (Zen 5, two cores, 500 GFLOP/s)
``torch.mm`` reaches 180, and the library's 1 × 1 convolution of an image of 49 × 49 or 97 × 97 pixels in NCHW 290 to
410, in its weight gradient 290 to 330. These operators reach 350 to 440 in all of them. In channels_last, on small maps
and without AVX2 the library is the faster one.

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
from ..tracers import exporting, jit_tracing
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
    "matrix_product(Tensor a, Tensor b, Tensor? bias, bool summed, str? backend) -> Tensor",
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


_HAS_KERNELS = native.why_not("cpu", "pointwise_convolution_bwd") is None
_IS_FASTER = _HAS_KERNELS and native.cpu_level() != "baseline"

_LEAST_PIXELS = 512
"""Of an image, for a convolution of ours: on smaller maps, in batches, the library's takes less time."""


def _can_serve(first: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels take these, as they are; what is exported keeps standard operators."""
    return (
        _HAS_KERNELS
        and all(x is None or (x.is_cpu and x.dtype == torch.float32) for x in (first, *others))
        and autocast_dtype(first) is None
        and not exporting()
        and not jit_tracing()
    )


def _is_wanted() -> bool:
    """Whether the kernels are asked for, or nothing is and they are the faster ones."""
    requested = requested_backend()
    return requested == "native" or (requested is None and _IS_FASTER)


def serves_convolution(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether C++ makes this pointwise convolution, rather than the library.

    In traced code the size of the map does not decide: the program would hold on one side of the limit only.
    """
    if is_channels_last(x) or not _can_serve(x, weight, bias) or not _is_wanted():
        return False
    return torch.compiler.is_compiling() or x.shape[2] * x.shape[3] >= _LEAST_PIXELS


def _multiply(a: Tensor, b: Tensor, served: bool) -> Tensor:
    if not served:
        return torch.mm(a, b)
    product: Tensor = torch.ops.annnet.matrix_product(a[None], b[None], None, False, "native")
    return product.squeeze(0)


class MatrixProduct(torch.autograd.Function):
    """a (M, K), b (K, N) → a b. The gradient of a transposed operand is transposed, as a weight's own would be.

    What is kept does not depend on ``served``, whether C++ makes the products: checkpointing, which makes the forward
    again, may find another request then.
    """

    @staticmethod
    def forward(a: Tensor, b: Tensor, served: bool) -> Tensor:
        return _multiply(a, b, served)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *operands, ctx.served = inputs
        ctx.save_for_backward(*operands)
        ctx.transposed = [operand.stride(0) == 1 for operand in operands]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        a, b = ctx.saved_tensors
        da = db = None
        if ctx.needs_input_grad[0]:
            transposed = ctx.transposed[0]
            da = _multiply(b, grad.t(), ctx.served).t() if transposed else _multiply(grad, b.t(), ctx.served)
        if ctx.needs_input_grad[1]:
            transposed = ctx.transposed[1]
            db = _multiply(grad.t(), a, ctx.served).t() if transposed else _multiply(a.t(), grad, ctx.served)
        return da, db, None


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
    product: Tensor = apply(MatrixProduct, a, b, _is_wanted()) if _can_serve(a, b) else torch.mm(a, b)
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
    if not serves_convolution(x, weight, bias):
        return F.conv2d(x, weight, bias)
    out: Tensor = apply(PointwiseConvolution, x, weight, bias)
    return out
