"""How fast the library makes 1 × 1 convolutions: cuDNN's convolution against cuBLAS's product, at the blocks' widths.

The convolutions are most of a block's time, and which of the two a block should call is not known without measuring.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Call, interleaved, quartiles

from .measuring import DEVICE
from .store import RESULT, UNFINISHED

WIDTHS = ((512, 512), (512, 256), (2048, 2048), (2048, 256), (1024, 256))
"""(input, output) channels: the APNB's projections, then the AFNB's."""
BATCH, SIZE = 8, (97, 97)
_GEOMETRY: tuple[Any, ...] = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)
SECONDS_PER_CALL = 0.3


def calls(
    inner: int, outer: int, device: torch.device, dtype: torch.dtype, batch: int, size: tuple[int, int]
) -> dict[str, Call]:
    """Forward, gradient of the map and gradient of the weight, by either library, on maps in channels_last."""

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, device=device, dtype=dtype)
        return x.contiguous(memory_format=torch.channels_last)

    x, weight, grad = draw(batch, inner, *size), draw(outer, inner, 1, 1), draw(batch, outer, *size)
    bias = torch.randn(outer, device=device, dtype=dtype)
    rows, grad_rows = (m.permute(0, 2, 3, 1).reshape(-1, m.shape[1]) for m in (x, grad))  # views
    matrix = weight.flatten(1)

    def gradient(*needs: bool) -> Call:
        return lambda: torch.ops.aten.convolution_backward(grad, x, weight, None, *_GEOMETRY, [*needs, False])

    return {
        "forward, convolution": lambda: F.conv2d(x, weight, bias),
        "forward, product": lambda: torch.addmm(bias, rows, matrix.t()),
        "dX, convolution": gradient(True, False),
        "dX, product": lambda: grad_rows @ matrix,
        "dW, convolution": gradient(False, True),
        "dW, product": lambda: grad_rows.t() @ rows,
    }


def run(
    place: Path,
    seconds: float,
    device: torch.device = DEVICE,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = BATCH,
    size: tuple[int, int] = SIZE,
) -> int:
    """Time all widths; each is written down before the next."""
    until = time.monotonic() + seconds
    found: dict[str, Any] = {}
    for inner, outer in WIDTHS:
        if time.monotonic() >= until:
            print(f"no time left for {inner}→{outer}")
            return UNFINISHED
        made = calls(inner, outer, device, dtype, batch, size)
        samples = interleaved(list(made.values()), device, SECONDS_PER_CALL * len(made))
        flop = 2 * batch * size[0] * size[1] * inner * outer
        found[f"{inner}→{outer}"] = {"flop": flop} | {
            name: quartiles(times) for name, times in zip(made, samples, strict=True)
        }
        (place / RESULT).write_text(json.dumps({"products": found}))
        medians = ", ".join(f"{name} {quartiles(t)[1] * 1e6:.0f} µs" for name, t in zip(made, samples, strict=True))
        print(f"{inner}→{outer}: {medians}")
    return 0
