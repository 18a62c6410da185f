"""mmsegmentation's ANN head around two replaced blocks: a folded AFNB merges with the bottleneck's convolution.

Only the owner of block and convolution can merge them. The head's own forward is recognised by its code; what takes
its place calls the same modules in the same order, but asks for the merge first.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from ..blocks.folding import merged_convolution
from .recognition import PUBLISHED_HEADS, fingerprint, is_published_code


class MergingHead(nn.Module):
    """The forward of ``ANNHead``; mixed in before the head's own class."""

    def forward(self, inputs: Any) -> Tensor:
        head: Any = self
        low, high = head._transform_inputs(inputs)
        bottleneck = head.bottleneck
        dropout = nn.Identity() if head.dropout is None else head.dropout  # mmsegmentation's own head fails on None
        out = merged_convolution(head.fusion, bottleneck.conv, low, high, through=(dropout, bottleneck))
        if out is None:
            out = bottleneck(dropout(head.fusion(low, high)))
        else:
            out = bottleneck.norm(out) if bottleneck.with_norm else out
            out = bottleneck.activate(out) if bottleneck.with_activation else out
        return cast(Tensor, head.cls_seg(head.context(out)))

    def convolution_behind_fusion(self) -> nn.Conv2d | None:
        """The convolution that alone reads the AFNB's output; None where the bottleneck is not the published one."""
        bottleneck: Any = self.bottleneck
        usual = (
            type(self).forward is MergingHead.forward
            and is_published_code(type(bottleneck), "mmseg")
            and bottleneck.order == ("conv", "norm", "act")
            and not bottleneck.with_explicit_padding
        )
        return cast(nn.Conv2d, bottleneck.conv) if usual else None


def is_published_head(module: nn.Module) -> bool:
    """Whether a module's forward is that of ``ANNHead``, as published."""
    return "forward" not in vars(module) and fingerprint(type(module).forward) in PUBLISHED_HEADS
