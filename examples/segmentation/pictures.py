"""What a run looks like: its losses, a prediction beside the truth, and what a pixel attends to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch import Tensor

import annnet_kernels as ak
from annnet_kernels.pyramid import POOL_SIZES, TokenRegion

from .data import IGNORE
from .errors import UserError
from .transforms import MEAN, STD

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

_VOID_COLOUR = (0.0, 0.0, 0.0)


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    plt.close(figure)
    return path


def loss_curves(curves: dict[str, Sequence[float]]) -> Figure:
    """Loss against step, one line per run."""
    figure, axes = plt.subplots(figsize=(7, 4))
    for name, losses in curves.items():
        axes.plot(range(1, len(losses) + 1), losses, label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss")
    if len(curves) > 1:
        axes.legend()
    return figure


def prediction(image: Tensor, labels: Tensor, predicted: Tensor, classes: Sequence[str]) -> Figure:
    """Input (3, H, W) as normalised, truth and prediction (H, W), with a legend of the classes that occur."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4))
    panels = {"input": _natural(image), "truth": _coloured(labels), "prediction": _coloured(predicted)}
    for axis, (title, picture) in zip(axes, panels.items(), strict=True):
        axis.imshow(picture)
        axis.set(title=title, xticks=[], yticks=[])
    occurring = sorted(set(labels.unique().tolist() + predicted.unique().tolist()))
    patches = [
        Patch(color=_palette()[index], label="void" if index == IGNORE else classes[index]) for index in occurring
    ]
    figure.legend(handles=patches, loc="lower center", ncols=min(8, len(patches)), bbox_to_anchor=(0.5, -0.08))
    return figure


@torch.no_grad()
def attention(network: ak.ANNNet, image: Tensor, pixel: tuple[int, int]) -> Figure:
    """What one pixel (row, column) of the picture attends to, region by region, in both blocks and all pool sizes."""
    row, column = pixel
    height, width = image.shape[1:]
    if not (0 <= row < height and 0 <= column < width):
        raise UserError(f"--attention-pixel: {row} {column} lies outside the picture of {height} rows, {width} columns")
    low, high = network.backbone(image[None])
    fused = network.fusion(low, high)
    x = network.context[1](network.context[0](fused))
    rows = {"AFNB": (network.fusion, low, high), "APNB": (network.context[2], x, x)}
    figure, axes = plt.subplots(len(rows), len(POOL_SIZES), figsize=(3.4 * len(POOL_SIZES), 2.9 * len(rows)))
    for line, (name, (block, source, target)) in zip(axes, rows.items(), strict=True):
        weights = _attention_of(block, source, target, pixel, (height, width))
        regions = ak.token_regions(POOL_SIZES, tuple(source.shape[2:]))
        first = 0
        for axis, size in zip(line, POOL_SIZES, strict=True):
            tokens = slice(first, first + size * size)
            axis.imshow(_natural(image))
            heat = _heat(regions[tokens], weights[tokens], tuple(source.shape[2:]))
            axis.imshow(heat, cmap="inferno", vmin=0, alpha=0.6, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
            axis.plot(column, row, "c+", markersize=12, markeredgewidth=2)
            axis.set(title=f"{name}, {size}×{size}: {weights[tokens].sum():.0%}", xticks=[], yticks=[])
            first = tokens.stop
    return figure


def _attention_of(
    block: torch.nn.Module, source: Tensor, target: Tensor, pixel: tuple[int, int], size: tuple[int, int]
) -> Tensor:
    """The attention (T) of the query that this pixel of the picture belongs to."""
    stage = block.stages[0]  # type: ignore[index]
    key = ak.pyramid_pool(stage.f_key(source), POOL_SIZES)
    value = ak.pyramid_pool(stage.f_value(source), POOL_SIZES)
    _, weights = ak.asymmetric_attention(stage.f_query(target), key, value, return_attention=True)
    rows, columns = target.shape[2:]
    query = (pixel[0] * rows // size[0]) * columns + pixel[1] * columns // size[1]
    return weights[0, query].cpu()


def _heat(regions: Sequence[TokenRegion], weights: Tensor, size: tuple[int, ...]) -> np.ndarray:
    """The weight of the region that a pixel of the map lies in; their mean where regions overlap."""
    total, count = np.zeros(size), np.zeros(size)
    for region, weight in zip(regions, weights.tolist(), strict=True):
        area = slice(region.top, region.bottom), slice(region.left, region.right)
        total[area] += weight
        count[area] += 1
    return total / count


def _natural(image: Tensor) -> np.ndarray:
    """(3, H, W) as normalised → (H, W, 3) in 0 to 1."""
    shape = (3, 1, 1)
    natural = image.cpu().float() * torch.tensor(STD).view(shape) + torch.tensor(MEAN).view(shape)
    return natural.clamp(0, 1).permute(1, 2, 0).numpy()


def _coloured(labels: Tensor) -> np.ndarray:
    return _palette()[labels.cpu().long().numpy()]


def _palette() -> np.ndarray:
    """One colour for every label value, (256, 3)."""
    colours = np.array(plt.get_cmap("tab20").colors)
    palette = colours[np.arange(256) % len(colours)]
    palette[IGNORE] = _VOID_COLOUR
    return palette
