"""Fused asymmetric non-local blocks (AFNB, APNB) for semantic segmentation. Importing it compiles nothing."""

from importlib import import_module
from typing import Any

from .blocks.folding import fold_for_inference
from .blocks.modules import AFNB, APNB
from .functional import asymmetric_attention, pyramid_pool, token_regions
from .interop.checkpoints import load_checkpoint, to_dialect
from .interop.replace import replace_blocks, restore_blocks
from .model import ANNNet
from .reference import NonLocalBlock
from .runtime.backends import last_backend, use_backend
from .upsampled import upsampled_argmax, upsampled_cross_entropy
from .warmup import warmup

__version__ = "0.1.0"

__all__ = [
    "AFNB",
    "APNB",
    "ANNNet",
    "NonLocalBlock",
    "asymmetric_attention",
    "fold_for_inference",
    "last_backend",
    "load_checkpoint",
    "pyramid_pool",
    "replace_blocks",
    "restore_blocks",
    "to_dialect",
    "token_regions",
    "upsampled_argmax",
    "upsampled_cross_entropy",
    "use_backend",
    "warmup",
]


def __getattr__(name: str) -> Any:
    """``parallel`` and ``FusedANNHead`` only when they are asked for: the latter imports mmsegmentation."""
    if name == "parallel":
        return import_module(".parallel", __name__)
    if name == "FusedANNHead":
        try:
            from .integrations.mmseg import FusedANNHead
        except ImportError as error:
            raise ImportError(f"FusedANNHead: needs mmsegmentation, and mmcv's compiled operators ({error})") from error
        return FusedANNHead
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
