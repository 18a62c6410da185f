"""Fused asymmetric non-local blocks (AFNB, APNB) for semantic segmentation. Importing it compiles nothing."""

from .backends import last_backend, use_backend
from .blocks import AFNB, APNB
from .folding import fold_for_inference
from .functional import asymmetric_attention, pyramid_pool, token_regions
from .model import ANNNet
from .reference import NonLocalBlock
from .replace import replace_blocks, restore_blocks
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
    "pyramid_pool",
    "replace_blocks",
    "restore_blocks",
    "token_regions",
    "use_backend",
    "warmup",
]
