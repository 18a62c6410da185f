"""The modules of a decode head, whatever their names, and the reasons for which a head must run as it was written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..blocks.forward import epilogue
from ..blocks.requirements import HOOKS, WEIGHT_CLASSES, traced_by_jit, vectorised, watching_hooks
from ..functional import pyramid_pool
from ..runtime.autocast import autocast_dtype
from ..runtime.tracers import exporting, exporting_to_onnx
from .algebra import Size, convolve_resized

SizeAt = Callable[[int], Size]
"""(height, width) of a map of which one pixel stands for so many pixels of the image in each direction."""


class Join(NamedTuple):
    """A convolution over concatenated maps, the norm, activation and dropout behind it, and the modules around them."""

    conv: nn.Conv2d
    tail: Sequence[nn.Module]
    containers: Sequence[nn.Module]


class Level(NamedTuple):
    """One level of a pyramid: the pooling, and the modules that are called with the pooled map, in order."""

    pool: nn.AdaptiveAvgPool2d
    branch: Sequence[nn.Module]


class Pyramid(NamedTuple):
    """Pyramid pooling as PSPNet has it: a map and what its levels make of it, resized and joined."""

    levels: Sequence[Level]
    join: Join
    containers: Sequence[nn.Module]
    align_corners: bool
    map_first: bool
    """Whether the map stands ahead of the levels in the concatenation, or behind them."""


class Parts(NamedTuple):
    """The modules of a head that its replacement reads without calling them; each family uses some of the fields."""

    join: Join
    projections: Sequence[nn.Linear] = ()
    """The linear layers ahead of the resizing, in the order of the concatenation."""
    pyramid: Pyramid | None = None
    containers: Sequence[nn.Module] = ()
    """Modules whose forward only calls others."""


@dataclass(frozen=True)
class Dialect:
    """How one code base writes the heads of one family."""

    family: str
    code: str
    """The code base whose names these are."""
    hallmarks: tuple[str, ...]
    """Paths of the modules by which such a head is recognised."""
    parts: Callable[[Any], Parts]
    forward: Callable[[Any, Parts, Any], Tensor]
    """What replaces the head's forward; takes the head, its parts and the features that the head is called with."""
    shapes: Callable[[Any, Parts, SizeAt], list[tuple[int, int, int]]]
    """(C, H, W) of the features that the head takes, given the size of a map by its stride."""
    why_not: Callable[[Any], str | None] = lambda head: None
    """Why a head with these modules is left alone, as far as its settings say."""

    def matches(self, head: nn.Module) -> bool:
        """Whether ``head`` has all modules by which this kind of head is recognised."""
        try:
            for path in self.hallmarks:
                head.get_submodule(path)
        except AttributeError:
            return False
        return True


def join_of(*modules: nn.Module) -> Join:
    """What ``modules`` call in order: a convolution first; modules that hold others are taken apart."""
    leaves: list[Any] = []
    containers: list[nn.Module] = []

    def take_apart(module: nn.Module) -> None:
        children = list(module.children())
        if not children:
            leaves.append(module)
            return
        containers.append(module)
        for child in children:
            take_apart(child)

    for module in modules:
        take_apart(module)
    return Join(leaves[0], leaves[1:], containers)


def join_maps(join: Join, maps: Sequence[Tensor], size: Size, align_corners: bool) -> Tensor:
    """The join's output (B, C_out, H, W): maps resized, concatenated, convolved, and what stands behind that."""
    out = convolve_resized(maps, join.conv.weight, join.conv.bias, size, align_corners)
    return epilogue(join.tail, out)


def pool_and_join(pyramid: Pyramid, x: Tensor) -> Tensor:
    """Pyramid pooling of x (B, C, H, W), all levels in one pass, joined with x at its size."""
    sizes = [pool_size(level.pool) for level in pyramid.levels]
    tokens = pyramid_pool(x, sizes)
    maps = []
    for pooled, (height, width), level in zip(
        tokens.split([height * width for height, width in sizes], dim=2), sizes, pyramid.levels, strict=True
    ):
        z = pooled.unflatten(2, (height, width))
        for module in level.branch:
            z = module(z)
        maps.append(z)
    maps = [x, *maps] if pyramid.map_first else [*maps, x]
    return join_maps(pyramid.join, maps, size_of(x), pyramid.align_corners)


