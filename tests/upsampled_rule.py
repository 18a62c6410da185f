"""The upsampled cross-entropy held to the error rule: plain PyTorch's operations in the same dtype and in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from helpers import SEEDS, Results, assert_as_accurate_as_plain, random_map
from torch import Tensor

import annnet_kernels as ak

IGNORED = 255


def random_labels(
    classes: int, batch: int, size: tuple[int, int], dtype: torch.dtype = torch.int64, device: str = "cpu"
) -> Tensor:
    """(B, H, W), an eighth of them ignored; at least one pixel of each image counts."""
    labels = torch.randint(0, classes, (batch, *size), device=device)
    ignored = torch.rand(labels.shape, device=device) < 0.125
    ignored[:, -1, -1] = False
    return labels.masked_fill(ignored, IGNORED).to(dtype)


def plain_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, *, align_corners: bool = False, **options: Any
) -> Tensor:
    """What a training loop does; in float64, the truth."""
    upsampled = F.interpolate(logits, target.shape[-2:], mode="bilinear", align_corners=align_corners)
    weight = None if weight is None else weight.to(logits.dtype)
    return F.cross_entropy(upsampled, target.long(), weight, **options)


def with_gradient(loss: Any, logits: Tensor, target: Tensor, weight: Tensor | None, grad: Tensor, **options: Any):
    leaf = logits.detach().requires_grad_()
    out = loss(leaf, target, weight, **options)
    (dlogits,) = torch.autograd.grad(out, leaf, grad.to(out.dtype))
    return {"loss": out.detach(), "dlogits": dlogits}


def assert_accurate(
    shape: tuple[int, int, int, int],
    size: tuple[int, int],
    dtype: torch.dtype,
    backend: str | None,
    layout: str = "nchw",
    *,
    label_dtype: torch.dtype = torch.int64,
    weighted: bool = False,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    align_corners: bool = False,
    magnitude: float = 2.0,
    device: str = "cpu",
    seeds: int = SEEDS,
) -> None:
    """Loss and gradient by the rule; ``magnitude`` is the standard deviation of the logits."""

    def run(_: int) -> tuple[Results, Results, Results]:
        logits = random_map(shape, dtype, layout, device, magnitude)
        target = random_labels(shape[1], shape[0], size, label_dtype, device)
        weight = (torch.rand(shape[1], device=device) + 0.25).to(torch.promote_types(dtype, torch.float32))
        grad = torch.randn(target.shape if reduction == "none" else (), device=device).to(dtype)
        operands = (target, weight if weighted else None, grad)
        options = {
            "ignore_index": IGNORED,
            "reduction": reduction,
            "label_smoothing": label_smoothing,
            "align_corners": align_corners,
        }
        with ak.use_backend(backend):
            ours = with_gradient(ak.upsampled_cross_entropy, logits, *operands, **options)
        assert ours["loss"].dtype == ours["dlogits"].dtype == dtype
        plain = with_gradient(plain_cross_entropy, logits, *operands, **options)
        return ours, plain, with_gradient(plain_cross_entropy, logits.double(), *operands, **options)

    assert_as_accurate_as_plain(run, dtype, seeds=seeds)


def assert_argmax(
    shape: tuple[int, int, int, int],
    size: tuple[int, int],
    dtype: torch.dtype,
    backend: str | None,
    layout: str = "nchw",
    *,
    align_corners: bool = False,
    device: str = "cpu",
) -> None:
    """The class chosen is the largest in float64, but for rounding of the two largest."""
    logits = random_map(shape, dtype, layout, device)
    with ak.use_backend(backend):
        chosen = ak.upsampled_argmax(logits, size, align_corners=align_corners)
    assert chosen.dtype == torch.int64
    assert chosen.shape == (shape[0], *size)
    upsampled = F.interpolate(logits.double(), size, mode="bilinear", align_corners=align_corners)
    short = upsampled.amax(1) - upsampled.gather(1, chosen[:, None])[:, 0]
    assert float(short.max()) <= 1e-5
    assert float((chosen == upsampled.argmax(1)).double().mean()) >= 0.99
