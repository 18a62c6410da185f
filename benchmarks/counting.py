"""FLOP, bytes and memory of a call, counted from its operators without running them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


@dataclass(frozen=True)
class Counts:
    """What a call costs when each of its operators reads its inputs once and writes its outputs once.

    flop: 2 per multiply-add, matrix products, convolutions and the project's operators.
    traffic: bytes read and written by all operators, views excepted.
    peak: bytes of the tensors that the call allocates, at their largest sum; what an operator allocates inside and
        frees again is not seen.
    """

    flop: int
    traffic: int
    peak: int


def _sdpa(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    flop: int = sdpa_flop_count(query.shape, key.shape, value.shape)
    return flop


def _sdpa_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    flop: int = sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
    return flop


_FORMULAS = {  # PyTorch counts the fused attention on GPUs only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _sdpa,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _sdpa_backward,
    **flop_registry,
}


class _Ledger(TorchDispatchMode):
    """Adds up the FLOP of each operator, the bytes that pass it, and those of the storages alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = self.traffic = self.live = self.peak = 0
        self._known: set[int] = set()

    def _free(self, identity: int, size: int) -> None:
        self.live -= size
        self._known.discard(identity)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is None and (result := decomposed(self, func, args, kwargs)) is not NotImplemented:
            return result
        result = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if outputs and func.namespace != "prim":
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self._known.update(id(t.untyped_storage()) for t in inputs)
            if formula is not None:
                self.flop += formula(*args, **kwargs, out_val=result)
            if not func.is_view and not moves_nothing(func, inputs, outputs):
                self.traffic += bytes_of(inputs) + bytes_of(outputs)
            self._allocate(outputs)
        return result

    def _allocate(self, outputs: list[Tensor]) -> None:
        """Storages not met before are new; an input met for the first time was there before the call."""
        for tensor in outputs:
            storage = tensor.untyped_storage()
            if id(storage) not in self._known:
                self._known.add(id(storage))
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.live)


def decomposed(mode: TorchDispatchMode, func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operator of PyTorch by the operators that it is made of, each seen by ``mode``, if it is."""
    if func.namespace != "aten":
        return NotImplemented
    with mode:
        return func.decompose(*args, **kwargs)


def moves_nothing(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Uninitialised memory, and views in all but name."""
    if "empty" in func.name():
        return True
    if func._schema.is_mutable:
        return False
    return len(inputs) == len(outputs) == 1 and inputs[0].untyped_storage() is outputs[0].untyped_storage()


def _bytes(tensor: Tensor) -> int:
    """Distinct bytes: an expanded dimension is read once."""
    size = tensor.element_size()
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else min(length, 1)
    return size


def count(build: Callable[[], Callable[[], Any]]) -> Counts:
    """Counts of the call that ``build`` returns. Both run on fake tensors: nothing is computed, no memory taken."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        call = build()
        with _Ledger() as ledger:
            result = call()
        del result
    return Counts(ledger.flop, ledger.traffic, ledger.peak)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct elements of these tensors."""
    return sum(_bytes(t) for t in tensors)
