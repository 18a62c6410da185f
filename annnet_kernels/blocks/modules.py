"""AFNB and APNB, the two blocks of ANNNet: the published modules and state-dict keys with a collapsed, fused forward.

Both ask, for every pixel of a feature map, T pooled tokens instead of every other pixel. What a block computes is in
``reference/blocks.py``, why it can be computed with half the arithmetic is in ``collapse.py``; here is what a user
constructs, calls and loads checkpoints into.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from .. import checks
from ..pyramid import POOL_SIZES
from ..reference.blocks import AttentionStage, NormLayer, PlainAFNB, PlainAPNB, PoolSizes, PyramidPooling
from .collapse import Parts
from .folding import Foldable, explain
from .requirements import parts_to_collapse
from .structures import Path, Structure, path_of


def _structure(*tail: str) -> Structure:
    """Where the modules of a block are, as the constructor makes them; ``tail`` is what follows the bottleneck's first.

    The settings that a published stage has are the widths of its keys and values.
    """
    stage = ("stages", "0")
    containers: dict[Path, type[nn.Module]] = {stage: AttentionStage, (*stage, "psp"): PyramidPooling}
    pools = (*stage, "psp", "stages")
    containers[pools] = nn.ModuleList
    for role in ("f_key", "f_query"):
        containers |= {(*stage, role): nn.Sequential, (*stage, role, "1"): nn.Sequential}
    paths = [path_of(f"conv_bn_dropout.{name}") for name in tail]
    containers |= {path[:end]: nn.Sequential for path in paths for end in range(1, len(path))}
    key, query = (((*stage, f, "0"), (*stage, f, "1", "0"), (*stage, f, "1", "1")) for f in ("f_key", "f_query"))
    value, out = (*stage, "f_value"), (*stage, "W")
    return Structure(
        key,
        query,
        value,
        out,
        ("conv_bn_dropout", "0") if tail else None,
        tuple(paths),
        pools,
        tuple(containers.items()),
        widths=((stage, "key_channels", query[0]), (stage, "value_channels", value)),
    )


_FUSION, _PYRAMID, _CONTEXT = _structure("1", "2"), _structure("1.0", "1.1", "2"), _structure()


class AFNB(Foldable, PlainAFNB):
    """Asymmetric fusion non-local block: queries from a high-level map, keys and values from a low-level one.

    Drop-in for the published module: same constructor, parameters, state-dict keys, outputs, gradients and running
    statistics. It runs collapsed and fused; where an inner module was replaced or carries a hook it runs the published
    forward instead and says so in its ``repr``.

    Args:
        low_in_channels: channels of ``low`` (1024 in ANNNet).
        high_in_channels: channels of ``high`` (2048).
        out_channels: channels of the output (2048).
        key_channels: width of queries and keys (256).
        value_channels: width of the values (256).
        dropout: probability of the trailing ``Dropout2d``.
        sizes: query scales; only ``(1,)``, since no published code base runs any other.
        norm_layer: called with a channel count, returns the normalisation module.
        psp_size: pool sizes, integers or (h, w) pairs; T = Σ s² tokens, 110 by default.
        bottleneck: whether to fuse the context with ``high`` (1 × 1 convolution over out + high channels, norm,
            dropout). False returns the context, as the simple published variant does.
        recompute: make the map ahead of the tail again in the backward pass instead of keeping it (2048 of the about
            2600 channels per pixel that this block keeps, 512 of an APNB's about 790, in float32). Its price is one
            more product of ``high`` and one more attention forward. Compiled code ignores it; activation checkpointing
            recomputes all by itself and needs it off. An attribute of the same name can be set at any time.
        device, dtype: of parameters and buffers, as PyTorch's own modules take them; None means PyTorch's defaults.

    Shapes:
        low (B, low_in_channels, H_l, W_l), high (B, high_in_channels, H, W) → (B, out_channels, H, W). Any strides;
        float32, float64, bfloat16 or float16, alike for inputs and parameters, or mixed under autocast.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Source: Zhu et al. 2019, arXiv 1908.07678, section 3.3; structure and keys of MendelXu/ANN.

    Example:
        >>> import torch, annnet_kernels as ak
        >>> block = ak.AFNB(64, 128, 128, key_channels=32, value_channels=32)
        >>> block(torch.randn(2, 64, 33, 33), torch.randn(2, 128, 33, 33)).shape
        torch.Size([2, 128, 33, 33])
    """

    def __init__(
        self,
        low_in_channels: int,
        high_in_channels: int,
        out_channels: int,
        key_channels: int,
        value_channels: int,
        dropout: float = 0.05,
        sizes: Sequence[int] = (1,),
        norm_layer: NormLayer = nn.BatchNorm2d,
        psp_size: PoolSizes = POOL_SIZES,
        *,
        bottleneck: bool = True,
        recompute: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        with nullcontext() if device is None else torch.device(device):
            super().__init__(
                low_in_channels,
                high_in_channels,
                out_channels,
                key_channels,
                value_channels,
                dropout,
                sizes,
                norm_layer,
                psp_size,
                bottleneck=bottleneck,
            )
        if dtype is not None:
            self.to(dtype)
        self.recompute = recompute

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        parts = parts_to_collapse(self, low, high)
        if parts is None:
            return super().forward(low, high)
        checks.block_inputs(low=(low, parts.key.conv), high=(high, parts.query.conv))
        return self.run(parts, low, high)

    def parts(self) -> Parts:
        """The modules that the collapse reads."""
        return (_CONTEXT if self._modules.get("conv_bn_dropout") is None else _FUSION).parts(self)

    def extra_repr(self) -> str:
        return explain(self)


class APNB(Foldable, PlainAPNB):
    """Asymmetric pyramid non-local block: refines one map, with one projection for queries and keys.

    Drop-in for the published module, as :class:`AFNB`. The published forward calls the shared projection twice, so one
    training step moves its running statistics twice; here the projection is computed once and they still do.

    Args:
        in_channels: channels of ``x`` (512 in ANNNet).
        out_channels: channels of the output (512).
        key_channels, value_channels, dropout, sizes, norm_layer, psp_size, bottleneck, recompute,
            device, dtype: as for :class:`AFNB`; the tail has a ReLU between norm and dropout.

    Shapes:
        x (B, in_channels, H, W) → (B, out_channels, H, W). Strides and dtypes as for :class:`AFNB`.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.

    Source: Zhu et al. 2019, arXiv 1908.07678, section 3.2; structure and keys of MendelXu/ANN.

    Example:
        >>> import torch, annnet_kernels as ak
        >>> ak.APNB(64, 64, key_channels=32, value_channels=32)(torch.randn(2, 64, 33, 40)).shape
        torch.Size([2, 64, 33, 40])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        key_channels: int,
        value_channels: int,
        dropout: float = 0.05,
        sizes: Sequence[int] = (1,),
        norm_layer: NormLayer = nn.BatchNorm2d,
        psp_size: PoolSizes = POOL_SIZES,
        *,
        bottleneck: bool = True,
        recompute: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        with nullcontext() if device is None else torch.device(device):
            super().__init__(
                in_channels,
                out_channels,
                key_channels,
                value_channels,
                dropout,
                sizes,
                norm_layer,
                psp_size,
                bottleneck=bottleneck,
            )
        if dtype is not None:
            self.to(dtype)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        parts = parts_to_collapse(self, x)
        if parts is None:
            return super().forward(x)
        checks.block_inputs(x=(x, parts.query.conv))
        return self.run(parts, x, x)

    def parts(self) -> Parts:
        """The modules that the collapse reads."""
        return (_CONTEXT if self._modules.get("conv_bn_dropout") is None else _PYRAMID).parts(self)

    def extra_repr(self) -> str:
        return explain(self)
