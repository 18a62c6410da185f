"""The operators ``annnet::*``: one file each for schema, fake, autograd Function, vmap rule and FLOP formula."""

from . import batch_norm
from .asymmetric_attention import AsymmetricAttention
from .pyramid_pool import PyramidPool

__all__ = ["AsymmetricAttention", "PyramidPool", "batch_norm"]
