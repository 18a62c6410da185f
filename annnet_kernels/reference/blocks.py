"""The published blocks in plain PyTorch: module structure, state-dict keys and forward, operation by operation.

They are the baseline of every ratio, so nothing here is slower than published: each projection is called as often as
published, there is one concatenation and no copy beyond the published ones. ``annnet_kernels.AFNB`` and ``APNB``
inherit structure and keys and replace the forward. Structure and keys follow MendelXu/ANN.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..pyramid import POOL_SIZES

NormLayer = Callable[[int], nn.Module]
PoolSizes = Sequence[int | tuple[int, int]]


class PyramidPooling(nn.Module):
    """(B, C, H, W) → (B, C, T): one adaptive average pooling per level, concatenated."""

    def __init__(self, sizes: PoolSizes) -> None:
        super().__init__()
        self.heights, self.widths = checks.output_sizes("psp_size", sizes)
        self.stages = nn.ModuleList(nn.AdaptiveAvgPool2d(size) for size in zip(self.heights, self.widths, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([pool(x).flatten(2) for pool in self.stages], dim=2)


class AttentionStage(nn.Module):
    """Queries from ``high``, keys and values from ``low``, both reduced by ``psp``, and the output projection W.

    ``shared`` makes query and key projection one module. W starts at zero, so a fresh block adds nothing.
    """

    def __init__(
        self,
        low_in_channels: int,
        high_in_channels: int,
        out_channels: int,
        key_channels: int,
        value_channels: int,
        norm_layer: NormLayer,
        psp: nn.Module,
        shared: bool,
    ) -> None:
        super().__init__()
        self.key_channels = key_channels
        self.value_channels = value_channels
        self.f_key = self._projection(low_in_channels, key_channels, norm_layer)
        self.f_query = self.f_key if shared else self._projection(high_in_channels, key_channels, norm_layer)
        self.f_value = nn.Conv2d(low_in_channels, value_channels, kernel_size=1)
        self.W = nn.Conv2d(value_channels, out_channels, kernel_size=1)
        self.psp = psp
        nn.init.zeros_(self.W.weight)
        nn.init.zeros_(self.W.bias)  # type: ignore[arg-type]

    @staticmethod
    def _projection(in_channels: int, key_channels: int, norm_layer: NormLayer) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(in_channels, key_channels, kernel_size=1), nn.Sequential(norm_layer(key_channels), nn.ReLU())
        )

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        batch, _, height, width = high.shape
        value = self.psp(self.f_value(low)).permute(0, 2, 1)
        query = self.f_query(high).flatten(2).permute(0, 2, 1)
        key = self.psp(self.f_key(low))
        similarity = F.softmax(self.key_channels**-0.5 * torch.matmul(query, key), dim=-1)
        context = torch.matmul(similarity, value).permute(0, 2, 1).contiguous()
        projected: Tensor = self.W(context.view(batch, self.value_channels, height, width))
        return projected


class _PlainBlock(nn.Module):
    """One stage, then (with a bottleneck) convolution over [context, high], norm, activation, dropout."""

    stages: nn.ModuleList
    conv_bn_dropout: nn.Sequential | None

    def _build(self, stage: AttentionStage, high_in_channels: int, tail: Sequence[nn.Module] | None) -> None:
        self.stages = nn.ModuleList([stage])
        if tail is None:
            self.conv_bn_dropout = None
        else:
            out_channels = stage.W.out_channels
            join = nn.Conv2d(out_channels + high_in_channels, out_channels, kernel_size=1)
            self.conv_bn_dropout = nn.Sequential(join, *tail)

    def _attend(self, low: Tensor, high: Tensor) -> Tensor:
        context: Tensor = self.stages[0](low, high)
        if self.conv_bn_dropout is None:
            return context
        out: Tensor = self.conv_bn_dropout(torch.cat([context, high], dim=1))
        return out


def _check_channels(**channels: object) -> None:
    for name, value in channels.items():
        checks.positive_int(name, value)


class PlainAFNB(_PlainBlock):
    """The published asymmetric fusion block. Arguments as :class:`annnet_kernels.AFNB`."""

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
    ) -> None:
        super().__init__()
        _check_channels(
            low_in_channels=low_in_channels,
            high_in_channels=high_in_channels,
            out_channels=out_channels,
            key_channels=key_channels,
            value_channels=value_channels,
        )
        checks.block_options(dropout, sizes, norm_layer)
        stage = AttentionStage(
            low_in_channels,
            high_in_channels,
            out_channels,
            key_channels,
            value_channels,
            norm_layer,
            PyramidPooling(psp_size),
            shared=False,
        )
        tail = [norm_layer(out_channels), nn.Dropout2d(dropout)] if bottleneck else None
        self._build(stage, high_in_channels, tail)

    def forward(self, low: Tensor, high: Tensor) -> Tensor:
        return self._attend(low, high)


class PlainAPNB(_PlainBlock):
    """The published asymmetric pyramid block. Arguments as :class:`annnet_kernels.APNB`."""

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
    ) -> None:
        super().__init__()
        _check_channels(
            in_channels=in_channels,
            out_channels=out_channels,
            key_channels=key_channels,
            value_channels=value_channels,
        )
        checks.block_options(dropout, sizes, norm_layer)
        self._build(
            AttentionStage(
                in_channels,
                in_channels,
                out_channels,
                key_channels,
                value_channels,
                norm_layer,
                PyramidPooling(psp_size),
                shared=True,
            ),
            in_channels,
            [nn.Sequential(norm_layer(out_channels), nn.ReLU()), nn.Dropout2d(dropout)] if bottleneck else None,
        )

    def forward(self, x: Tensor) -> Tensor:
        return self._attend(x, x)


class NonLocalBlock(_PlainBlock):
    """The naive non-local block, the baseline that the asymmetric blocks were made to replace: every pixel is a token.

    The same block as :class:`annnet_kernels.APNB` without pooling, bottleneck included, in plain PyTorch. It writes
    an N × N similarity map, N = H·W: 4 GiB per image in float32 at 128 × 256.

    Args:
        in_channels, out_channels, key_channels, value_channels: channel counts, at least 1.
        dropout: probability of the trailing ``Dropout2d``.
        norm_layer: called with a channel count, returns the normalisation module.
        bottleneck: whether to fuse the context with the input; False returns the context.

    Shapes:
        x (B, in_channels, H, W) → (B, out_channels, H, W), of the dtype of ``x``.

    Raises:
        TypeError, ValueError: a channel count is no positive integer, ``dropout`` no probability, or ``norm_layer``
            not callable.

    Source: Wang et al. 2018, arXiv 1711.07971 (embedded Gaussian); bottleneck as in Zhu et al. 2019.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        key_channels: int,
        value_channels: int,
        dropout: float = 0.05,
        norm_layer: NormLayer = nn.BatchNorm2d,
        *,
        bottleneck: bool = True,
    ) -> None:
        super().__init__()
        _check_channels(
            in_channels=in_channels,
            out_channels=out_channels,
            key_channels=key_channels,
            value_channels=value_channels,
        )
        checks.block_options(dropout, (1,), norm_layer)
        self._build(
            AttentionStage(
                in_channels,
                in_channels,
                out_channels,
                key_channels,
                value_channels,
                norm_layer,
                nn.Flatten(start_dim=2),
                shared=True,
            ),
            in_channels,
            [nn.Sequential(norm_layer(out_channels), nn.ReLU()), nn.Dropout2d(dropout)] if bottleneck else None,
        )

    def forward(self, x: Tensor) -> Tensor:
        value = cast(AttentionStage, self.stages[0]).f_value
        if type(value) is nn.Conv2d and "forward" not in vars(value):  # of another module nothing is known
            checks.block_inputs(x=(x, value))
        return self._attend(x, x)
