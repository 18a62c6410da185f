"""Fused asymmetric non-local blocks (AFNB, APNB) for semantic segmentation. Importing it compiles nothing."""

from .backends import last_backend, use_backend
from .functional import asymmetric_attention, pyramid_pool, token_regions

__version__ = "0.1.0"

__all__ = [
    "asymmetric_attention",
    "last_backend",
    "pyramid_pool",
    "token_regions",
    "use_backend",
]
