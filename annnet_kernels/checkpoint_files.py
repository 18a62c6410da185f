"""Reading checkpoint files as state dicts of tensors. Nothing in a file is executed.

PyTorch's files go through its weights-only loader, Paddle's ``.pdparams`` (pickles of arrays) through an unpickler that
knows arrays and nothing else.
"""

from __future__ import annotations

import importlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

CONTAINERS = ("state_dict", "model")
"""Where files keep the state dict that is not the whole file: MendelXu/ANN and mmsegmentation, others."""

WRAPPERS = ("module.", "_orig_mod.")
"""What DataParallel and ``torch.compile`` put ahead of every key."""


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors of a checkpoint on the CPU, out of containers and without wrappers' prefixes.

    Raises:
        TypeError: ``path`` is no path.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds more than weights, or no state dict.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path: expected a path, got {path!r} of type {type(path).__name__}")
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"path: no such file: {file}")
    try:
        content = _read_paddle(file) if file.suffix == ".pdparams" else _read_torch(file)
    except Exception as error:  # loaders raise a dozen kinds on damaged files
        raise ValueError(f"path: {file} cannot be read as weights: {_first_line(error)}") from error
    state = state_dict_of(content, "path")
    if state is None:
        found = f"keys {', '.join(map(repr, list(content)[:5]))}" if isinstance(content, Mapping) else type(content)
        expected = f"a state dict, alone or under {' or '.join(map(repr, CONTAINERS))}"
        raise ValueError(f"path: expected {expected} in {file}, got {found}")
    return state


def state_dict_of(content: object, argument: str) -> dict[str, Tensor] | None:
    """The tensors of what a file holds, by keys without wrappers' prefixes; None if there are none.

    Raises:
        ValueError: what a module's key holds is an array.
    """
    for container in CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(container), Mapping):
            content = content[container]
    if not isinstance(content, Mapping):
        return None
    for key, value in content.items():
        if isinstance(value, (np.ndarray, _IgnoredArray)) and "." in str(key):  # without a dot, it is beside weights
            raise ValueError(f"{argument}: {key}: expected a tensor, got a NumPy array")
    tensors = {_unwrapped(key): x for key, x in content.items() if isinstance(key, str) and isinstance(x, Tensor)}
    return tensors or None


def _unwrapped(key: str) -> str:
    for wrapper in WRAPPERS * 2:  # either may be around the other
        key = key.removeprefix(wrapper)
    return key


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


class _Ignored:
    """Stands for what checkpoints hold beside weights; takes whatever it is built from and does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _IgnoredArray(_Ignored):
    """Stands for an array, which is refused in the place of a weight."""


_BESIDE_WEIGHTS = (
    (_Ignored, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_IgnoredArray, "numpy.core.multiarray._reconstruct"),
    (_Ignored, "numpy.core.multiarray.scalar"),
    (_IgnoredArray, "numpy._core.multiarray._reconstruct"),
    (_Ignored, "numpy._core.multiarray.scalar"),
    (_Ignored, "numpy.dtype"),
    (_Ignored, "numpy.ndarray"),
    (_Ignored, "builtins.getattr"),
)
"""What MMEngine's runner stores with the weights: its message hub. None of it is called: it is read as nothing."""


def _read_torch(file: Path) -> object:
    with torch.serialization.safe_globals(list(_BESIDE_WEIGHTS)):
        return torch.load(file, map_location="cpu", weights_only=True)


def _new_array(kind: object, shape: object, dtype: object) -> np.ndarray[Any, Any]:
    """An array for the unpickler to fill; as NumPy's ``_reconstruct``, for plain arrays only."""
    if kind is not np.ndarray:
        raise pickle.UnpicklingError(f"{kind!r} is no array")
    return np.ndarray((0,), "b")


def _array_of(data: bytes, dtype: Any, shape: tuple[int, ...], order: Any) -> np.ndarray[Any, Any]:
    """An array from its bytes, as pickle's protocol 5 has it."""
    return np.frombuffer(data, dtype).reshape(shape, order=order)


class _ArrayUnpickler(pickle.Unpickler):
    """Admits what NumPy pickles arrays with, and nothing else."""

    ADMITTED = (
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        ("collections", "OrderedDict"),
    )

    MAKERS: ClassVar = {"_reconstruct": _new_array, "_frombuffer": _array_of}
    """Ours, for what arrays are made with in every version of NumPy."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ADMITTED:
            return getattr(importlib.import_module(module), name)
        if module.startswith(("numpy.core.", "numpy._core.")) and name in self.MAKERS:
            return self.MAKERS[name]
        raise pickle.UnpicklingError(f"{module}.{name} is no part of an array")


def _read_paddle(file: Path) -> object:
    with file.open("rb") as stream:
        content = _ArrayUnpickler(stream).load()
    if not isinstance(content, dict):
        raise ValueError(f"expected a dictionary of arrays, got {type(content).__name__}")
    return {key: _tensor(key, value) for key, value in content.items() if key != "StructuredToParameterName@@"}


def _tensor(key: str, value: object) -> Tensor:
    array = value[1] if isinstance(value, tuple) and len(value) == 2 else value  # (name, array) in older files
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fi":
        kind = f"an array of {array.dtype}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{key}: expected an array of numbers, got {kind}")
    return torch.from_numpy(array.copy())
