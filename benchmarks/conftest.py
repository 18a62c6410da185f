"""``pytest benchmarks/`` measures ``ours`` and its peers with pytest-benchmark over the same cases."""

from __future__ import annotations

import pytest
import torch

from . import machine
from .features import Features, find_pictures


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="session")
def maps(device: torch.device) -> Features:
    """Feature maps of the default photograph, with the allocator set as in ``python -m benchmarks``."""
    if device.type == "cpu":
        machine.keep_large_blocks()
    return Features(find_pictures(None), device)


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, object]) -> None:
    machine_info["annnet"] = machine.environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
