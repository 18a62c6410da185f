"""The steps of a rehearsal that really run: warm-up and the host path of blocks and operators, on the stand-in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import annnet_kernels as ak
from tools import standin
from tools.standin.devices import CudaAsCpu

from . import steps
from .store import RESULT

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}


def run(step: str, options: Sequence[str], mode: str, place: Path) -> int:
    """Run a step on the stand-in.

    Args:
        step: ``"warm-up"`` (options: which share of how many) or ``"host path"``.
        mode: of the stand-in.
        place: gets the counts.
    """
    recorder = standin.install(mode)
    torch.set_num_threads(1)
    problems: list[str] = []
    if step == "warm-up":
        with CudaAsCpu():
            steps.warm_up(place, 0.0, options)
    else:
        problems = list(host_path(recorder))
    counts = {
        "variants": len(recorder.variants),
        "seconds": round(sum(variant.seconds for variant in recorder.variants), 2),
    }
    print(counts, *problems, sep="\n")
    (place / RESULT).write_text(json.dumps({"standin": {" ".join((step, *options)): counts}}))
    return 1 if problems else 0


def host_path(recorder: standin.Recorder) -> Iterator[str]:
    """Every way of calling blocks and operators; what is wrong with it, one line each."""
    for dtype in DTYPES:
        for layout, memory_format in LAYOUTS.items():
            for block, maps in (
                (ak.AFNB(16, 32, 32, 16, 16), [(2, 16, 9, 8), (2, 32, 9, 8)]),
                (ak.APNB(32, 32, 16, 16), [(2, 32, 9, 8)]),
            ):
                inputs = [torch.randn(s).to(dtype).contiguous(memory_format=memory_format) for s in maps]
                name = f"{type(block).__name__} {str(dtype).removeprefix('torch.')} {layout}"
                yield from _of_block(recorder, name, block, inputs)
            x = torch.randn(2, 16, 9, 8).to(dtype).contiguous(memory_format=memory_format)
            yield from _of_operators(recorder, f"operators {dtype} {layout}", x)
            yield from _of_operators(recorder, f"operators on a slice {dtype} {layout}", x[:, :, 1:-1, 1:])


def _of_block(recorder: standin.Recorder, name: str, block: torch.nn.Module, maps: list[Tensor]) -> Iterator[str]:
    leaves = [x.requires_grad_() for x in maps]
    autocast = torch.autocast("cpu", maps[0].dtype, enabled=maps[0].dtype != torch.float32)
    recorder.clear()
    with autocast:
        out = block(*leaves)
    gradients = torch.autograd.grad(out, [*leaves, *block.parameters()], torch.randn_like(out), allow_unused=True)
    if any(g is not None and g.shape != x.shape for g, x in zip(gradients, leaves, strict=False)):
        yield f"{name}: a gradient has another shape than its map"
    yield from _launched(recorder, f"{name}, training", 10)
    block.eval()
    for state in ("evaluation", "folded"):
        if state == "folded":
            ak.fold_for_inference(block)
        recorder.clear()
        with torch.no_grad(), autocast:
            block(*maps)
        yield from _launched(recorder, f"{name}, {state}", 2)


def _of_operators(recorder: standin.Recorder, name: str, x: Tensor) -> Iterator[str]:
    x = x.detach().requires_grad_()
    recorder.clear()
    tokens = ak.pyramid_pool(x)
    ak.asymmetric_attention(x, tokens, tokens).sum().backward()
    yield from _launched(recorder, name, 5)
    if x.grad is None or x.grad.shape != x.shape:
        yield f"{name}: no gradient of the map"


def _launched(recorder: standin.Recorder, name: str, least: int) -> Iterator[str]:
    if len(recorder.launches) < least:
        kernels = ", ".join(launch.kernel for launch in recorder.launches) or "none"
        yield f"{name}: {least} launches or more were expected, these came: {kernels}"
