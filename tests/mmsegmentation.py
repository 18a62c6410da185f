"""The real mmsegmentation, for tests."""

import warnings
from pathlib import Path

import pytest

from benchmarks.published import do_without_compiled_operators

try:
    do_without_compiled_operators()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mmseg.utils import register_all_modules

        register_all_modules(init_default_scope=True)
        import mmseg
        from mmengine.config import Config
        from mmseg.models.decode_heads.ann_head import AFNB, APNB, ANNHead
        from mmseg.registry import MODELS
except ImportError as error:
    pytest.skip(f"mmsegmentation is not usable here (pip install -e .[dev]): {error}", allow_module_level=True)

__all__ = ["AFNB", "APNB", "ANNHead", "build_head", "build_model"]

_WIDTHS = {"in_channels": [6, 10], "channels": 8, "project_channels": 5, "num_classes": 4}
"""Of the tests' heads; the published ones are [1024, 2048], 512, 256, 19."""


def config():
    """mmsegmentation's own ANN configuration, with an ordinary BatchNorm."""
    path = Path(mmseg.__file__).parent / ".mim" / "configs" / "_base_" / "models" / "ann_r50-d8.py"
    found = Config.fromfile(path).model
    for part in (found.backbone, found.decode_head, found.auxiliary_head):
        part.norm_cfg = {"type": "BN", "requires_grad": True}
    found.pretrained = None
    return found


def build_head(**options):
    """The decode head of the published configuration, narrow."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MODELS.build(config().decode_head | _WIDTHS | options)


def build_model(**options):
    """The published network with its full backbone and a head of published widths."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MODELS.build(config() | options)
