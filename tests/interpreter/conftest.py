"""Triton kernels: on a GPU where there is one, else in Triton's interpreter, in a pytest process of its own.

The interpreter replaces the kernels when they are decorated, so ``TRITON_INTERPRET=1`` must be set from the start:
``TRITON_INTERPRET=1 pytest tests/interpreter``.
"""

from __future__ import annotations

import pytest
import torch

from annnet_kernels.backends import interpreting


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not interpreting() and not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no GPU here: runs under TRITON_INTERPRET=1, in a process of its own")
        for item in items:
            item.add_marker(skip)
