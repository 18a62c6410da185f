"""Triton kernels: on a GPU where there is one, else in Triton's interpreter, in a pytest process of its own.

The interpreter replaces the kernels when they are decorated, so ``TRITON_INTERPRET=1`` must be set from the start:
``TRITON_INTERPRET=1 pytest tests/interpreter``.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import numpy
import pytest
import torch

from annnet_kernels.backends import interpreting

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Called with the items of the whole session, whatever folder they are in."""
    if interpreting():
        if version("triton").startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
            raise pytest.UsageError("Triton 3.6's interpreter fails with NumPy 2.4 and newer: pip install 'numpy<2.4'")
        return
    if torch.cuda.is_available():
        mark = pytest.mark.gpu
    else:
        mark = pytest.mark.skip(reason="no GPU here: runs under TRITON_INTERPRET=1, in a process of its own")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(mark)
