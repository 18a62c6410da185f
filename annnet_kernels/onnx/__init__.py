"""Export to ONNX: operators and blocks as standard operators, and the table that converts exported programs."""

from .graph import asymmetric_attention, block_forward, exporting, pyramid_pool, translation_table, upsampled

__all__ = ["asymmetric_attention", "block_forward", "exporting", "pyramid_pool", "translation_table", "upsampled"]
