"""Triton kernels: on a GPU where there is one, else in Triton's interpreter, in a pytest process of its own.

The interpreter replaces the kernels when they are decorated, so ``TRITON_INTERPRET=1`` must be set from the start:
``TRITON_INTERPRET=1 pytest tests/interpreter``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import bfloat16
import gpu_selection
import numpy
import pytest
import torch

from annnet_kernels.runtime.backends import interpreting

HERE = Path(__file__).parent


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Called with the items of the whole session, whatever folder they are in."""
    if interpreting():
        if version("triton").startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
            raise pytest.UsageError("Triton 3.6's interpreter fails with NumPy 2.4 and newer: pip install 'numpy<2.4'")
        return
    if torch.cuda.is_available():
        mark = pytest.mark.gpu
        left_out = {item for item in items if HERE in item.path.parents and gpu_selection.is_left_out(item)}
        config.hook.pytest_deselected(items=list(left_out))
        items[:] = [item for item in items if item not in left_out]
    else:
        mark = pytest.mark.skip(reason="no GPU here: runs under TRITON_INTERPRET=1, in a process of its own")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(mark)


@pytest.fixture(autouse=True, scope="session")
def _interpreter_without_waste() -> Iterator[None]:
    """Makes Triton's interpreter (3.6 to 3.8) compute bfloat16 right, and spares what it does again and again in vain.

    It computes whether integers overflow and, unless it debugs, drops the answer; and it patches its language at every
    call of a device function, though once per launch and namespace is enough. That is more than half of its time.
    """
    if not interpreting():
        yield
        return
    from triton.runtime import interpreter

    launch, patch_language = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[int] = set()

    def launch_anew(executor, *args, **kwargs):
        patched.clear()
        return launch(executor, *args, **kwargs)

    def patch_once(function):
        namespace = id(function.__globals__)
        if namespace in patched:
            return None
        patched.add(namespace)
        return patch_language(function)

    builder = interpreter.interpreter_builder
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.GridExecutor, "__call__", launch_anew)
        patch.setattr(interpreter, "_patch_lang", patch_once)
        patch.setattr(builder, "options", dataclasses.replace(builder.options, sanitize_overflow=False))
        bfloat16.let_it_compute(patch)
        yield
