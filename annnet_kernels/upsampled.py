"""The public functions of upsampled logits: check the arguments, call the operator, reduce."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from . import checks, onnx
from .ops import UpsampledCrossEntropy
from .ops.functions import apply
from .runtime.autocast import autocast_dtype
from .runtime.backends import requested_backend

REDUCTIONS = ("none", "mean", "sum")


def upsampled_cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    align_corners: bool = False,
) -> Tensor:
    """Cross-entropy of bilinearly upsampled logits, without the upsampled logits.

    Equals ``F.cross_entropy(F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=align_corners),
    target, …)``, but nothing with all classes exists at full resolution. Logits of 16 bits are upsampled in float32,
    and each result is rounded once. Bitwise deterministic, forward and backward; differentiable once, for ``logits``
    only. Under autocast the logits keep their dtype, and the loss is float32.

    Args:
        logits: (B, K, h, w), float32, float64, bfloat16 or float16, in any strides (nothing is copied).
        target: class indices (B, H, W), int64, int32 or uint8, each from 0 to K − 1 or ``ignore_index``; (H, W) is the
            size to upsample to, of at least one pixel, larger or smaller than (h, w).
        weight: weights of the classes (K,), in float32 (float64 for float64 logits) or in the dtype of ``logits``.
        ignore_index: label of the pixels that do not count.
        reduction: ``"none"``, ``"sum"`` or ``"mean"``: the sum divided by the sum of the weights of the labels.
        label_smoothing: from 0 to 1, the share of the target that is spread evenly over all classes.
        align_corners: whether the centres of the corner pixels coincide, as in ``F.interpolate``.

    Returns:
        The loss in the dtype of ``logits``, float32 under autocast: (B, H, W) for ``"none"``, else a scalar. The mean
        over no pixel is NaN and its gradient zero.

    Raises:
        TypeError: an argument is of another type or dtype; a floating-point ``target`` holds probabilities.
        ValueError: a rank, shape or device does not fit; an unknown ``reduction``; ``label_smoothing`` outside [0, 1].
        IndexError: on a CPU, a label names no class. On a GPU, where this would wait for the device, the loss and the
            gradients to which the pixel contributes are NaN instead.
        RuntimeError: a requested backend cannot run.

    Example:
        >>> import torch, annnet_kernels as ak
        >>> logits, labels = torch.randn(2, 19, 65, 65, requires_grad=True), torch.randint(0, 19, (2, 513, 513))
        >>> loss = ak.upsampled_cross_entropy(logits, labels, ignore_index=255)
        >>> loss.backward()
    """
    checks.feature_map("logits", logits)
    checks.labels("target", target, logits)
    weight = None if weight is None else checks.class_weights("weight", weight, logits).detach()
    ignore_index = checks.integer("ignore_index", ignore_index)
    checks.one_of("reduction", reduction, REDUCTIONS)
    smoothing = checks.fraction("label_smoothing", label_smoothing)
    align_corners = checks.flag("align_corners", align_corners)
    dtype = torch.promote_types(logits.dtype, torch.float32) if autocast_dtype(logits) is not None else logits.dtype
    if onnx.exporting():
        wide = onnx.upsampled(logits, target.shape[1:], align_corners)
        loss = F.cross_entropy(wide, target.long(), weight, None, ignore_index, None, reduction, smoothing)
        return loss.to(dtype)
    per_pixel = reduction == "none"
    gradient = not per_pixel and torch.is_grad_enabled() and logits.requires_grad
    losses, sums, _ = apply(
        UpsampledCrossEntropy,
        logits,
        target,
        weight,
        ignore_index,
        smoothing,
        align_corners,
        per_pixel,
        gradient,
        requested_backend(),
    )
    if per_pixel:
        loss = losses
    else:
        loss, weights = sums.sum(0).unbind()
        if reduction == "mean":
            none = weights == 0  # where 1 / 0 would make the gradient NaN
            loss = torch.where(none, torch.nan, loss / torch.where(none, 1, weights))
    return loss.to(dtype)


def upsampled_argmax(logits: Tensor, size: Sequence[int], *, align_corners: bool = False) -> Tensor:
    """The class of each pixel: the argmax of bilinearly upsampled logits, without the upsampled logits.

    Equals ``F.interpolate(logits.float(), size, mode="bilinear", align_corners=align_corners).argmax(1)`` except where
    two classes are within rounding of each other; ties go to the lowest class. Not differentiable.

    Args:
        logits: (B, K, h, w), float32, float64, bfloat16 or float16, in any strides (nothing is copied).
        size: (H, W) of the result, larger or smaller than (h, w).
        align_corners: whether the centres of the corner pixels coincide, as in ``F.interpolate``.

    Returns:
        Class indices (B, H, W), int64.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it.
        RuntimeError: a requested backend cannot run.

    Example:
        >>> import torch, annnet_kernels as ak
        >>> ak.upsampled_argmax(torch.randn(2, 19, 65, 65), (513, 513)).shape
        torch.Size([2, 513, 513])
    """
    checks.feature_map("logits", logits)
    height, width = checks.pixel_size("size", size)
    align_corners = checks.flag("align_corners", align_corners)
    if onnx.exporting():
        return onnx.upsampled(logits, (height, width), align_corners).argmax(1)
    with torch.no_grad():
        indices: Tensor = torch.ops.annnet.upsampled_argmax(logits.detach(), [height, width], align_corners)
    return indices
