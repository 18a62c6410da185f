"""FLOP formulas for ``torch.utils.flop_counter.FlopCounterMode``, registered when that module is first imported.

That module imports Triton, which takes longer than the rest of this package; whoever counts FLOP pays for it, not
whoever imports the package.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_COUNTER = "torch.utils.flop_counter"
_pending: dict[Any, Callable[..., int]] = {}


def register_flops(operator: Any, formula: Callable[..., int]) -> None:
    """Let FlopCounterMode count ``operator`` by ``formula``, which gets shapes in the place of tensors."""
    _pending[operator] = formula
    if _COUNTER in sys.modules:
        _register_pending(sys.modules[_COUNTER])
    elif not any(isinstance(finder, _CounterFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _CounterFinder())


def _register_pending(counter: ModuleType) -> None:
    for operator, formula in _pending.items():
        counter.register_flop_formula(operator)(formula)
    _pending.clear()


class _CounterFinder(MetaPathFinder):
    """Finds the counter where the other finders do, and registers the formulas once it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            _register_pending(module)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
