"""annnet::pyramid_pool: every level of the pyramid from one pass over the map, and its gradient.

``norm`` is the table of a :class:`~annnet_kernels.feature_map.FeatureMap`: with it the operator pools
relu((x − mean) · invstd · weight + bias), which is never written. Only the pooling of plain maps has a derivative here;
that of maps with a norm is a step of the blocks' own autograd Functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..layouts import empty_map, empty_tokens, is_channels_last
from ..pyramid import num_tokens
from ..runtime.backends import requested_backend
from .functions import apply
from .registration import register, shared_by_maps, steps


def _allocate(x: Tensor, norm: Tensor | None, heights: Sequence[int], widths: Sequence[int]) -> Tensor:
    return empty_tokens(x, x.shape[0], x.shape[1], num_tokens(heights, widths))


def _allocate_bwd(
    grad: Tensor,
    addend: Tensor | None,
    map_size: Sequence[int],
    heights: Sequence[int],
    widths: Sequence[int],
    channels_last: bool,
    backend: str | None,
) -> Tensor:
    return empty_map(grad, (grad.shape[0], grad.shape[1], map_size[0], map_size[1]), channels_last)


def _vmap(info: Any, in_dims: Sequence[int | None], x: Tensor, norm: Tensor | None, *levels: Sequence[int]) -> Any:
    shared_by_maps("pyramid_pool", norm=in_dims[1])
    batched = x.movedim(in_dims[0], 0)  # type: ignore[arg-type]
    pooled = torch.ops.annnet.pyramid_pool(batched.flatten(0, 1), norm, *levels)
    return pooled.unflatten(0, batched.shape[:2]), 0


def _vmap_bwd(info: Any, in_dims: Sequence[int | None], grad: Tensor, addend: Tensor | None, *constants: Any) -> Any:
    if addend is not None:
        raise NotImplementedError("torch.ops.annnet.pyramid_pool_bwd: torch.vmap serves no addend")
    batched = grad.movedim(in_dims[0], 0)  # type: ignore[arg-type]
    spread = torch.ops.annnet.pyramid_pool_bwd(batched.flatten(0, 1), None, *constants)
    return spread.unflatten(0, batched.shape[:2]), 0


def _flops(x_shape: Sequence[int], *_: Any, **__: Any) -> int:
    """One addition per pixel and level would count levels; a kernel sums each pixel once, and so is counted."""
    return prod(x_shape)


def _flops_bwd(grad_shape: Sequence[int], addend_shape: Any, map_size: Sequence[int], *_: Any, **__: Any) -> int:
    return prod(grad_shape[:2]) * prod(map_size)


_route = register(
    "pyramid_pool(Tensor x, Tensor? norm, int[] heights, int[] widths) -> Tensor",
    allocate=_allocate,
    reference=reference.pyramid_pool_out,
    triton_module="pyramid_pool",
    vmap=_vmap,
    flops=_flops,
)
# addend (B, C, H, W) is added to the gradient that is spread; the in-place operator adds to it.
_route_bwd = register(
    "pyramid_pool_bwd(Tensor grad, Tensor? addend, SymInt[] map_size, int[] heights, int[] widths, bool channels_last,"
    " str? backend) -> Tensor",
    allocate=_allocate_bwd,
    reference=reference.pyramid_pool_bwd_out,
    triton_module="pyramid_pool",
    vmap=_vmap_bwd,
    flops=_flops_bwd,
)
register(
    "pyramid_pool_bwd_(Tensor grad, Tensor(a!) addend, SymInt[] map_size, int[] heights, int[] widths,"
    " bool channels_last, str? backend) -> ()",
    allocate=lambda *_: None,
    reference=reference.pyramid_pool_bwd_out,
    triton_module="pyramid_pool",
    written=1,
)


class PyramidPool(torch.autograd.Function):
    """(B, C, H, W) → (B, C, T). Linear, so its second derivative is exact; forward mode is refused (no ``jvp``)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, heights: list[int], widths: list[int], backend: str | None) -> Tensor:
        pooled: Tensor = steps.pyramid_pool(x, None, heights, widths)
        return pooled

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.heights, ctx.widths, ctx.backend = inputs
        ctx.map_size = x.shape[2:]
        ctx.channels_last = is_channels_last(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        size = list(ctx.map_size)
        dx = apply(PyramidPoolBackward, grad, size, ctx.heights, ctx.widths, ctx.channels_last, ctx.backend)
        return dx, None, None, None  # heights, widths, backend


class PyramidPoolBackward(torch.autograd.Function):
    """(B, C, T) → (B, C, H, W), the transpose of :class:`PyramidPool`; its own gradient is the pooling again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        grad: Tensor,
        map_size: list[int],
        heights: list[int],
        widths: list[int],
        channels_last: bool,
        backend: str | None,
    ) -> Tensor:
        dx: Tensor = steps.pyramid_pool_bwd(grad, None, map_size, heights, widths, channels_last, backend)
        return dx

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.heights, ctx.widths, _, ctx.backend = inputs

    @staticmethod
    def backward(ctx: Any, grad_dx: Tensor) -> Any:
        grad = apply(PyramidPool, grad_dx, ctx.heights, ctx.widths, ctx.backend)
        return grad, None, None, None, None, None  # map_size, heights, widths, channels_last, backend


@_route
def _differentiable(x: Tensor, norm: Tensor | None, heights: list[int], widths: list[int]) -> Any:
    if norm is not None:
        return NotImplemented
    pooled: Tensor = PyramidPool.apply(x, heights, widths, requested_backend())
    return pooled


@_route_bwd
def _differentiable_bwd(
    grad: Tensor,
    addend: Tensor | None,
    map_size: list[int],
    heights: list[int],
    widths: list[int],
    channels_last: bool,
    backend: str | None,
) -> Any:
    if addend is not None:
        return NotImplemented
    dx: Tensor = PyramidPoolBackward.apply(grad, map_size, heights, widths, channels_last, backend)
    return dx
