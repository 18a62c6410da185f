"""The two blocks, and how they compute: parts of a block, its algebra, its forward, its norms, its folded form."""

from .modules import AFNB, APNB

__all__ = ["AFNB", "APNB"]
