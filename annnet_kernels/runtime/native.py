"""The C++ extension ``annnet_kernels._C``: loaded once, or the reason why not.

``setup.py`` writes a record beside the library that names the torch and the GPU architectures it was built for. It is
read before the library is opened, since a library built for another torch would fail with undefined symbols.
"""

from __future__ import annotations

import importlib
import json
import sysconfig
import warnings
from functools import cache
from pathlib import Path

import torch

_BUILD_COMMAND = "python setup.py build_ext --inplace, or pip install --no-build-isolation ."


def _library_path() -> Path:
    return Path(__file__).parent.with_name("_C" + str(sysconfig.get_config_var("EXT_SUFFIX")))


def _load() -> str | None:
    """Load the extension; the reason if it is not there or not usable."""
    library = _library_path()
    if not library.exists():
        return f"the C++ extension is not built ({_BUILD_COMMAND})"
    record = library.with_suffix(".json")
    try:
        entries = json.loads(record.read_text())
        built_for = entries["torch"]
        _cuda_targets.extend(entries.get("cuda", []))
    except (OSError, ValueError, KeyError) as error:
        reason = f"the C++ extension has no readable build record {record.name} ({error}); rebuild it: {_BUILD_COMMAND}"
    else:
        if built_for != torch.__version__:
            reason = (
                f"the C++ extension was built for torch {built_for}, this is torch {torch.__version__}; "
                f"rebuild it: {_BUILD_COMMAND}"
            )
        else:
            try:
                importlib.import_module("annnet_kernels._C")
                return None
            except ImportError as error:
                reason = f"the C++ extension failed to load ({error}); rebuild it: {_BUILD_COMMAND}"
    warnings.warn(f"annnet_kernels: {reason}. Falling back to PyTorch.", RuntimeWarning, stacklevel=2)
    return reason


_cuda_targets: list[str] = []
_load_failure = _load()


def why_not(
    device_type: str,
    operator: str | None = None,
    capability: tuple[int, int] | None = None,
) -> str | None:
    """Why the extension cannot serve tensors on this type of device, or this operator on them; None if it can.

    Args:
        capability: of the CUDA device.
    """
    if _load_failure is not None:
        return _load_failure
    if device_type not in _parts():
        return f"the extension was built without kernels for {device_type} tensors"
    if operator is not None and not _has_kernel(operator, device_type.upper()):
        return f"the extension has no {operator} for {device_type} tensors"
    if capability is not None and not any(_serves(target, capability) for target in _cuda_targets):
        return (
            f"the extension was built for {', '.join(_cuda_targets)}, this GPU has compute capability "
            f"{capability[0]}.{capability[1]}; rebuild it: {_BUILD_COMMAND}"
        )
    return None


def _serves(target: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``target`` runs: machine code on its own generation from its model on, PTX on all later ones."""
    kind, _, number = target.partition("_")
    digits = number.rstrip("af")
    built_for = int(digits[:-1]), int(digits[-1])
    if digits != number:  # with features that no other model has
        return built_for == capability
    return built_for <= capability and (kind == "compute" or built_for[0] == capability[0])


@cache
def _parts() -> tuple[str, ...]:
    parts: tuple[str, ...] = importlib.import_module("annnet_kernels._C").parts()
    return parts


@cache
def _has_kernel(operator: str, dispatch_key: str) -> bool:
    name = f"annnet_native::{operator}"
    return hasattr(torch.ops.annnet_native, operator) and torch._C._dispatch_has_kernel_for_dispatch_key(
        name, dispatch_key
    )


def cuda_targets() -> tuple[str, ...]:
    """What the CUDA part was built for, as ``"sm_90"`` or ``"compute_90"`` (PTX); empty where there is none."""
    return tuple(_cuda_targets) if _load_failure is None else ()


def cpu_level() -> str | None:
    """Instruction level of the CPU kernels: ``"baseline"``, ``"avx2"``, ``"avx512"`` or ``"avx512_bf16"``.

    Chosen at load time from the running processor; the environment variable ``ANNNET_CPU_LEVEL`` lowers it. None when
    the extension is not loaded or has no CPU part.
    """
    if why_not("cpu") is not None:
        return None
    level: str = importlib.import_module("annnet_kernels._C").cpu_level()
    return level


def built_cpu_levels() -> tuple[str, ...]:
    """Instruction levels that the extension was built for, lowest first; empty when it is not loaded."""
    return () if why_not("cpu") is not None else tuple(importlib.import_module("annnet_kernels._C").built_levels())


def processor_level() -> str | None:
    """The highest instruction level that the running processor has; None when the extension is not loaded."""
    if why_not("cpu") is not None:
        return None
    level: str = importlib.import_module("annnet_kernels._C").processor_level()
    return level