def size_of(x: Tensor) -> Size:
    """(H, W) of a map."""
    return x.shape[2], x.shape[3]


def pool_size(pool: nn.AdaptiveAvgPool2d) -> Size:
    """(rows, columns) of a pooling of fixed size."""
    size: Any = pool.output_size
    return (size[0], size[1]) if isinstance(size, tuple) else (size, size)


def is_callable_with(features: Any, parts: Parts) -> bool:
    """Whether the features are maps that the replacement can read; otherwise the head's own forward complains."""
    maps = [features] if isinstance(features, Tensor) else features
    if not isinstance(maps, (list, tuple)) or not maps or not all(isinstance(x, Tensor) for x in maps):
        return False
    weight = parts.join.conv.weight
    return autocast_dtype(weight) is not None or all(x.dtype == weight.dtype for x in maps)


def why_plain(parts: Parts, types: tuple[type, ...] | None = None) -> str | None:
    """Why a head must run its own forward: a module that would not be called is not what it seems.

    Whoever hooks, wraps or exchanges an inner module expects it to be called. None if the replacement may run.

    Args:
        parts: of the head.
        types: of the modules that are not called, as they were when the head was replaced; None before that.
    """
    modules = list(_not_called(parts))
    if types is not None and types != tuple(_type(module) for _, module in modules):
        return "a module inside was exchanged"
    for expected, module in modules:
        actual = _type(module)
        name = actual.__name__
        if expected is not None and actual is not expected:
            return f"{name} in the place of {expected.__name__}"
        if "forward" in vars(module):
            return f"{name} with a forward of its own"
        for hooks in HOOKS:
            if getattr(module, hooks):
                return f"{name} carries {hooks.strip('_').replace('_', ' ')}"
        for parameter, value in module._parameters.items():
            if value is not None and type(value).__name__ not in WEIGHT_CLASSES:
                return f"{name} holds a {parameter} of class {type(value).__name__}"
        if isinstance(module, nn.Conv2d) and not _keeps_size(module):
            return f"{name} is no convolution over zeros that keeps the size: {module.extra_repr()}"
        if isinstance(module, nn.AdaptiveAvgPool2d) and None in pool_size(module):
            return f"{name} keeps a dimension of the map: output_size={module.output_size}"
    if parts.projections and parts.join.conv.kernel_size != (1, 1):
        return f"the linear layers are followed by a convolution of {parts.join.conv.kernel_size} pixels"
    return None


def why_plain_now(parts: Parts) -> str | None:
    """Why this call of a head must run its own forward: a tool wants to see every module, or cannot see operators."""
    for rule in (watching_hooks, traced_by_jit, vectorised):
        reason = rule(cast(Any, parts))
        if reason is not None:
            return reason
    if exporting() and not exporting_to_onnx() and parts.join.conv.training:
        return "torch.export in training mode"
    return None


def types_of(parts: Parts) -> tuple[type, ...]:
    """The classes of the modules that the replacement does not call."""
    return tuple(_type(module) for _, module in _not_called(parts))


def _type(module: nn.Module) -> type:
    return type(module).__bases__[0] if parametrize.is_parametrized(module) else type(module)


def _not_called(parts: Parts) -> Iterator[tuple[type | None, nn.Module]]:
    """The modules that the replacement does not call, with the class that each must be of (None: any)."""
    joins = [parts.join]
    for projection in parts.projections:
        yield nn.Linear, projection
    if parts.pyramid is not None:
        if parts.pyramid.join is not parts.join:
            joins.append(parts.pyramid.join)
        for level in parts.pyramid.levels:
            yield nn.AdaptiveAvgPool2d, level.pool
        for module in parts.pyramid.containers:
            yield None, module
    for join in joins:
        yield nn.Conv2d, join.conv
        for module in (*join.tail, *join.containers):
            yield None, module
    for module in parts.containers:
        yield None, module


def _keeps_size(conv: nn.Conv2d) -> bool:
    """Whether the convolution has a square, odd kernel, stride and dilation 1, and pads with zeros to the same size."""
    rows, columns = conv.kernel_size
    if rows != columns or rows % 2 == 0 or conv.padding_mode != "zeros":
        return False
    return (conv.stride, conv.dilation, conv.groups) == ((1, 1), (1, 1), 1) and conv.padding == (rows // 2, rows // 2)
