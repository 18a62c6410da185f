"""The operators ``annnet::*``: one file each for schema, fake, autograd Function, vmap rule and FLOP formula."""

from . import batch_norm, bn_relu_pool
from .asymmetric_attention import AsymmetricAttention
from .normalized import NormalizedAttention, NormalizedPool, NormalizedTail
from .pyramid_pool import PyramidPool
from .upsampled_cross_entropy import UpsampledCrossEntropy

__all__ = [
    "AsymmetricAttention",
    "NormalizedAttention",
    "NormalizedPool",
    "NormalizedTail",
    "PyramidPool",
    "UpsampledCrossEntropy",
    "batch_norm",
    "bn_relu_pool",
]
