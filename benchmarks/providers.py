"""Who is measured: ours and its peers, as modules over the same inputs and the same published parameters.

Peers come from ``annnet_kernels.reference`` (the published blocks) or differ from them in one named respect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import annnet_kernels as ak
from annnet_kernels import reference
from annnet_kernels.blocks.folding import merged_convolution
from annnet_kernels.pyramid import POOL_SIZES
from annnet_kernels.reference.blocks import AttentionStage, PlainAFNB, PlainAPNB, PyramidPooling
from annnet_kernels.reference.truth import pooling_matrix

from . import heads, published, upsampled
from .cases import CLASSES, KEY_CHANNELS, MODEL, PAIR, VALUE_CHANNELS, Case

OURS = "ours"
PLAIN = "plain eager"
NAIVE = "naive non-local"

ASYMMETRIC, NON_LOCAL, COPY, HEAD = "asymmetric", "non-local", "copy", "head"


@dataclass(frozen=True)
class Provider:
    """A way to compute a case.

    Args:
        name: in tables and records.
        build: makes the module for a case; its parameters bear the published names.
        family: what it computes and is held against: the asymmetric operation, the non-local one, a decode head of
            another code base, or a copy (which is no computation but the bandwidth limit).
        compile: mode of ``torch.compile``; None runs eagerly.
        backend: request for ``ak.use_backend``.
        effort: in which selections it runs: "quick", "standard" or "full", each including the ones before it.
        statistics: whether it promises the published running statistics (the shared projection of APNB counts twice).
        folded: whether weights are folded once they are loaded; such a provider runs in evaluation only.
        training_only: whether it differs from ours in training only, and is left out of evaluation.
        gpu: whether it runs in the cases for a GPU only.
        needs: finds what must be installed for it; None where it is not.
    """

    name: str
    build: Callable[[Case], nn.Module]
    family: str = ASYMMETRIC
    compile: str | None = None
    backend: str | None = None
    effort: str = "quick"
    statistics: bool = True
    folded: bool = False
    training_only: bool = False
    gpu: bool = False
    needs: Callable[[], object] | None = None


class FunctionModule(nn.Module):
    """A module without parameters around a function."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


# The two operators.


def plain_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As in the published forward: queries permuted to rows, the similarity map in memory, the context copied back."""
    batch, channels, height, width = query.shape
    rows = query.reshape(batch, channels, -1).permute(0, 2, 1)
    similarity = F.softmax(channels**-0.5 * torch.matmul(rows, key), dim=-1)
    context = torch.matmul(similarity, value.permute(0, 2, 1)).permute(0, 2, 1).contiguous()
    return context.view(batch, -1, height, width)


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same by PyTorch's fused attention, one head."""
    batch, channels, height, width = query.shape
    rows = (t.reshape(batch, 1, t.shape[1], -1).transpose(2, 3) for t in (query, key, value))
    context = F.scaled_dot_product_attention(*rows, scale=channels**-0.5)
    return context[:, 0].transpose(1, 2).reshape(batch, -1, height, width)


def convolved_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same as two 1 × 1 convolutions, one group per picture, with the tokens for weights."""
    batch, channels, height, width = query.shape
    tokens = key.shape[2]
    pixels = query.reshape(1, batch * channels, height, width)
    logits = F.conv2d(pixels, key.transpose(1, 2).reshape(batch * tokens, channels, 1, 1), groups=batch)
    similarity = (logits.view(batch, tokens, height, width) * channels**-0.5).softmax(dim=1)
    similarity = similarity.reshape(1, batch * tokens, height, width)
    context = F.conv2d(similarity, value.reshape(-1, tokens, 1, 1), groups=batch)
    return context.view(batch, -1, height, width)


def _mask_pool(case: Case) -> nn.Module:
    """Pooling as one product with a 0/1 matrix (exact in 16 bits), divided by the areas afterwards."""
    sizes = list(POOL_SIZES)
    mask = pooling_matrix(sizes, sizes, *case.size)
    module = FunctionModule(lambda x: (x.flatten(2) @ module.mask) * module.share)
    module.register_buffer("mask", (mask > 0).to(getattr(torch, case.dtype)), persistent=False)
    module.register_buffer("share", mask.amax(dim=0).to(getattr(torch, case.dtype)), persistent=False)
    return module


def plain_pool(x: Tensor) -> Tensor:
    return reference.pyramid_pool(x, POOL_SIZES, POOL_SIZES)


# The blocks.


class SdpaStage(AttentionStage):
    """The published stage with its softmax and products replaced by PyTorch's fused attention."""

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        query = self.f_query(high)
        context = sdpa_attention(query, self.psp(self.f_key(low)), self.psp(self.f_value(low)))
        projected: Tensor = self.W(context)
        return projected


