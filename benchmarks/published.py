"""mmsegmentation's own blocks as peers, where it is installed."""

from __future__ import annotations

import importlib.util
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

import annnet_kernels as ak
from annnet_kernels.pyramid import POOL_SIZES

_CONFIGURATION = ((1,), POOL_SIZES, None, {"type": "BN"}, {"type": "ReLU"})
"""Query scales, pool sizes, and the configurations of convolution, norm and activation."""


def do_without_compiled_operators() -> None:
    """mmcv-lite lacks the compiled operators that mmseg asks for as it is imported; the ANN head uses none."""
    if "mmcv._ext" in sys.modules or importlib.util.find_spec("mmcv") is None:
        return
    if importlib.util.find_spec("mmcv._ext") is None:
        stub: Any = types.ModuleType("mmcv._ext")
        stub.__getattr__ = lambda name: None  # every operator exists, none works
        sys.modules["mmcv._ext"] = stub


@cache
def ann_head() -> Any:
    """The module ``mmseg.models.decode_heads.ann_head``; None where it cannot be imported."""
    if importlib.util.find_spec("mmseg") is None:
        return None
    do_without_compiled_operators()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mmseg.models.decode_heads import ann_head
    except ImportError:
        return None
    return ann_head


class PublishedBlock(nn.Module):
    """mmsegmentation's block with its tensors under MendelXu/ANN's names, and the dropout that ends those blocks."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.dropout = nn.Dropout2d(0.05)
        state = block.state_dict()
        names: dict[int, str] = {}
        for name, tensor in ak.to_dialect(state, "mendelxu").items():
            names.setdefault(tensor.data_ptr(), name)
        self._published = {key: names[tensor.data_ptr()] for key, tensor in state.items()}

    def forward(self, *maps: Tensor) -> Tensor:
        out: Tensor = self.dropout(self.block(*maps))
        return out

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        return self.block.load_state_dict(ak.to_dialect(state_dict, "mmseg"), *args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return ((self._published[name], p) for name, p in self.block.named_parameters())

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        return ((self._published[name], b) for name, b in self.block.named_buffers())


def published_afnb(low: int, high: int, out: int, width: int) -> nn.Module:
    """``AFNB`` with keys and values of one width, the only kind there is."""
    return PublishedBlock(ann_head().AFNB(low, high, width, out, *_CONFIGURATION))


def published_apnb(channels: int, out: int, width: int) -> nn.Module:
    """``APNB`` with keys and values of one width."""
    return PublishedBlock(ann_head().APNB(channels, width, out, *_CONFIGURATION))
