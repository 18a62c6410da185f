"""The exchange of a decode head's class for one whose ``forward`` runs every linear map where it costs least."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..decode_heads import pspnet, segformer, upernet
from ..decode_heads.algebra import Size
from ..decode_heads.parts import Dialect, is_callable_with, types_of, why_plain, why_plain_now
from .comparison import copy_without_hooks, difference

DIALECTS: tuple[Dialect, ...] = (*segformer.DIALECTS, *upernet.DIALECTS, *pspnet.DIALECTS)
"""UPerNet's come ahead of PSPNet's, whose modules are among theirs."""

_TRIAL_SIZES = {1: (28, 24), 2: (14, 12), 4: (7, 6), 8: (5, 4), 16: (4, 3), 32: (3, 2)}
"""Of maps in the comparison, by their stride: no size divides another, and each is smaller than some pool."""


class Refusal(Exception):
    """Why a recognised head is left alone."""


class Cost(NamedTuple):
    """Floating-point operations of a head's forward for one image, before and after its replacement."""

    before: int
    after: int
    image: Size

    def __str__(self) -> str:
        height, width = self.image
        return f"{self.before / 1e9:.3g} → {self.after / 1e9:.3g} GFLOP at {height}×{width}"


def dialect_of(module: nn.Module) -> Dialect | None:
    """How a head is written, if ``module`` looks like one."""
    return next((dialect for dialect in DIALECTS if dialect.matches(module)), None)


def replace_head(head: nn.Module, dialect: Dialect, verify: bool, image: Size) -> str:
    """Exchange the class of a recognised head.

    Args:
        head: keeps its parameters, modules, keys and hooks.
        dialect: how it is written.
        verify: whether to compare it with its replacement first, on private copies.
        image: (height, width) of the image for which the operations are counted.

    Returns:
        On what grounds it was replaced, and what it costs before and after.

    Raises:
        Refusal: the head is left alone; the message says why.
    """
    try:
        parts = dialect.parts(head)
        reason = dialect.why_not(head) or why_plain(parts)
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        reason = f"not built as expected: {error}"
    if reason is None and "forward" in vars(head):
        reason = "has a forward of its own"
    if reason is not None:
        raise Refusal(reason)
    if verify:
        shapes = [(2, *shape) for shape in dialect.shapes(head, parts, _TRIAL_SIZES.__getitem__)]
        reason = difference(head, shapes, lambda twin: retype(twin, dialect), as_list=True)
        if reason is not None:
            raise Refusal(reason)
    cost = _cost(head, dialect, image)
    if cost.after >= cost.before:
        raise Refusal(f"gains nothing: {cost}")
    retype(head, dialect)
    return f"{'compared' if verify else 'not compared'}; {cost}"


def restore_head(head: ReplacedHead) -> None:
    """Give a replaced head its own class back."""
    head.__class__ = type(head).original  # type: ignore[assignment]


class ReplacedHead(nn.Module):
    """The forward of a replaced head; mixed in before the head's own class."""

    original: type[nn.Module]
    dialect: Dialect
    types: tuple[type, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cls = type(self)
        parts = cls.dialect.parts(self)
        features = self._features(args, kwargs)
        if not is_callable_with(features, parts) or why_plain(parts, cls.types) or why_plain_now(parts):
            return cls.original.forward(self, *args, **kwargs)
        return cls.dialect.forward(self, parts, features)

    def _features(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the head is called with, by position or name; None if that is not one argument."""
        if not kwargs:
            return args[0] if len(args) == 1 else None
        if args or len(kwargs) > 1:
            return None
        name = list(inspect.signature(type(self).original.forward).parameters)[1]
        return kwargs.get(name)

    def extra_repr(self) -> str:
        reason = why_plain(type(self).dialect.parts(self), type(self).types)
        state = "at each level's resolution" if reason is None else f"as written: {reason}"
        return ", ".join(filter(None, (type(self).original.extra_repr(self), state)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = type(self)
        return _rebuild, (cls.original, DIALECTS.index(cls.dialect), cls.types), self.__dict__.copy()


_classes: dict[tuple[type[nn.Module], int, tuple[type, ...]], type[nn.Module]] = {}


def retype(head: nn.Module, dialect: Dialect) -> None:
    """Exchange the class of a head, and ask nothing."""
    head.__class__ = _class_of(type(head), DIALECTS.index(dialect), types_of(dialect.parts(head)))


def _class_of(original: type[nn.Module], dialect: int, types: tuple[type, ...]) -> type[nn.Module]:
    """The subclass of ``original`` that replaces it; made once, so that equal heads have equal classes."""
    key = (original, dialect, types)
    if key not in _classes:
        members = {
            "original": original,
            "dialect": DIALECTS[dialect],
            "types": types,
            "__module__": original.__module__,
            "__doc__": original.__doc__,
        }
        _classes[key] = type(original.__name__, (ReplacedHead, original), members)
    return _classes[key]


def _rebuild(original: type[nn.Module], dialect: int, types: tuple[type, ...]) -> nn.Module:
    """What pickle and deepcopy call: an empty head of the replaced class, whose state they set."""
    replaced = _class_of(original, dialect, types)
    head: nn.Module = replaced.__new__(replaced)
    return head


def _cost(head: nn.Module, dialect: Dialect, image: Size) -> Cost:
    """Counted without computing: both forwards run on tensors that have no memory."""
    plain = copy_without_hooks(head).to("meta").eval()
    parts = dialect.parts(plain)
    weight = parts.join.conv.weight
    height, width = image
    shapes = dialect.shapes(plain, parts, lambda stride: (-(-height // stride), -(-width // stride)))
    features = [torch.empty((1, *shape), device="meta", dtype=weight.dtype) for shape in shapes]
    before = _operations(plain, features)
    retype(plain, dialect)
    return Cost(before, _operations(plain, features), image)


def _operations(head: nn.Module, features: list[Tensor]) -> int:
    from torch.utils.flop_counter import FlopCounterMode  # takes long to import, and few need it

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        head(list(features))
    return int(counter.get_total_flops())