class CollapsedStage(AttentionStage):
    """Keys and queries of the published stage; the rest of the collapse is in :class:`CollapsedBlock`."""

    def attention(self, low: Tensor, high: Tensor) -> Tensor:
        query = self.f_query(high)
        key = self.psp(query if self.f_key is self.f_query else self.f_key(low))
        logits = torch.matmul(query.flatten(2).transpose(1, 2), key)
        return F.softmax(self.key_channels**-0.5 * logits, dim=-1)


class CollapsedBlock(nn.Module):
    """The collapsed formula in plain PyTorch: what the algebra alone gives.

    A shared projection is called once, so its running statistics move once instead of twice.
    """

    def __init__(self, block: PlainAFNB | PlainAPNB) -> None:
        super().__init__()
        self.stages, self.conv_bn_dropout = block.stages, block.conv_bn_dropout

    def forward(self, *maps: Tensor) -> Tensor:
        low, high = maps[0], maps[-1]
        stage, (join, *tail) = self.stages[0], self.conv_bn_dropout
        context_half, high_half = join.weight.split([stage.W.out_channels, high.shape[1]], dim=1)
        chain = [conv.flatten(1).t() for conv in (stage.f_value.weight, stage.W.weight, context_half)]
        values = stage.psp(low).transpose(1, 2)  # (B, T, C_l)
        for matrix in chain:
            values = torch.matmul(values, matrix)
        constant = context_half.flatten(1) @ (stage.W.weight.flatten(1) @ stage.f_value.bias + stage.W.bias) + join.bias
        context = torch.matmul(values.transpose(1, 2), stage.attention(low, high).transpose(1, 2))
        out = context.view(high.shape[0], -1, *high.shape[2:]) + F.conv2d(high, high_half, constant)
        for module in tail:
            out = module(out)
        return out


def _plain(case: Case, stage: type[AttentionStage] = AttentionStage, psp: nn.Module | None = None) -> nn.Module:
    """The published block of a case, with another stage or another reduction of keys and values in it."""
    widths = (KEY_CHANNELS, VALUE_CHANNELS)
    afnb = case.subject != "APNB"
    inputs = (case.low_channels, case.channels) if afnb else (case.channels,)
    block = (PlainAFNB if afnb else PlainAPNB)(*inputs, case.out_channels, *widths)
    psp = PyramidPooling(POOL_SIZES) if psp is None else psp
    block.stages[0] = stage(inputs[0], inputs[-1], case.out_channels, *widths, nn.BatchNorm2d, psp, shared=not afnb)
    return block


def _ours(case: Case) -> nn.Module:
    if case.subject == "AFNB":
        return ak.AFNB(case.low_channels, case.channels, case.out_channels, KEY_CHANNELS, VALUE_CHANNELS)
    return ak.APNB(case.channels, case.out_channels, KEY_CHANNELS, VALUE_CHANNELS)


def _mmsegmentation(case: Case) -> nn.Module:
    if case.subject == "AFNB":
        return published.published_afnb(case.low_channels, case.channels, case.out_channels, KEY_CHANNELS)
    return published.published_apnb(case.channels, case.out_channels, KEY_CHANNELS)


def _collapsed(case: Case) -> nn.Module:
    return CollapsedBlock(_plain(case, CollapsedStage))


def _naive_non_local(case: Case) -> nn.Module:
    """``ak.NonLocalBlock``; for the fusion of two levels, which it does not offer, the AFNB without pooling."""
    if case.subject == "APNB":
        return ak.NonLocalBlock(case.channels, case.out_channels, KEY_CHANNELS, VALUE_CHANNELS)
    return _plain(case, psp=nn.Flatten(2))


# The AFNB with the convolution behind it.


