"""Plain PyTorch: the operators' fallback (``operators``), the published blocks (``blocks``), the truth (``truth``)."""

from .blocks import NonLocalBlock, PlainAFNB, PlainAPNB
from .operators import (
    asymmetric_attention,
    asymmetric_attention_bwd_out,
    asymmetric_attention_out,
    matrix_products_out,
    pyramid_pool,
    pyramid_pool_bwd_out,
    pyramid_pool_out,
)

__all__ = [
    "NonLocalBlock",
    "PlainAFNB",
    "PlainAPNB",
    "asymmetric_attention",
    "asymmetric_attention_bwd_out",
    "asymmetric_attention_out",
    "matrix_products_out",
    "pyramid_pool",
    "pyramid_pool_bwd_out",
    "pyramid_pool_out",
]
