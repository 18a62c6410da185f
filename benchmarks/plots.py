"""PNG plots of a record: how much slower the peers are, the roofline, and time and memory against the map's size."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullFormatter

from .providers import COPY, OURS
from .report import Record, describe, rows
from .runner import OUT_OF_MEMORY

_DPI = 130


def draw(record: Record, out: Path) -> list[Path]:
    """Draw what the record has data for; returns the files."""
    plots: list[tuple[str, Callable[[Record], Any]]] = [
        ("speedup.png", _speedup),
        ("roofline.png", _roofline),
        ("sizes.png", _sizes),
    ]
    written = []
    for name, plot in plots:
        figure = plot(record)
        if figure is None:
            continue
        figure.savefig(out / name, dpi=_DPI, bbox_inches="tight")
        plt.close(figure)
        written.append(out / name)
    return written


def _speedup(record: Record) -> Any:
    """Bars per case: the peers' time in units of ours."""
    bars = [
        (case["name"], [(r.provider, r.slower) for r in rows(case) if r.slower is not None and r.provider != "copy"])
        for case in record["cases"]
    ]
    bars = [(name, entries) for name, entries in bars if len(entries) > 1]
    if not bars:
        return None
    names = list(dict.fromkeys(provider for _, entries in bars for provider, _ in entries))
    colours = {name: plt.get_cmap("tab10")(i % 10) for i, name in enumerate(names)}
    count = sum(len(entries) + 1 for _, entries in bars)
    figure, axes = plt.subplots(figsize=(9, 0.8 + 0.19 * count))
    position, ticks = 0.0, []
    for name, entries in bars:
        ticks.append((position + (len(entries) - 1) / 2, name))
        for provider, slower in entries:
            axes.barh(position, slower, color=colours[provider], height=0.85)
            axes.text(slower, position, f" {slower:.2f}", va="center", fontsize=6)
            position += 1
        position += 1
    axes.set_yticks([p for p, _ in ticks], [n.replace(", ", "\n", 1) for _, n in ticks], fontsize=6)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("time ÷ time of ours (logarithmic; right of 1: ours is faster)")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colours[name]) for name in names]
    axes.legend(handles, names, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axes.set_title(describe(record), fontsize=8)
    return figure


def _roofline(record: Record) -> Any:
    """Every timed call as a point under the two limits measured on the same machine."""
    limits = record["limits"]
    rates = {k.removeprefix("flop_per_s_"): v for k, v in limits.items() if k.startswith("flop_per_s_")}
    points = [
        (case, provider)
        for case in record["cases"]
        for provider in case["providers"]
        if provider.get("flop") and provider.get("quartiles_s") and provider["family"] != COPY
    ]
    if not points or not rates:
        return None
    figure, axes = plt.subplots(figsize=(8, 5))
    bandwidth = limits["copy_bytes_per_s"]
    intensities = [p["flop"] / p["traffic"] for _, p in points]
    knees = [rate / bandwidth for rate in rates.values()]
    low, high = min(intensities + knees) / 2, max(intensities + knees) * 2
    for dtype, rate in rates.items():
        knee = rate / bandwidth
        axes.plot([low, knee, high], [low * bandwidth, rate, rate], color="black", linewidth=0.8)
        axes.text(high, rate, f" {dtype}", fontsize=7, va="center")
    markers = dict(zip(dict.fromkeys(case["subject"] for case, _ in points), cycle("osD^vP*"), strict=False))
    for ours in (False, True):
        for case, provider in points:
            if (provider["name"] == OURS) is ours:
                seconds = (provider.get("graph_quartiles_s") or provider["quartiles_s"])[1]
                axes.plot(
                    provider["flop"] / provider["traffic"],
                    provider["flop"] / seconds,
                    markers[case["subject"]],
                    color="tab:red" if ours else "tab:gray",
                    markersize=5,
                    alpha=0.9 if ours else 0.5,
                )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP per byte that the operators move")
    axes.set_ylabel("FLOP/s")
    handles = [plt.Line2D([], [], color="black", marker=m, linestyle="") for m in markers.values()]
    title = "red: ours, gray: peers"
    axes.legend(
        handles, list(markers), fontsize=7, title=title, title_fontsize=7, loc="upper left", bbox_to_anchor=(1, 0.5)
    )
    axes.set_title(f"{describe(record)}: limits measured here", fontsize=8)
    return figure


def _sizes(record: Record) -> Any:
    """Time and memory of the largest family of cases that differ in the map's size alone."""
    families: dict[str, list[Record]] = {}
    for case in record["cases"]:
        constant = {k: case[k] for k in ("subject", "mode", "channels", "batch", "dtype", "layout")}
        families.setdefault(str(constant), []).append(case)
    cases = max(families.values(), key=len, default=[])
    if len(cases) < 3:
        return None
    cases = sorted(cases, key=lambda case: case["size"][0] * case["size"][1])
    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    names = list(dict.fromkeys(p["name"] for case in cases for p in case["providers"] if p["family"] != COPY))
    for panel, unit, value in (
        (panels[0], "ms", lambda p: p["quartiles_s"][1] * 1e3 if "quartiles_s" in p else None),
        (panels[1], "MiB above the inputs", lambda p: p["peak_bytes"] / 2**20 if "peak_bytes" in p else None),
    ):
        for name in names:
            found = [(case, p) for case in cases for p in case["providers"] if p["name"] == name]
            line = [(c["size"][0] * c["size"][1], value(p)) for c, p in found if value(p) is not None]
            if line:
                (drawn,) = panel.plot(*zip(*line, strict=True), "o-", markersize=3, linewidth=1, label=name)
                if any(p["status"] == OUT_OF_MEMORY for _, p in found):
                    panel.plot(*line[-1], "x", color=drawn.get_color(), markersize=9)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks([], minor=True)
        pixels = {case["size"][0] * case["size"][1]: "×".join(map(str, case["size"])) for case in cases}
        panel.set_xticks(list(pixels), list(pixels.values()), fontsize=6, rotation=30)
        panel.set_ylabel(unit)
    panels[0].legend(fontsize=6)
    figure.suptitle(
        f"{cases[0]['subject']}, {cases[0]['mode']}; ×: out of memory beyond. {describe(record)}", fontsize=8
    )
    return figure
