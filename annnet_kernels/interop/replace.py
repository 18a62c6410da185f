"""replace_blocks: the blocks and heads of an existing model run collapsed, and nothing else about it changes.

A replaced block is the same object with the same parameters, keys and hooks; only its class becomes a subclass whose
``forward`` is the collapsed one. So ``isinstance`` still holds, and restoring is giving the class back. The same holds
for the decode heads of other networks, in ``decode_heads``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .. import checks
from ..blocks.collapse import Parts
from ..blocks.folding import Foldable, explain
from ..blocks.requirements import LASTING, parts_to_collapse, why_not
from ..blocks.structures import OddStructure, Structure
from .comparison import block_shapes, difference
from .dialects import BlockNames
from .heads import MergingHead, is_published_head
from .recognition import is_published, names_of
from .replace_heads import Refusal, ReplacedHead, dialect_of, replace_head, restore_head


@dataclass
class ReplacementReport:
    """What :func:`replace_blocks` did: ``replaced`` and ``skipped`` map module names to how and why.

    "known code" was published as it stands, "compared" agreed with its replacement, "not compared" was taken on trust.
    For a head the floating-point operations of its forward follow, before and after, for one image.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not self.replaced and not self.skipped:
            return "No asymmetric non-local blocks and no heads that could be replaced found."
        lines = [f"replaced {name or '(the model)'}: {how}" for name, how in self.replaced.items()]
        lines += [f"skipped {name or '(the model)'}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)


def replace_blocks(
    model: nn.Module, *, verify: bool = True, heads: bool = True, image_size: tuple[int, int] = (512, 512)
) -> ReplacementReport:
    """Make every asymmetric non-local block of ``model`` run collapsed and fused, and known heads at lower cost.

    Recognised by structure, wherever their classes were pasted, are the blocks of MendelXu/ANN and mmsegmentation
    (``AFNB`` and ``APNB``) and the simple published variant (``AFNPBlock`` and ``APNBBlock``). Parameters, state-dict
    keys, hooks and the identity of every module stay; :func:`restore_blocks` undoes it. A module between the block and
    its parts is no longer called: where one of them carries a hook, the block is left alone. The forward of a published
    ``ANNHead`` around a replaced block is exchanged too, for one that :func:`fold_for_inference` can merge.

    Heads are the decode heads of SegFormer (transformers, segmentation_models_pytorch, the names of the paper's code),
    PSPNet (mmsegmentation, segmentation_models_pytorch) and UPerNet (all three), and copies of them. They concatenate
    resized maps and convolve them; replaced, they convolve each map at its own size and add what they resized. That is
    the same function, in training as in evaluation. A head that would not save operations is left alone.

    Args:
        model: any module; may itself be a block or a head.
        verify: compare a head, or a block whose code is none of the published ones, with its replacement first, on a
            private copy with random parameters and running statistics, on the CPU in float64, in evaluation and
            training mode, outputs, gradients and buffers. What differs is left alone, and the report says by how much.
        heads: whether decode heads are replaced, too.
        image_size: (height, width) in pixels of the image for which the report counts the operations of a head. Its
            maps are taken to have the usual strides: 4, 8, 16 and 32, and 8 for PSPNet.

    Returns:
        A report of every block and head that was replaced or skipped, and why; ``print`` it.

    Raises:
        TypeError: ``model`` is no module instance, ``verify`` or ``heads`` no bool, or ``image_size`` no pair.
        ValueError: a side of ``image_size`` is below 1.

    Example:
        >>> import annnet_kernels as ak
        >>> from annnet_kernels.reference import PlainAPNB
        >>> print(ak.replace_blocks(PlainAPNB(64, 64, 32, 32)))
        replaced (the model): PlainAPNB (mendelxu, known code)
    """
    checks.module("model", model)
    for option, value in (("verify", verify), ("heads", heads)):
        if not isinstance(value, bool):
            raise TypeError(f"{option}: expected a bool, got {checks.shown(value)} of type {type(value).__name__}")
    image_size = checks.map_size("image_size", image_size)
    report = ReplacementReport()
    for name, block in model.named_modules():
        if isinstance(block, Foldable):
            report.skipped[name] = f"{type(block).__name__}: runs collapsed already"
        elif (names := names_of(block)) is not None:
            kind = type(block).__name__
            try:
                structure = names.structure_of(block)
                how = _accepted(block, names, structure, verify)
            except OddStructure as reason:
                report.skipped[name] = f"{kind} ({names.dialect}): not built as expected: {reason}"
            except _Refusal as reason:
                report.skipped[name] = f"{kind} ({names.dialect}): {reason}"
            else:
                _replace(block, structure)
                report.replaced[name] = f"{kind} ({names.dialect}, {how})"
    for head in model.modules():
        if isinstance(getattr(head, "fusion", None), _FusedForward) and is_published_head(head):
            head.__class__ = _head_class(type(head))
    if heads:
        _replace_heads(model, "", verify, image_size, report)
    return report


def _replace_heads(
    module: nn.Module, name: str, verify: bool, image: tuple[int, int], report: ReplacementReport
) -> None:
    """Replace the heads in ``module``; what is inside a head belongs to it and is not looked at."""
    kind = type(module).__name__
    if isinstance(module, ReplacedHead):
        report.skipped[name] = f"{kind}: runs at each level's resolution already"
    elif (dialect := dialect_of(module)) is not None:
        label = f"{kind} ({dialect.family}, {dialect.code}"
        try:
            report.replaced[name] = f"{label}, {replace_head(module, dialect, verify, image)})"
        except Refusal as reason:
            report.skipped[name] = f"{label}): {reason}"
    else:
        for child_name, child in module.named_children():
            _replace_heads(child, f"{name}.{child_name}".lstrip("."), verify, image, report)


def restore_blocks(model: nn.Module) -> ReplacementReport:
    """Undo :func:`replace_blocks`, in place: every block and head runs its own forward again.

    Args:
        model: a module, or a replaced block itself.

    Returns:
        A report whose ``replaced`` names the blocks and heads that were given back.

    Raises:
        TypeError: ``model`` is no module instance.
        ValueError: something else, such as ``shard_rows`` or ``fully_shard``, has changed the class of one since.
    """
    checks.module("model", model)
    report = ReplacementReport()
    kinds = (_FusedForward, _ReplacedHead, ReplacedHead)
    replaced = {n: m for n, m in model.named_modules() if isinstance(m, kinds)}
    for name, block in replaced.items():
        if "original" not in vars(type(block)):
            raise ValueError(f"model: {name or 'the model'} was wrapped after it was replaced; unwrap it first")
    for name, block in replaced.items():
        if isinstance(block, _FusedForward):
            block.unfold()
            for attribute in ("_fold", "recompute"):
                vars(block).pop(attribute, None)
            block.__class__ = type(block).original  # type: ignore[assignment]
            report.replaced[name] = f"{type(block).__name__} restored"
        elif isinstance(block, ReplacedHead):
            restore_head(block)
            report.replaced[name] = f"{type(block).__name__} restored"
        else:
            block.__class__ = type(block).original  # type: ignore[assignment]
    return report


class _Refusal(Exception):
    """Why a recognised block is left alone."""


def _accepted(block: nn.Module, names: BlockNames, structure: Structure, verify: bool) -> str:
    """On what grounds a recognised block may be replaced; raises _Refusal or OddStructure if it may not."""
    parts = structure.parts(block)
    reason = why_not(parts, LASTING)
    for attribute in ("forward", "recompute"):
        if reason is None and attribute in vars(block):
            reason = f"has a {attribute} of its own"
    if reason is not None:
        raise _Refusal(reason)
    if is_published(block, names, parts):
        return "known code"
    if not verify:
        return "not compared"
    reason = difference(
        block,
        block_shapes(parts),
        lambda twin: _replace(twin, structure),
        dropouts=lambda twin: structure.parts(twin).tail,
    )
    if reason is not None:
        raise _Refusal(reason)
    return "compared"


def _replace(block: nn.Module, structure: Structure) -> None:
    block.__class__ = _fused_class(type(block), structure)


class _FusedForward(Foldable):
    """The forward of a replaced block; mixed in before the block's own class."""

    original: type[nn.Module]
    structure: Structure

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        parts = parts_to_collapse(self, *args, *kwargs.values())
        maps = None if parts is None else self._maps(args, kwargs, count=1 if parts.is_shared() else 2)
        if parts is None or maps is None:
            return type(self).original.forward(self, *args, **kwargs)
        return self.run(parts, maps[0], maps[-1])

    def _maps(self, args: tuple[Any, ...], kwargs: dict[str, Any], count: int) -> tuple[Tensor, ...] | None:
        """The maps that the block is called with, by position or name; None if it is not called with just them."""
        if kwargs:
            parameters = list(inspect.signature(type(self).original.forward).parameters)[1 : count + 1]
            args += tuple(kwargs[name] for name in parameters[len(args) :] if name in kwargs)
            if not kwargs.keys() <= set(parameters):
                return None
        return args if len(args) == count else None

    def parts(self) -> Parts:
        return type(self).structure.parts(self)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, (type(self).original.extra_repr(self), explain(self))))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).original, type(self).structure), nn.Module.__getstate__(self)


