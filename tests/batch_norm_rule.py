"""How the tests of the normalising tail judge its operators: against autograd through F.batch_norm."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from helpers import SEEDS, assert_as_accurate_as_plain, random_map
from torch import Tensor

import annnet_kernels as ak
from annnet_kernels.layouts import is_channels_last

EPS = 1e-5


def vector_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def assert_tail_accurate(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    backend: str | None,
    layout: str = "nchw",
    grad_layout: str = "nchw",
    *,
    relu: bool = True,
    dropout: bool = True,
    frozen: bool = False,
    offset: float = 1.0,
    device: str = "cpu",
    seeds: int = SEEDS,
) -> None:
    """Hold every result of a forward and a backward pass to the project's rule; ``offset`` is mean/σ of the map."""

    def run(_: int) -> tuple[Mapping[str, Tensor], ...]:
        y = _shifted_map(shape, dtype, layout, device, offset)
        grad = _shifted_map(shape, dtype, grad_layout, device, 0.5)
        channels = shape[1]
        weight, bias, mean = (torch.randn(channels, device=device, dtype=vector_dtype(dtype)) for _ in range(3))
        running = (mean + offset, mean.square() + 0.5) if frozen else None
        factor = torch.randint(0, 3, shape[:2], device=device).to(vector_dtype(dtype)) / 2 if dropout else None
        arguments = (y, grad, weight, bias, running, factor, relu)
        ours = tail(*arguments, backend)
        assert is_channels_last(ours["out"]) == is_channels_last(ours["dy"]) == is_channels_last(y)
        assert ours["out"].dtype == ours["dy"].dtype == dtype
        truth = plain_tail(*(x.double() if isinstance(x, Tensor) else x for x in arguments[:4]), running, factor, relu)
        return ours, plain_tail(*arguments), truth

    assert_as_accurate_as_plain(run, dtype, seeds=seeds)


def _shifted_map(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, device: str, offset: float
) -> Tensor:
    """A random map that keeps its strides. Sums that are zero but for chance would have no relative error to judge."""
    x = random_map(shape, dtype, layout, device)
    return (x[:, :1] + offset).expand(shape) if layout == "expanded" else x.add_(offset)


def statistics(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance."""
    count, mean, deviation = torch.ops.annnet.batch_norm_moments(y)
    return mean, deviation / count


def tail(
    y: Tensor,
    grad: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor] | None,
    factor: Tensor | None,
    relu: bool,
    backend: str | None,
) -> dict[str, Tensor]:
    """The operators, put together as a block does."""
    operators = torch.ops.annnet
    with torch.no_grad(), ak.use_backend(backend):
        if running is None:
            mean, var = statistics(y)
            norm = operators.batch_norm_update(y, None, weight, bias, None, None, None, None, EPS, 0.1, 1)
        else:
            norm = operators.batch_norm_table(y, *running, weight, bias, None, EPS)
        operands = (y, norm, factor)
        out = operators.batch_norm_apply(*operands, relu)
        sums = operators.batch_norm_bwd_sums(grad, *operands, relu, backend)
        of_batch = (sums, y.numel() // y.shape[1]) if running is None else (None, 1)
        dy = operators.batch_norm_bwd_input(grad, *operands, relu, *of_batch, backend)
    results = {"out": out, "dy": dy, "dbias": sums[0], "dweight": sums[1]}
    return results | ({"mean": mean, "var": var} if running is None else {})


def plain_tail(
    y: Tensor,
    grad: Tensor,
    weight: Tensor,
    bias: Tensor,
    running: tuple[Tensor, Tensor] | None,
    factor: Tensor | None,
    relu: bool,
) -> dict[str, Tensor]:
    """The same by autograd, in the dtype of ``y``."""
    y, weight, bias = (x.detach().contiguous().requires_grad_() for x in (y, weight, bias))
    mean, var = (torch.zeros_like(weight) for _ in range(2)) if running is None else (r.to(weight) for r in running)
    statistics = [x.detach() for x in (mean, var)]
    out = F.batch_norm(y, *statistics, weight, bias, running is None, 1.0, EPS)
    out = F.relu(out) if relu else out
    out = out if factor is None else out * factor[:, :, None, None].to(out.dtype)
    dy, dweight, dbias = torch.autograd.grad(out, (y, weight, bias), grad)
    results = {"out": out, "dy": dy, "dbias": dbias, "dweight": dweight}
    if running is None:
        count = y.numel() // y.shape[1]
        results |= {"mean": statistics[0], "var": statistics[1] * ((count - 1) / count)}
    return results
