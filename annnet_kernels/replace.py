"""replace_blocks: the blocks of an existing model run collapsed and fused, and nothing else about it changes.

A replaced block is the same object with the same parameters, keys and hooks; only its class becomes a subclass whose
``forward`` is the collapsed one. So ``isinstance`` still holds, and restoring is giving the class back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from . import checks
from .blocks import published_parts
from .collapse import HOOKS, Parts, Projection, collapsed_forward, why_plain
from .folding import Foldable, explain
from .reference.blocks import PlainAFNB, PlainAPNB


class Dialect(NamedTuple):
    """One published way of writing the blocks: how to recognise it and where its parts are."""

    name: str
    matches: Callable[[nn.Module], bool]
    parts: Callable[[Any], Parts]
    trusted: bool
    """Whether ``matches`` proves what the forward computes; structure alone does not."""


@dataclass
class ReplacementReport:
    """What :func:`replace_blocks` did: ``replaced`` and ``skipped`` map module names to how and why."""

    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.replaced and not self.skipped:
            return "No asymmetric non-local blocks found."
        lines = [f"replaced {name or '(the model)'}: {how}" for name, how in self.replaced.items()]
        lines += [f"skipped {name or '(the model)'}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


def replace_blocks(model: nn.Module, *, verify: bool = True) -> ReplacementReport:
    """Make every asymmetric non-local block of ``model`` run collapsed and fused, in place.

    Recognised are the plain blocks of :mod:`annnet_kernels.reference` and the simple published variant
    (``AFNPBlock`` and ``APNBBlock``, by structure). Parameters, state-dict keys, hooks and the identity of every
    module stay; :func:`restore_blocks` undoes it.

    Args:
        model: any module; may itself be a block.
        verify: compare every block that was recognised by structure with its replacement first, on a private copy
            with randomised output projection and running statistics, in evaluation and training mode, outputs and
            gradients. A block that differs is left alone.

    Returns:
        A report of every block that was replaced or skipped, and why; ``print`` it.

    Raises:
        TypeError: ``model`` is no module instance, or ``verify`` no bool.

    Example:
        >>> import annnet_kernels as ak
        >>> from annnet_kernels.reference import PlainAPNB
        >>> print(ak.replace_blocks(PlainAPNB(64, 64, 32, 32)))
        replaced (the model): PlainAPNB (annnet_kernels plain block)
    """
    checks.module("model", model)
    if not isinstance(verify, bool):
        raise TypeError(f"verify: expected a bool, got {verify!r} of type {type(verify).__name__}")
    report = ReplacementReport()
    for name, block in model.named_modules():
        dialect = next((d for d in DIALECTS if d.matches(block)), None)
        if dialect is None:
            continue
        label = f"{type(block).__name__} ({dialect.name})"
        reason = _why_not(block, dialect, verify)
        if reason is None:
            block.__class__ = _fused_class(type(block), dialect.name)
            report.replaced[name] = label
        else:
            report.skipped[name] = f"{label}: {reason}"
    return report


def restore_blocks(model: nn.Module) -> ReplacementReport:
    """Undo :func:`replace_blocks`, in place: every block runs its own forward again.

    Args:
        model: a module, or a replaced block itself.

    Returns:
        A report whose ``replaced`` names the blocks that were given back.

    Raises:
        TypeError: ``model`` is no module instance.
    """
    checks.module("model", model)
    report = ReplacementReport()
    for name, block in model.named_modules():
        if isinstance(block, _FusedForward):
            block.unfold()
            vars(block).pop("_fold", None)
            block.__class__ = type(block).original  # type: ignore[assignment]
            report.replaced[name] = f"{type(block).__name__} restored"
    return report


def _why_not(block: nn.Module, dialect: Dialect, verify: bool) -> str | None:
    """Why a recognised block must be left alone; None if it can be replaced."""
    try:
        reason = why_plain(dialect.parts(block))
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        return f"not built as expected: {error}"
    if reason is None and verify and not dialect.trusted:
        reason = _difference(block, dialect)
    return reason


class _FusedForward(Foldable):
    """The forward of a replaced block; mixed in before the block's own class."""

    original: type[nn.Module]
    dialect: str

    def forward(self, *maps: Tensor) -> Any:
        parts = self.parts()
        if why_plain(parts) is not None:
            return type(self).original.forward(self, *maps)
        if (fold := self.current_fold()) is not None:
            return self.run_folded(fold, parts, maps[0], maps[-1])
        return collapsed_forward(parts, maps[0], maps[-1])

    def parts(self) -> Parts:
        return _dialect(type(self).dialect).parts(self)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (type(self).original.extra_repr(self), explain(self))))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).original, type(self).dialect), self.__dict__.copy()


_fused_classes: dict[tuple[type[nn.Module], str], type[nn.Module]] = {}


def _fused_class(original: type[nn.Module], dialect: str) -> type[nn.Module]:
    """The subclass of ``original`` that runs collapsed; made once, so that equal blocks have equal classes."""
    if (original, dialect) not in _fused_classes:
        members = {
            "original": original,
            "dialect": dialect,
            "__module__": original.__module__,
            "__doc__": original.__doc__,
        }
        _fused_classes[original, dialect] = type(original.__name__, (_FusedForward, original), members)
    return _fused_classes[original, dialect]