class Pair(nn.Module):
    """An AFNB, its dropout inactive, and the 3 × 3 convolution of ANNNet."""

    def __init__(self, fusion: nn.Module, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.fusion = fusion
        self.context = nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1))

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        merged = merged_convolution(self.fusion, self.context[0], low, high, through=())
        return self.context(self.fusion(low, high)) if merged is None else merged

    def convolution_behind_fusion(self) -> nn.Module:
        """What ``ak.fold_for_inference`` asks a model for."""
        return self.context[0]


def _pair_of(block: Callable[[Case], nn.Module]) -> Callable[[Case], nn.Module]:
    def build(case: Case) -> nn.Module:
        return Pair(block(replace(case, subject="AFNB", out_channels=case.channels)), case.channels, case.out_channels)

    return build


# The model.


def _model(case: Case, **options: Any) -> ak.ANNNet:
    """Without dropout: inside a network its masks cannot be matched, and then nothing could be checked."""
    return ak.ANNNet(CLASSES, dropout=0.0, **options)


def _model_with(stage: type[AttentionStage], psp: Callable[[], nn.Module]) -> Callable[[Case], nn.Module]:
    def build(case: Case) -> nn.Module:
        net = _model(case, blocks="plain")
        for block in (net.fusion, net.context[2]):
            old = block.stages[0]
            low, high = old.f_value.in_channels, old.f_query[0].in_channels
            widths = (old.W.out_channels, KEY_CHANNELS, VALUE_CHANNELS)
            shared = old.f_key is old.f_query
            block.stages[0] = stage(low, high, *widths, nn.BatchNorm2d, psp(), shared=shared)
        return net

    return build


def _pyramid() -> nn.Module:
    return PyramidPooling(POOL_SIZES)


_MAX_AUTOTUNE = "max-autotune-no-cudagraphs"  # graphs would pool memory and hide the launches that others pay for


def _function(function: Callable[..., Tensor]) -> Callable[[Case], nn.Module]:
    return lambda case: FunctionModule(function)


_POOL = (
    Provider(OURS, _function(ak.pyramid_pool)),
    Provider("ours, CUDA C++", _function(ak.pyramid_pool), backend="native", gpu=True),
    Provider(PLAIN, _function(plain_pool)),
    Provider("plain compiled", _function(plain_pool), compile="default"),
    Provider("plain max-autotune", _function(plain_pool), compile=_MAX_AUTOTUNE, effort="full"),
    Provider("mask product", _mask_pool),
    Provider("copy", _function(Tensor.clone), COPY),
)
_ATTENTION = (
    Provider(OURS, _function(ak.asymmetric_attention)),
    Provider(PLAIN, _function(plain_attention)),
    Provider("plain compiled", _function(plain_attention), compile="default"),
    Provider("plain max-autotune", _function(plain_attention), compile=_MAX_AUTOTUNE, effort="full"),
    Provider("SDPA on pooled keys", _function(sdpa_attention)),
    Provider("two 1×1 convolutions", _function(convolved_attention)),
    Provider(NAIVE, _function(plain_attention), NON_LOCAL),
    Provider("non-local by SDPA", _function(sdpa_attention), NON_LOCAL, effort="standard"),
    Provider("copy", _function(lambda query, key, value: query.clone()), COPY),
)
_BLOCK = (
    Provider(OURS, _ours),
    Provider("ours folded", _ours, folded=True),
    Provider("ours compiled", _ours, compile="default", effort="standard"),
    Provider(PLAIN, _plain),
    Provider("plain compiled", _plain, compile="default"),
    Provider("plain max-autotune", _plain, compile=_MAX_AUTOTUNE, effort="full"),
    Provider(
        # without the biases ahead of norms, which then are in running means
        "mmsegmentation",
        _mmsegmentation,
        effort="standard",
        statistics=False,
        needs=published.ann_head,
    ),
    Provider("collapsed plain", _collapsed, statistics=False),
    Provider("collapsed compiled", _collapsed, compile="default", effort="standard", statistics=False),
    Provider("SDPA on pooled keys", lambda case: _plain(case, SdpaStage)),
    Provider(NAIVE, _naive_non_local, NON_LOCAL),
    Provider("non-local by SDPA", lambda case: _plain(case, SdpaStage, nn.Flatten(2)), NON_LOCAL, effort="standard"),
)
_PAIR = (
    Provider(OURS, _pair_of(_ours), folded=True),
    Provider("ours unfolded", _pair_of(_ours)),
    Provider(PLAIN, _pair_of(_plain)),
    Provider("plain compiled", _pair_of(_plain), compile="default"),
    Provider("plain max-autotune", _pair_of(_plain), compile=_MAX_AUTOTUNE, effort="full"),
    Provider("collapsed plain", _pair_of(_collapsed)),
    Provider("collapsed compiled", _pair_of(_collapsed), compile="default", effort="standard"),
)
_MODEL = (
    Provider(OURS, _model),
    Provider("ours folded", _model, folded=True),
    Provider("ours compiled", _model, compile="default", effort="full"),
    Provider(PLAIN, lambda case: _model(case, blocks="plain")),
    Provider("plain compiled", lambda case: _model(case, blocks="plain"), compile="default", effort="standard"),
    Provider("SDPA on pooled keys", _model_with(SdpaStage, _pyramid)),
    Provider(NAIVE, _model_with(AttentionStage, lambda: nn.Flatten(2)), NON_LOCAL),
)
_HEADS = (
    Provider(OURS, lambda case: heads.replaced(case.subject), HEAD),
    Provider(PLAIN, lambda case: heads.plain(case.subject), HEAD),
    Provider("ours compiled", lambda case: heads.replaced(case.subject), HEAD, compile="default", effort="full"),
    Provider("plain compiled", lambda case: heads.plain(case.subject), HEAD, compile="default", effort="full"),
)


