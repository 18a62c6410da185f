"""Reading checkpoint files as state dicts of tensors. Nothing in a file is executed.

PyTorch's files go through its weights-only loader, Paddle's ``.pdparams`` (pickles of arrays) through an unpickler that
knows arrays and nothing else.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import shown
from .checkpoint_names import find_blocks

WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What DataParallel, ``torch.compile``, FSDP and activation checkpointing put ahead of a key, or into it where they
hold a part of a model."""

_AVERAGED = "n_averaged"
"""Where PyTorch's AveragedModel counts."""

_DEPTH = 4
"""So deep may the state dict be in what a file holds."""


def read_state_dict(source: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint on the CPU, out of containers and without wrappers' prefixes.

    Args:
        source: a file, or what has been read from one.

    Raises:
        TypeError: ``source`` is neither a path nor a mapping.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds what is not read, no state dict, or several.
    """
    if isinstance(source, Mapping):
        content: object = source
        where = "the mapping"
    elif isinstance(source, (str, os.PathLike)):
        file = Path(source)
        if not file.is_file():
            raise FileNotFoundError(f"path: no such file: {file}")
        content, where = _read(file), str(file)
    else:
        raise TypeError(f"path: expected a path or a mapping, got {shown(source)} of type {type(source).__name__}")
    state = state_dict_of(content, "path")
    if state is None:
        found = f"keys {', '.join(map(shown, list(content)[:5]))}" if isinstance(content, Mapping) else type(content)
        raise ValueError(f"path: expected a state dict, alone or under a name such as 'model', in {where}, got {found}")
    return state


def _read(file: Path) -> object:
    """What a file holds; nothing of it is executed."""
    readers = {".pdparams": _read_paddle, ".safetensors": _read_safetensors}
    try:
        return readers.get(file.suffix, _read_torch)(file)
    except Exception as error:  # loaders raise a dozen kinds on damaged files
        raise ValueError(f"path: {file} cannot be read as weights: {_reason(file, error)}") from error


def state_dict_of(content: object, argument: str) -> dict[str, Tensor] | None:
    """The tensors of what a file holds, by keys without wrappers' prefixes; None if there are none.

    Of several state dicts the one is taken that holds a block of this package.

    Raises:
        ValueError: several hold one, or what a module's key holds is an array.
    """
    found = dict(_state_dicts(content))
    if len(found) > 1:
        found = {name: state for name, state in found.items() if find_blocks(map(unwrapped, state))} or found
    if len(found) > 1:
        names = " and ".join(name or "the top" for name in found)
        raise ValueError(
            f"{argument}: there are {len(found)} state dicts, {names}: "
            f"pass the one that you mean, such as torch.load(path){next(name for name in found if name)}"
        )
    if not found:
        return None
    ((_, state),) = found.items()
    for key, value in state.items():
        if isinstance(value, (np.ndarray, _IgnoredArray)) and "." in str(key):  # without a dot, it is beside weights
            raise ValueError(f"{argument}: {key}: expected a tensor, got a NumPy array")
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(key, str) and isinstance(value, Tensor) and key != _AVERAGED:
            name = unwrapped(key)
            if name in tensors and not torch.equal(tensors[name], value):
                raise ValueError(f"{argument}: {key} is there twice, with and without the prefix of a wrapper")
            tensors[name] = value.detach()
    return tensors


def _state_dicts(content: object, name: str = "", depth: int = 0) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Every mapping of modules' keys to tensors, with how to get at it; tensors at the top count whatever their keys.

    The state of an optimizer maps numbers, or what stands without a dot, to tensors.
    """
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if isinstance(content, Mapping):
        keys = [key for key, value in content.items() if isinstance(key, str) and isinstance(value, _WEIGHTS)]
        if any("." in key for key in keys) or (keys and depth == 0):
            yield name, content
        inner: Iterable[tuple[Any, Any]] = content.items()
    elif isinstance(content, (list, tuple)):
        inner = enumerate(content)
    else:
        return
    if depth < _DEPTH:
        for key, value in inner:
            yield from _state_dicts(value, f"{name}[{shown(key)}]", depth + 1)


def unwrapped(key: str) -> str:
    """A key without what wrappers of the model, or of parts of it, put into it."""
    names = [f"{name}." for name in str(key).split(".")]
    return "".join(name for name in names if name not in WRAPPERS).removesuffix(".")


def _reason(file: Path, error: Exception) -> str:
    """Why a file was not read: what else it holds, and what to do about it; or the loader's first line."""
    names = _other_types(file, str(error))
    if not names:
        text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()
        text = text.rpartition("WeightsUnpickler error: ")[2].strip().partition("\n")[0]
        return f"{type(error).__name__}: {text[:_LONGEST]}"
    return (
        f"it holds {', '.join(names[:_SHOWN])}, and nothing is read that could execute code. Save the weights alone, "
        f"torch.save(model.state_dict(), ...), or, if you trust the file, pass what torch.load(path, "
        f"weights_only=False) gives instead of the path"
    )


def _other_types(file: Path, message: str) -> list[str]:
    """The types in a file that are not read, as far as PyTorch tells them."""
    named = re.search(r"(?:Unsupported global: GLOBAL|Unsupported class|unsupported class|GLOBAL) ([\w.]+)", message)
    names = [] if named is None else [named[1]]
    if names and zipfile.is_zipfile(file):
        with contextlib.suppress(Exception), torch.serialization.safe_globals(list(_BESIDE_WEIGHTS)):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file)) or names
    return names


_LONGEST = 300
"""So many characters of another package's error are shown."""

_SHOWN = 5
"""So many types are named."""


class _Ignored:
    """Stands for what checkpoints hold beside weights; takes whatever it is built from and does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


class _IgnoredArray(_Ignored):
    """Stands for an array, which is refused in the place of a weight."""


def _dictionary(*_: object) -> OrderedDict[Any, Any]:
    """For a defaultdict, without its default: PyTorch's loader fills dictionaries of its own choice only."""
    return OrderedDict()


_PATHS = ("PosixPath", "WindowsPath", "Path", "PurePosixPath", "PureWindowsPath", "PurePath")

_FACTORIES = ("list", "dict", "int", "float", "str", "bool", "tuple", "set")
"""What a defaultdict makes its values with."""

_BESIDE_WEIGHTS = (
    (_Ignored, "argparse.Namespace"),
    (_Ignored, "types.SimpleNamespace"),
    *((_Ignored, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name in _PATHS),
    (_Ignored, "mmengine.logging.history_buffer.HistoryBuffer"),
    *((_IgnoredArray, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_IgnoredArray, f"numpy.{core}.numeric._frombuffer") for core in ("core", "_core")),
    *((_Ignored, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    (_Ignored, "numpy.dtype"),
    (_Ignored, "numpy.ndarray"),
    (_Ignored, "builtins.getattr"),
    (_dictionary, "collections.defaultdict"),
    *((_Ignored, f"{module}.{name}") for module in ("builtins", "__builtin__") for name in _FACTORIES),
)
"""What people store with the weights: options, paths, MMEngine's message hub. None of it is called: it is read as
nothing, defaultdicts as dictionaries without their default."""

_WEIGHTS = (Tensor, np.ndarray, _IgnoredArray)


def _read_torch(file: Path) -> object:
    with torch.serialization.safe_globals(list(_BESIDE_WEIGHTS)):
        return torch.load(file, map_location="cpu", weights_only=True)


def _read_safetensors(file: Path) -> object:
    from safetensors.torch import load_file  # type: ignore[import-not-found, unused-ignore]  # an optional package

    return load_file(file)


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