def _forward_like(original: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a replaced block, which whoever asks sees with the names of the original's arguments."""

    def forward(self: _FusedForward, *args: Any, **kwargs: Any) -> Any:
        return _FusedForward.forward(self, *args, **kwargs)

    forward.__wrapped__ = original.forward  # type: ignore[attr-defined]  # what inspect, torch.fx and torch.export read
    return forward


_fused_classes: dict[tuple[type[nn.Module], Structure], type[nn.Module]] = {}


def _fused_class(original: type[nn.Module], structure: Structure) -> type[nn.Module]:
    """The subclass of ``original`` that runs collapsed; made once, so that equal blocks have equal classes."""
    key = (original, structure)
    if key not in _fused_classes:
        members = {
            "original": original,
            "structure": structure,
            "forward": _forward_like(original),
            "__module__": original.__module__,
            "__doc__": original.__doc__,
        }
        _fused_classes[key] = type(original.__name__, (_FusedForward, original), members)
    return _fused_classes[key]


class _ReplacedHead(MergingHead):
    """The forward of a head around replaced blocks; mixed in before the head's own class."""

    original: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild_head, (type(self).original,), nn.Module.__getstate__(self)


_head_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _head_class(original: type[nn.Module]) -> type[nn.Module]:
    if original not in _head_classes:
        members = {"original": original, "__module__": original.__module__, "__doc__": original.__doc__}
        _head_classes[original] = type(original.__name__, (_ReplacedHead, original), members)
    return _head_classes[original]


def _rebuild_head(original: type[nn.Module]) -> nn.Module:
    fused = _head_class(original)
    head: nn.Module = fused.__new__(fused)
    return head


def _rebuild(original: type[nn.Module], structure: Structure) -> nn.Module:
    """What pickle and deepcopy call: an empty block of the fused class, whose state they set."""
    fused = _fused_class(original, structure)
    block: nn.Module = fused.__new__(fused)
    return block
