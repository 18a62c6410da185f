"""Folding for inference: products of weights are made once, and an AFNB merges with the convolution behind it.

With running statistics every batch norm is affine, so a block becomes

    out = A·(PᵀX_l M) + X_h Ŵᵀ + ĉ    (then ReLU in an APNB)

with M = (s ∘ W_1 W W_v)ᵀ, Ŵ = s ∘ W_2, ĉ = s ∘ c + t for the tail's scale s and shift t. An AFNB has no ReLU at its
end, so a convolution K behind it is affine in the same three terms, and their 2048-channel sum is never made:

    K(out) = (K Ŵ)(X_h) + (K Mᵀ PᵀX_l)(A) + K(ĉ),    K(ĉ) over a constant map that ends at the border.

A fold is used only without gradients and outside compiled code, and only as long as every parameter and buffer it was
made from is the same, unchanged tensor and every module in the same mode. Writes through ``.data`` count no version and
go unnoticed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks, onnx
from ..ops.matrix_products import Program, matrix_products
from ..runtime.autocast import no_autocast
from ..runtime.tracers import jit_tracing
from .collapse import Parts, biases_of, constant_of, token_matrix, weights_of
from .forward import WHOLE, Cut, Whole, block_forward, collapsed_forward
from .normalization import FUSABLE_NORMS, Norm, Shift, uses_batch_statistics
from .requirements import (
    HOOKS,
    LASTING,
    ONCE_GATHERED,
    TO_COLLAPSE,
    parts_to_collapse,
    why_not,
    why_plain,
)
from .structures import OddStructure


class FoldedBlock(NamedTuple):
    """The weight products of one block, with the tail's batch norm in them; float32 at least."""

    token_matrix: Tensor  # M, (C_l, C_out)
    skip_weight: Tensor | None  # Ŵ, (C_out, C_h, 1, 1); None without a bottleneck
    constant: Tensor | None  # ĉ, (C_out)
    relu: bool
    cancelled: tuple[Tensor, ...] = ()

    def values(self, tokens: Tensor) -> Tensor:
        """The pooled features times M."""
        (values,) = matrix_products((tokens, self.token_matrix), Program([0], [1], like=[0]))
        return values

    def finish(self, out: Tensor, cut: Cut, scale: Tensor | None) -> Tensor:
        """The norm is in the weights."""
        return out.relu_() if self.relu else out


_ATTENTION_ALONE = FoldedBlock(torch.empty(0), None, None, relu=False)
"""A block without anything behind its attention."""


class FoldedPair(NamedTuple):
    """The weight products of an AFNB and the convolution behind it."""

    high_weight: Tensor  # K Ŵ, (O, C_h, k, k)
    token_weight: Tensor  # K Mᵀ, (O, k, k, C_l)
    constant_weight: Tensor  # K ĉ, (O, k, k)


