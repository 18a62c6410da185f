"""The operators ``annnet::*``: one file each for schema, fake, autograd Function, vmap rule and FLOP formula."""

from . import batch_norm, bn_relu_pool
from .asymmetric_attention import AsymmetricAttention
from .matrix_products import matrix_products
from .normalized import NormalizedAttention, NormalizedPool, NormalizedTail
from .projections import Projections
from .pyramid_pool import PyramidPool
from .token_values import TokenValues
from .upsampled_cross_entropy import UpsampledCrossEntropy

__all__ = [
    "AsymmetricAttention",
    "NormalizedAttention",
    "NormalizedPool",
    "NormalizedTail",
    "Projections",
    "PyramidPool",
    "TokenValues",
    "UpsampledCrossEntropy",
    "batch_norm",
    "bn_relu_pool",
    "matrix_products",
]
