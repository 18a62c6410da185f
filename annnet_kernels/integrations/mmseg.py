"""mmsegmentation's ANN head with fused blocks, registered as ``FusedANNHead``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmseg.models.decode_heads.ann_head import ANNHead
from mmseg.registry import MODELS

from ..heads import MergingHead
from ..pyramid import POOL_SIZES
from ..replace import replace_blocks


@MODELS.register_module()
class FusedANNHead(MergingHead, ANNHead):  # type: ignore[misc]
    """mmsegmentation's ``ANNHead``, its two blocks collapsed and fused: same arguments, parameters, keys and losses.

    ``ak.fold_for_inference`` merges its AFNB with the bottleneck behind it.

    A configuration needs one word changed, ``type="annnet_kernels.integrations.mmseg.FusedANNHead"``; or
    ``type="FusedANNHead"`` with ``custom_imports = dict(imports=["annnet_kernels.integrations.mmseg"])``.

    Args:
        project_channels: width of queries, keys and values (256).
        query_scales: only ``(1,)``; mmsegmentation's own head crashes with any other.
        key_pool_scales: pool sizes.
        **kwargs: as ``BaseDecodeHead`` takes them; ``in_channels`` are those of stages 4 and 5, in this order.

    Shapes:
        inputs: one map (B, C_i, H_i, W_i) per backbone stage → logits (B, num_classes, H, W) at the size of stage 5.

    Raises:
        ImportError: mmsegmentation, or mmcv with its compiled operators, is not installed.
        ValueError: a block of this configuration cannot be fused; the message says why.

    Source: ``mmseg.models.decode_heads.ann_head`` of mmsegmentation 1.2.

    Example:
        >>> import annnet_kernels as ak
        >>> head = ak.FusedANNHead(  # doctest: +SKIP
        ...     project_channels=256, in_channels=[1024, 2048], in_index=[2, 3], channels=512, num_classes=19,
        ...     norm_cfg=dict(type="SyncBN"),
        ... )
    """

    def __init__(
        self,
        project_channels: int,
        query_scales: Sequence[int] = (1,),
        key_pool_scales: Sequence[int] = POOL_SIZES,
        **kwargs: Any,
    ) -> None:
        super().__init__(project_channels, query_scales=query_scales, key_pool_scales=key_pool_scales, **kwargs)
        report = replace_blocks(self)
        if set(report.replaced) != {"fusion", "context"}:
            raise ValueError(f"FusedANNHead: expected two blocks that can be fused, got:\n{report}")
