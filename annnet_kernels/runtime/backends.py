"""Which implementation serves an operator: the request, the reasons against it, the choice, the record of what ran.

The device chooses: CUDA tensors go to Triton, or where it does not serve them to the extension's CUDA part, CPU tensors
to the extension, all else to plain PyTorch. Triton comes first as long as neither has been measured.
``use_backend`` (or the environment variable ``ANNNET_BACKEND``) overrides that, and a request that cannot run raises.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import threading
from functools import cache
from types import TracebackType

import torch

from . import native

BACKENDS = ("triton", "native", "reference")

MIN_TRITON_CAPABILITY = (8, 0)
"""Triton serves sm_80 and newer: older GPUs lack bfloat16 and asynchronous copies, which the kernels are built on."""

MIN_TRITON_VERSION = (3, 6)
"""The oldest that every kernel compiles with and is tested in the interpreter of; torch 2.11 comes with it."""

_PREFERENCE = {"cuda": ("triton", "native"), "cpu": ("native",)}  # then plain PyTorch
_logger = logging.getLogger("annnet_kernels")


def check_backend_name(backend: object, origin: str = "backend") -> None:
    """Raise ValueError unless ``backend`` is None or one of ``BACKENDS``."""
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"{origin}: expected one of {', '.join(BACKENDS)} or None, got {backend!r}")


_from_environment: str | None = os.environ.get("ANNNET_BACKEND") or None
check_backend_name(_from_environment, "environment variable ANNNET_BACKEND")


class _Requests(threading.local):
    """This thread's nested requests, innermost last."""

    def __init__(self) -> None:
        self.current: str | None = _from_environment


_requests = _Requests()
_last_used: dict[str, str] = {}


class use_backend:
    """Request an implementation for the operators called inside a ``with`` block, in this thread.

    The innermost request wins; ``use_backend(None)`` lets the device choose again. A backward pass uses the request
    that was in force at its forward. Enter it outside compiled code: a compiled function recompiles once per request.

    Args:
        backend: ``"triton"``, ``"native"`` (the C++/CUDA extension), ``"reference"`` (plain PyTorch) or None.

    Raises:
        ValueError: for an unknown name, at once. A request that cannot run (no extension, wrong device or dtype, …)
            raises RuntimeError with the reason where an operator is called.

    Example:
        >>> import torch, annnet_kernels as ak
        >>> with ak.use_backend("reference"):
        ...     tokens = ak.pyramid_pool(torch.randn(1, 8, 32, 32))
        >>> ak.last_backend("pyramid_pool")
        'reference'
    """

    def __init__(self, backend: str | None) -> None:
        check_backend_name(backend)
        self.backend = backend
        self._outer: list[str | None] = []

    def __enter__(self) -> use_backend:
        self._outer.append(_requests.current)
        _requests.current = self.backend
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _requests.current = self._outer.pop()


def requested_backend() -> str | None:
    """The request in force in this thread: the innermost ``use_backend``, else ``ANNNET_BACKEND``, else None."""
    return _requests.current


def last_backend(operator: str) -> str | None:
    """Name of the implementation that served the latest call of ``operator`` in this process, None before the first.

    Args:
        operator: name without its namespace, for example ``"pyramid_pool"`` or ``"asymmetric_attention_bwd"``.
    """
    return _last_used.get(operator)


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), the only way they run on a CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def triton_version() -> tuple[int, ...]:
    """Major and minor number of the Triton that is installed."""
    return tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])


@cache
def _capability(device_index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device_index)


def _capability_of(device: torch.device) -> tuple[int, int]:
    return _capability(device.index if device.index is not None else torch.cuda.current_device())


def why_not(
    backend: str, operator: str, device: torch.device, dtype: torch.dtype, *, has_triton: bool = True
) -> str | None:
    """Why ``backend`` cannot serve ``operator`` for tensors of ``dtype`` on ``device``; None if it can.

    ``has_triton`` tells whether there are Triton kernels for the operator.
    """
    if backend == "reference":
        return None
    if backend == "native":
        capability = _capability_of(device) if device.type == "cuda" else None
        return native.why_not(device.type, operator, capability)
    if not has_triton:
        return f"there are no Triton kernels for {operator} yet"
    if not _has_triton():
        return "the package triton is not installed"
    if triton_version() < MIN_TRITON_VERSION:
        found, needed = (".".join(map(str, version)) for version in (triton_version(), MIN_TRITON_VERSION))
        return f"the kernels need Triton {needed} or newer, this is {found}"
    if dtype == torch.float64:
        return "the Triton kernels accumulate in float32, not in float64"
    if device.type == "cuda":
        if torch.version.hip is not None:
            return "the kernels' tiles are made for NVIDIA GPUs; on AMD they would spill registers to memory"
        capability = _capability_of(device)
        if capability < MIN_TRITON_CAPABILITY:
            return f"Triton serves compute capability 8.0 and newer, this GPU has {capability[0]}.{capability[1]}"
        return None
    if not interpreting():
        return f"Triton runs on CUDA tensors, or on CPU tensors under TRITON_INTERPRET=1; got a {device.type} tensor"
    if dtype == torch.bfloat16:
        return "Triton's interpreter computes bfloat16 wrongly"
    return None


def choose_backend(
    operator: str, device: torch.device, dtype: torch.dtype, requested: str | None, *, has_triton: bool = True
) -> str:
    """The implementation that serves ``operator`` on these tensors; recorded for :func:`last_backend`.

    Raises:
        RuntimeError: if ``requested`` cannot run here, with the reason.
    """
    if requested is None:
        backend = _preferred(operator, device, dtype, has_triton)
    else:
        reason = why_not(requested, operator, device, dtype, has_triton=has_triton)
        if reason is not None:
            raise RuntimeError(f"{operator}: the requested backend {requested!r} cannot run: {reason}")
        backend = requested
    record_choice(operator, backend)
    return backend


def record_choice(operator: str, backend: str) -> None:
    """Remember for :func:`last_backend` what served a call."""
    _last_used[operator] = backend


@cache  # asked anew between two kernels, when nothing of it is in a cache, the reasons took 60 µs
def _preferred(operator: str, device: torch.device, dtype: torch.dtype, has_triton: bool) -> str:
    """The first that can serve, in the order of the device; those before it are logged with their reasons, once."""
    for backend in _PREFERENCE.get(device.type, ()):
        reason = why_not(backend, operator, device, dtype, has_triton=has_triton)
        if reason is None:
            return backend
        _logger.debug("%s: not served by %s: %s", operator, backend, reason)
    return "reference"