class Kept(Whole):
    """Whole maps, read with weights already in the dtype of the maps and with tables already made."""

    def __init__(self) -> None:
        self._casts: dict[tuple[int, torch.dtype], Tensor] = {}
        self._norms: dict[tuple[int, torch.dtype], Norm] = {}

    def cast_weight(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        key = id(weight), dtype
        if key not in self._casts:
            self._casts[key] = weight.to(dtype)
        return self._casts[key]

    def norm_of(self, norm: Any, y: Tensor, shift: Shift, calls: int) -> Norm:
        key = id(norm), y.dtype
        if key not in self._norms:
            self._norms[key] = super().norm_of(norm, y, shift, calls)
        return self._norms[key]


class Fold:
    """What a block was folded into, and the tensors it was made from. A copy of it is no fold: it copies as None."""

    def __init__(self, module: nn.Module, parts: Parts, conv: nn.Conv2d | None = None) -> None:
        self.conv = conv
        self._modules = [module] if conv is None else [module, conv]
        self._sources = list(self._tensors())  # kept, so that no other tensor gets their identity
        self._made_from = self._fingerprint()
        with torch.no_grad():
            self.block = fold_block(parts)
            self.pair = fold_pair(self.block, conv) if conv is not None else None
        self.kept = Kept()

    def _tensors(self) -> Iterator[Tensor]:
        for module in self._modules:
            yield from module.parameters()
            yield from module.buffers()

    def _fingerprint(self) -> list[tuple[Any, ...]]:
        """Every tensor with its version (inference tensors have none), and every module's mode and, of a norm, eps."""
        tensors = [(id(t), 0 if t.is_inference() else t._version, t.data_ptr()) for t in self._tensors()]
        return [
            *tensors,
            *((id(m), m.training, getattr(m, "eps", None)) for module in self._modules for m in module.modules()),
        ]

    def is_current(self) -> bool:
        """Whether the module still is what was folded."""
        return self._fingerprint() == self._made_from

    def forward(self, parts: Parts, low: Tensor, high: Tensor) -> Tensor:
        """The block's output."""
        return block_forward(parts, self.block, low, high, self.kept)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class Foldable(nn.Module):
    """A block that can be folded. Whatever makes it train unfolds it.

    ``recompute`` is whether the map ahead of the block's tail is made again in the backward pass instead of kept.
    """

    recompute: bool = False
    _fold: Fold | None = None

    def parts(self) -> Parts:
        """The modules that the collapse reads."""
        raise NotImplementedError

    def has_own_forward(self) -> bool:
        """Whether a subclass, or somebody on this very block, put another forward in the place of this package's."""
        return "forward" in vars(self) or not type(self).forward.__module__.startswith(f"{__package__.split('.')[0]}.")

    def train(self, mode: bool = True) -> Foldable:
        if mode:
            self.unfold()
        return super().train(mode)

    def _replicate_for_data_parallel(self) -> Foldable:
        """A replica for another device; a fold holds products on this one."""
        replica: Foldable = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica._fold = None
        return replica

    def unfold(self) -> None:
        """Forget what was folded."""
        self._fold = None

    def run(self, parts: Parts, low: Tensor, high: Tensor) -> Tensor:
        """The block's output by the collapse, by what it was folded into, or in standard operators for ONNX."""
        if onnx.exporting():
            return onnx.block_forward(parts, low, high)
        fold = self.current_fold()
        if fold is not None:
            return fold.forward(parts, low, high)
        return collapsed_forward(parts, low, high, recompute=self.recompute)

    def current_fold(self) -> Fold | None:
        """The fold, if it may be used now: without gradients, outside traced code, with nothing changed since."""
        if self._fold is None or torch.is_grad_enabled() or torch.compiler.is_compiling() or jit_tracing():
            return None
        if not self._fold.is_current():
            self.unfold()
        return self._fold


def merged_convolution(
    fusion: nn.Module, conv: nn.Module, low: Tensor, high: Tensor, through: tuple[nn.Module, ...]
) -> Tensor | None:
    """conv(fusion(low, high)) by the merged weights where ``fusion`` was folded with ``conv``; None where it was not.

    A merge skips the modules ``through`` which the map passes in between: an active dropout is not skipped, and whoever
    hooks one of them, or gives it another forward, gets it called.
    """
    if not isinstance(fusion, Foldable):
        return None
    fold = fusion.current_fold()
    if fold is None or fold.pair is None or fold.conv is not conv or fusion.has_own_forward():
        return None
    parts = parts_to_collapse(fusion, low, high)
    if parts is None or any(map(_is_watched, (fusion, conv, *through))) or any(map(_drops, through)):
        return None
    return merged_forward(fold.pair, fold.conv, parts, low, high)


def _is_watched(module: nn.Module) -> bool:
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in HOOKS)


def _drops(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0


def explain(block: Foldable) -> str:
    """How ``block`` runs, for its ``repr``. FSDP2 over the whole block gathers its parameters ahead of its forward."""
    gathered = any(base.__name__ == "FSDPModule" for base in type(block).__mro__)
    reason = why_plain(block, ONCE_GATHERED if gathered else TO_COLLAPSE)
    if reason is not None:
        return f"published forward, because of {reason}"
    return "collapsed" if block._fold is None else "collapsed, folded"


@dataclass
class FoldReport:
    """What :func:`fold_for_inference` did: ``folded`` and ``skipped`` map module names to how and why."""

    folded: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"folded {name or '(the model)'}: {how}" for name, how in self.folded.items()]
        lines += [f"skipped {name or '(the model)'}: {why}" for name, why in self.skipped.items()]
        return "\n".join(lines) or "No asymmetric non-local blocks found."


def fold_for_inference(model: nn.Module) -> FoldReport:
    """Fold batch norms and weight products of every AFNB and APNB of ``model`` once, for calls without gradients.

    In an :class:`annnet_kernels.ANNNet` and in mmsegmentation's ``ANNHead`` (``FusedANNHead``, or with replaced blocks)
    the AFNB also merges with the 3 × 3 convolution behind it. Outputs stay the same up to rounding (in float32 about
    twice plain's own), parameters and state dict do not change. ``train()``, ``load_state_dict`` or any other change of
    a parameter, buffer or mode undoes a block's fold, a copy of the model is not folded, and calls with gradients
    enabled or from compiled code do not use it. What is written through ``.data`` is not noticed: fold again. Costs
    memory for the products: one C_out × (C_l + C_h) matrix per block, and one kernel of that depth per merged
    convolution.

    Args:
        model: a module in evaluation mode, holding blocks of this package or replaced ones.

    Returns:
        A report of every block that was folded or skipped, and why; ``print`` it.

    Raises:
        TypeError: ``model`` is no module instance.
        ValueError: a block of ``model`` is in training mode.

    Example:
        >>> import annnet_kernels as ak
        >>> print(ak.fold_for_inference(ak.APNB(64, 64, 32, 32).eval()))
        folded (the model): alone
    """
    checks.module("model", model)
    blocks = {name: m for name, m in model.named_modules() if isinstance(m, Foldable)}
    for name, block in blocks.items():
        if block.training:
            raise ValueError(f"model: expected evaluation mode, got {name or 'the model'} in training mode")
    followers = {id(block): conv for m in model.modules() for block, conv in _pairs(m)}
    report = FoldReport()
    for name, block in blocks.items():
        try:
            parts = block.parts()
            reason = why_not_folded(parts)
        except OddStructure as odd:
            reason = str(odd)
        if reason is not None:
            report.skipped[name] = reason
            continue
        block.unfold()
        conv = followers.get(id(block))
        block._fold = Fold(block, parts, conv)
        report.folded[name] = "alone" if conv is None else "merged with the convolution behind it"
    return report


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Module, nn.Conv2d]]:
    """Blocks whose output goes, inactive dropout apart, to one convolution and nowhere else."""
    following = getattr(type(module), "convolution_behind_fusion", None)
    fusion = getattr(module, "fusion", None)
    if following is not None and isinstance(fusion, Foldable) and not fusion.has_own_forward():
        conv = following(module)
        if type(conv) is nn.Conv2d and conv.groups == 1 and conv.padding_mode == "zeros":
            yield fusion, conv