def _rebuild(original: type[nn.Module], dialect: str) -> nn.Module:
    """What pickle and deepcopy call: an empty block of the fused class, whose state they set."""
    fused = _fused_class(original, dialect)
    block: nn.Module = fused.__new__(fused)
    return block


def _dialect(name: str) -> Dialect:
    return next(d for d in DIALECTS if d.name == name)


_VERIFY_TOLERANCE = 1e-8
"""Relative, in float64: rounding leaves about 1e-13, the smallest other operation many orders more."""


def _difference(block: nn.Module, dialect: Dialect) -> str | None:
    """How the replacement would differ from ``block``; None if it agrees in both modes, outputs and gradients."""
    device = next(block.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        plain = _without_hooks(copy.deepcopy(block)).double().requires_grad_()
        parts = dialect.parts(plain)
        with torch.no_grad():
            nn.init.normal_(parts.out.weight, std=parts.out.in_channels**-0.5)
            if parts.out.bias is not None:
                nn.init.normal_(parts.out.bias)
            for module in plain.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
                    module.running_mean.normal_()
                    cast(Tensor, module.running_var).uniform_(0.5, 2.0)
                if isinstance(module, nn.modules.dropout._DropoutNd):
                    module.p = 0.0
        fused = copy.deepcopy(plain)
        fused.__class__ = _fused_class(type(plain), dialect.name)
        shapes = [(2, parts.query.conv.in_channels, 13, 11)]
        if parts.key is not parts.query:
            shapes.insert(0, (2, parts.key.conv.in_channels, 10, 9))
        maps = [torch.randn(shape, dtype=torch.float64, device=device) for shape in shapes]
        for training in (False, True):
            try:
                expected, got = (_results(module.train(training), maps) for module in (plain, fused))
            except Exception as error:  # whatever a stranger's forward raises, it is left alone
                return f"could not be compared: {type(error).__name__}: {error}"
            for name, value in expected.items():
                error_norm = float((got[name] - value).norm() / value.norm().clamp_min(1e-12))
                if not error_norm <= _VERIFY_TOLERANCE and float((got[name] - value).abs().max()) > 1e-10:
                    mode = "training" if training else "evaluation"
                    return f"computes something else: {name} differs by {error_norm:.1e} in {mode} mode"
    return None


def _without_hooks(block: nn.Module) -> nn.Module:
    """``block`` with every hook removed: a private copy must not call what its owner registered."""
    for module in block.modules():
        for hooks in HOOKS:
            getattr(module, hooks).clear()
    return block


def _results(module: nn.Module, maps: list[Tensor]) -> dict[str, Tensor]:
    """Output, every gradient and every buffer of one call."""
    inputs = [x.clone().requires_grad_() for x in maps]
    module.zero_grad()
    out = module(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device).view_as(out)
    (out * weights).sum().backward()
    results = {"the output": out.detach()}
    results |= {f"the gradient of input {i}": cast(Tensor, x.grad) for i, x in enumerate(inputs)}
    results |= {f"the gradient of {n}": p.grad for n, p in module.named_parameters() if p.grad is not None}
    results |= {f"the buffer {n}": b.double() for n, b in module.named_buffers()}
    return results


def _has_types(module: nn.Module, **kinds: type) -> bool:
    return all(isinstance(getattr(module, name, None), kind) for name, kind in kinds.items())


def _is_simple_fusion(module: nn.Module) -> bool:
    return not isinstance(module, _FusedForward) and _has_types(
        module,
        Conv_query=nn.Sequential,
        Conv_key=nn.Sequential,
        Conv_value=nn.Conv2d,
        ConvOut=nn.Conv2d,
        ppm=nn.ModuleList,
    )


def _is_simple_pyramid(module: nn.Module) -> bool:
    return not isinstance(module, _FusedForward) and _has_types(
        module,
        Conv_Query=nn.Sequential,
        Conv_Key=nn.Sequential,
        Conv_Value=nn.Conv2d,
        Conv_Out=nn.Conv2d,
        ppm=nn.ModuleList,
    )


def _simple_parts(key: nn.Sequential, query: nn.Sequential, value: Any, out: Any, ppm: nn.ModuleList) -> Parts:
    """The simple variant: projections are (convolution, norm, ReLU), pools are wrapped one by one; no bottleneck."""
    query_projection = Projection(*cast(Any, query))
    return Parts(
        key=query_projection if key is query else Projection(*cast(Any, key)),
        query=query_projection,
        value=value,
        out=out,
        join=None,
        tail=(),
        pools=[cast(Any, level)[0] for level in ppm],
        containers=[key, query, ppm, *ppm],
    )


DIALECTS = (
    Dialect(
        "annnet_kernels plain block",
        lambda m: type(m) in (PlainAFNB, PlainAPNB),
        published_parts,
        trusted=True,
    ),
    Dialect(
        "simple variant, fusion",
        _is_simple_fusion,
        lambda m: _simple_parts(m.Conv_key, m.Conv_query, m.Conv_value, m.ConvOut, m.ppm),
        trusted=False,
    ),
    Dialect(
        "simple variant, pyramid",
        _is_simple_pyramid,
        lambda m: _simple_parts(m.Conv_Key, m.Conv_Query, m.Conv_Value, m.Conv_Out, m.ppm),
        trusted=False,
    ),
)