def _upsampled(ours: bool) -> Callable[[Case], nn.Module]:
    return lambda case: FunctionModule(upsampled.function(case.subject, ours, (case.batch, case.channels, *case.size)))


_UPSAMPLED = (
    Provider(OURS, _upsampled(True)),
    Provider(PLAIN, _upsampled(False)),
    Provider("striped plain", _upsampled(True), backend="reference"),
    Provider("plain compiled", _upsampled(False), compile="default"),
    Provider("plain max-autotune", _upsampled(False), compile=_MAX_AUTOTUNE, effort="full"),
)
_NETWORKS = (
    *_HEADS,
    Provider("ours, fused loss", lambda case: heads.with_fused_loss(case.subject), HEAD, training_only=True),
)
_BY_SUBJECT = {
    "pyramid_pool": _POOL,
    "asymmetric_attention": _ATTENTION,
    "AFNB": _BLOCK,
    "APNB": _BLOCK,
    PAIR: _PAIR,
    MODEL: _MODEL,
    **dict.fromkeys(heads.LAYERS, _HEADS),
    **dict.fromkeys((heads.SEGFORMER_B0, heads.SEGFORMER_B2), _NETWORKS),
    heads.SWIN: _HEADS,  # which resizes its logits before it returns them
    **dict.fromkeys(upsampled.SUBJECTS, _UPSAMPLED),
}
EFFORTS = ("quick", "standard", "full")


def providers(case: Case, effort: str) -> list[Provider]:
    """Who competes in a case; ours first. A quick run compiles in few cases only."""
    allowed = EFFORTS[: EFFORTS.index(effort) + 1]
    compiles = effort != "quick" or case.compiled
    chosen = [p for p in _in_mode(case) if p.effort in allowed and (compiles or p.compile is None)]
    return [p for p in chosen if p.needs is None or p.needs() is not None]


def left_out(case: Case, effort: str) -> list[str]:
    """Names of the providers that ``effort`` does without."""
    present = {p.name for p in providers(case, effort)}
    return [p.name for p in _in_mode(case) if p.name not in present]


def _in_mode(case: Case) -> list[Provider]:
    on_gpu = any(tag.startswith("gpu-") for tag in case.tags)
    fitting = [p for p in _BY_SUBJECT[case.subject] if not (p.training_only if not case.training else p.folded)]
    return [p for p in fitting if on_gpu or not p.gpu]


def template(case: Case) -> nn.Module | None:
    """The plain module whose parameters every provider of a block or model shares; None for the operators."""
    if case.subject == MODEL:
        return _model(case, blocks="plain")
    if case.subject == PAIR:
        return _pair_of(_plain)(case)
    if case.subject in heads.HEADS:
        return heads.plain(case.subject)
    return _plain(case) if case.subject in ("AFNB", "APNB") else None
