"""mmsegmentation's ANN head with fused blocks, registered as ``FusedANNHead``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmseg.models.decode_heads.ann_head import ANNHead
from mmseg.models.losses import CrossEntropyLoss
from mmseg.models.losses.cross_entropy_loss import cross_entropy
from mmseg.registry import MODELS
from torch import Tensor

from ..interop.heads import MergingHead
from ..interop.replace import replace_blocks
from ..pyramid import POOL_SIZES
from ..upsampled import upsampled_argmax, upsampled_cross_entropy

_EPS = torch.finfo(torch.float32).eps
"""What mmsegmentation adds to counts that it divides by."""


@MODELS.register_module()
class FusedANNHead(MergingHead, ANNHead):  # type: ignore[misc]
    """mmsegmentation's ``ANNHead``, its two blocks collapsed and fused: same arguments, parameters, keys and losses.

    ``ak.fold_for_inference`` merges its AFNB with the bottleneck behind it. A plain ``CrossEntropyLoss`` without
    sampler and class weights, and the accuracy beside it, are computed without logits of full resolution, to the same
    numbers; ``print(head)`` says why where they are not.

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

    def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: Any) -> dict[str, Tensor]:
        """mmsegmentation's losses of logits (B, K, h, w), and the accuracy that it logs."""
        if self.why_plain_loss() is not None:
            losses: dict[str, Tensor] = super().loss_by_feat(seg_logits, batch_data_samples)
            return losses
        head: Any = self
        criterion, ignored = head.loss_decode, head.ignore_index
        labels: Tensor = head._stack_batch_gt(batch_data_samples).squeeze(1)
        total = upsampled_cross_entropy(
            seg_logits,
            labels,
            ignore_index=ignored,
            reduction="none" if criterion.reduction == "none" else "sum",
            align_corners=head.align_corners,
        )
        counts = labels != ignored
        if criterion.reduction == "mean":  # by default over all pixels, those that are ignored included
            total = total / ((counts.sum() if criterion.avg_non_ignore else labels.numel()) + _EPS)
        with torch.no_grad():
            chosen = upsampled_argmax(seg_logits, labels.shape[1:], align_corners=head.align_corners)
            right = ((chosen == labels) & counts).sum(dtype=torch.float32)
            accuracy = (right + _EPS) * (100.0 / (counts.sum() + _EPS))
        return {criterion.loss_name: criterion.loss_weight * total, "acc_seg": accuracy[None]}

    def why_plain_loss(self) -> str | None:
        """Why this head's losses are made from logits of full resolution; None if they are not."""
        criterion: Any = self.loss_decode
        if self.sampler is not None:
            return f"the sampler {type(self.sampler).__name__} reads logits of full resolution"
        if type(criterion) is not CrossEntropyLoss:
            return f"loss_decode is {type(criterion).__name__}, not one CrossEntropyLoss"
        if criterion.cls_criterion is not cross_entropy:
            return "loss_decode uses sigmoids or masks"
        if criterion.class_weight is not None:
            return "loss_decode has class weights"
        return None

    def extra_repr(self) -> str:
        reason = self.why_plain_loss()
        how = "without logits of full resolution" if reason is None else f"as mmsegmentation's: {reason}"
        return f"{super().extra_repr()}, loss {how}"
