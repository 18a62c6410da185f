"""Autocast on every device type: PyTorch's own queries raise for those without any, such as ``meta``."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

_WITHOUT = ("meta",)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that operators on the device of ``x`` are cast to, None where autocast is off."""
    device_type = "cpu" if x.is_cpu else x.device.type  # the name takes 20 µs where nothing is in a cache
    if device_type in _WITHOUT or not torch.is_autocast_enabled(device_type):
        return None
    return torch.get_autocast_dtype(device_type)


def no_autocast(device_type: str) -> AbstractContextManager[object]:
    """A context in which nothing is cast."""
    return nullcontext() if device_type in _WITHOUT else torch.autocast(device_type, enabled=False)


class untouched_by_autocast:
    """The same for code that nothing traces, with less of the host's time than PyTorch's context takes."""

    def __init__(self, x: torch.Tensor) -> None:
        self._device_type = "cpu" if x.is_cpu else x.device.type

    def __enter__(self) -> None:
        self._was_enabled = torch.is_autocast_enabled(self._device_type)
        if self._was_enabled:
            torch.set_autocast_enabled(self._device_type, False)

    def __exit__(self, *_: object) -> None:
        if self._was_enabled:
            torch.set_autocast_enabled(self._device_type, True)
