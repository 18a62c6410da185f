"""The error rule of the project, and the inputs that every test draws from.

A result is right when the median over five seeds of its relative error against float64 is at most 1.5 times that of
plain PyTorch in the same dtype, plus a floor for rounding noise. An absolute tolerance alone proves nothing in
bfloat16, and one seed alone fails a right block whose ReLU input lies within rounding of zero.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

SEEDS = 1 if "ANNNET_CPU_LEVEL" in os.environ else 5
"""Where all is run again at another instruction level, one draw; what fails there is judged by ``MORE`` draws."""
MORE = 5
FACTOR = 1.5
FLOOR = {torch.float64: 1e-13, torch.float32: 1e-7, torch.float16: 1e-4, torch.bfloat16: 1e-3}

Results = Mapping[str, Tensor]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """‖value − truth‖ / ‖truth‖ in float64; infinite where shapes differ or a value is not finite."""
    if value.shape != truth.shape:
        return float("inf")
    difference = (value.detach().double() - truth.detach().double()).norm()
    error = float(difference / truth.detach().double().norm().clamp_min(1e-300))
    return error if error == error else float("inf")


def assert_as_accurate_as_plain(
    run: Callable[[int], tuple[Results, Results, Results]],
    dtype: torch.dtype,
    factor: float = FACTOR,
    seeds: int = SEEDS,
) -> None:
    """Hold the project's results against plain PyTorch's, both judged by float64.

    Args:
        run: takes a seed drawn freshly here; returns (ours, plain, truth), each a mapping from names to tensors.
        dtype: chooses the floor for rounding noise.
        factor: how much larger than plain's our median error may be.
        seeds: how many draws the medians are over; more where single draws scatter.
    """
    failures = _failures(run, dtype, factor, seeds)
    if failures:  # the median over few draws scatters: what is wrong is still wrong over many
        failures = _failures(run, dtype, factor, MORE * seeds)
    assert not failures, f"{dtype}, {failures[0]}:\n  " + "\n  ".join(failures[1:])


def _failures(
    run: Callable[[int], tuple[Results, Results, Results]], dtype: torch.dtype, factor: float, seeds: int
) -> list[str]:
    """The seeds, then every result whose median error over them is too large; empty if none is.

    Where plain PyTorch's is infinite, nothing would be too large, and nothing is shown.
    """
    base = int(torch.randint(0, 2**31 - seeds, (), generator=_entropy()))
    errors: dict[str, list[tuple[float, float]]] = {}
    for seed in range(base, base + seeds):
        torch.manual_seed(seed)
        ours, plain, truth = run(seed)
        assert ours.keys() == truth.keys() == plain.keys(), (list(ours), list(plain), list(truth))
        for name, expected in truth.items():
            pair = relative_error(ours[name], expected), relative_error(plain[name], expected)
            errors.setdefault(name, []).append(pair)
    failures = []
    for name, pairs in errors.items():
        mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        if not mine <= factor * theirs + FLOOR[dtype] < math.inf:
            worst = max(pair[0] for pair in pairs)
            failures.append(f"{name}: median error {mine:.3e}, plain {theirs:.3e}, largest {worst:.3e}")
    return [f"seeds {base} to {base + seeds - 1}", *failures] if failures else []


def _entropy() -> torch.Generator:
    generator = torch.Generator()
    generator.seed()
    return generator


def random_map(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str = "nchw", device: str = "cpu", scale: float = 1.0
) -> Tensor:
    """A random feature map in one of the layouts that users hand over."""
    batch, channels, height, width = shape

    def draw(*size: int) -> Tensor:
        return (torch.randn(size, dtype=torch.float64, device=device) * scale).to(dtype)

    if layout == "nchw":
        return draw(*shape)
    if layout == "channels_last":
        return draw(batch, height, width, channels).permute(0, 3, 1, 2)
    if layout == "slice":
        return draw(batch, channels + 3, height + 2, 2 * width)[:, 1:-2, 1:-1, ::2]
    if layout == "transposed":
        return draw(batch, channels, width, height).transpose(2, 3)
    if layout == "expanded":
        return draw(batch, 1, height, width).expand(shape)
    raise ValueError(f"layout: unknown layout {layout!r}")


LAYOUTS = ("nchw", "channels_last", "slice", "transposed", "expanded")


def surrounded(x: Tensor, filling: float) -> tuple[Tensor, Tensor]:
    """A copy of x of the same strides in the middle of memory filled with `filling`, and that memory."""
    margin = 4096
    span = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    memory = torch.full((span + 2 * margin,), filling, dtype=x.dtype, device=x.device)
    inside = memory.as_strided(x.shape, x.stride(), margin)
    inside.copy_(x)
    return inside, memory