def why_not_folded(parts: Parts) -> str | None:
    """Why a block cannot be folded; None if it can."""
    reason = why_not(parts, LASTING)
    if reason is not None:
        return reason
    norms = [parts.key.norm, parts.query.norm, *parts.tail[:1]]
    for norm in norms:
        if type(norm) not in FUSABLE_NORMS:
            return f"{type(norm).__name__} is no batch norm"
        if uses_batch_statistics(norm):
            return f"{type(norm).__name__} has no running statistics"
    for projection in (parts.key, parts.query):
        if type(projection.activation) is not nn.ReLU:
            return f"{type(projection.activation).__name__} in the place of ReLU"
    dropouts = [m for m in parts.tail[1:] if isinstance(m, nn.modules.dropout._DropoutNd)]
    if any(map(_drops, dropouts)):
        return f"{type(dropouts[0]).__name__} is in training mode"
    kinds = [type(m) for m in parts.tail[1:] if m not in dropouts]
    return None if kinds in ([], [nn.ReLU]) else f"a tail of {', '.join(kind.__name__ for kind in kinds)}"


def fold_block(parts: Parts) -> FoldedBlock:
    """The weight products of a block in evaluation mode."""
    weights = weights_of(parts)
    matrix = token_matrix(weights)
    constant = constant_of(weights, biases_of(parts))
    if weights.high is None:
        return FoldedBlock(matrix, None, constant, relu=False)
    dtype = matrix.dtype
    weight = weights.high.to(dtype)
    norm: Any = parts.tail[0]
    scale = torch.rsqrt(norm.running_var.to(dtype) + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight.to(dtype)
    shift = -norm.running_mean.to(dtype) * scale
    shift = shift if norm.bias is None else shift + norm.bias.to(dtype)
    relu = any(type(m) is nn.ReLU for m in parts.tail)
    shift = shift if constant is None else constant * scale + shift
    return FoldedBlock(matrix * scale, weight * scale[:, None, None, None], shift, relu)


def fold_pair(block: FoldedBlock, conv: nn.Conv2d) -> FoldedPair:
    """The weight products of a folded AFNB and the convolution that follows it."""
    assert block.skip_weight is not None
    assert block.constant is not None
    kernel = conv.weight.to(block.constant.dtype)
    return FoldedPair(
        torch.einsum("omhw,mc->ochw", kernel, block.skip_weight.flatten(1)),
        torch.einsum("omhw,cm->ohwc", kernel, block.token_matrix).contiguous(),
        torch.einsum("omhw,m->ohw", kernel, block.constant),
    )


def merged_forward(pair: FoldedPair, conv: nn.Conv2d, parts: Parts, low: Tensor, high: Tensor) -> Tensor:
    """The output of the convolution behind a folded AFNB, (B, O, H', W')."""
    read = WHOLE.read(parts, _ATTENTION_ALONE, low, high)
    pooled = read.tokens
    batch, _, tokens = pooled.shape
    # The attention itself as a map, and a last channel of ones (its rows sum to 1) that carries the constant.
    own = torch.eye(tokens, dtype=pooled.dtype, device=pooled.device)
    selector = torch.cat([own, pooled.new_ones(1, tokens)]).expand(batch, -1, -1)
    attention = WHOLE.attend(read, selector.to(read.query.data.dtype), None, parts)
    with no_autocast(low.device.type):
        kernels = torch.matmul(pair.token_weight, pooled.to(pair.token_weight.dtype)[:, None, None])
        constant = pair.constant_weight[:, :, :, None].expand(batch, -1, -1, -1, -1)
        kernels = torch.cat([kernels, constant], dim=4).permute(0, 1, 4, 2, 3)
    geometry: Any = (conv.stride, conv.padding, conv.dilation)
    out = F.conv2d(high, pair.high_weight.to(conv.weight.dtype), conv.bias, *geometry)
    for image in range(batch):  # every image has kernels of its own
        out[image].add_(F.conv2d(attention[image], kernels[image].to(attention.dtype), None, *geometry))
    return out
