"""Refuses times that no machine of this kind can have had: they are errors of measurement, whoever they flatter."""

from __future__ import annotations

from typing import Any

import torch

from .providers import COPY
from .runner import IMPOSSIBLE, OK

TOLERANCE = 1.1
"""What only reads may be somewhat faster than the copy that the limit was measured with."""
TIMES = ("times_s", "quartiles_s", "graph_times_s", "graph_quartiles_s")


def refuse(case: dict[str, Any], limits: dict[str, Any], device: torch.device) -> None:
    """Take the times from every provider of ``case`` that is faster than the limits measured on this machine.

    A GPU's inputs are rotated so that no cache holds them, and there this is certain; a CPU's are not.
    """
    if device.type != "cuda":
        return
    for provider in case["providers"]:
        least = least_seconds(provider, case, limits)
        medians = [provider[key][1] for key in ("quartiles_s", "graph_quartiles_s") if key in provider]
        if provider["status"] == OK and medians and least is not None and min(medians) * TOLERANCE < least:
            for key in TIMES:
                provider.pop(key, None)
            provider["status"] = IMPOSSIBLE
            provider["reason"] = f"{min(medians) * 1e3:.4f} ms, but this machine needs {least * 1e3:.4f} ms at least"


def least_seconds(provider: dict[str, Any], case: dict[str, Any], limits: dict[str, Any]) -> float | None:
    """What a provider needs at the machine's measured rates: for its own FLOP, and for the bytes nobody can avoid."""
    rate = limits.get(f"flop_per_s_{case['dtype']}")
    if provider["family"] == COPY or "copy_bytes_per_s" not in limits:
        return None
    least = case["minimal_bytes"] / limits["copy_bytes_per_s"]
    return float(max(least, provider.get("flop", 0) / rate if rate else 0.0))
