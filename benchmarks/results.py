"""The tables of the README and of docs/performance.md, written from the records in ``results/DEVICE-DATE/``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from rich.console import Console

from .machine import ROOT
from .providers import NAIVE, OURS, PLAIN
from .records import RECORD, load
from .report import Record, Row, describe, rows
from .runner import OUT_OF_MEMORY

README, PERFORMANCE = ROOT / "README.md", ROOT / "docs" / "performance.md"
RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
PEERS = (PLAIN, "plain compiled", "SDPA on pooled keys", NAIVE)
HEADLINES = (
    "pyramid_pool 512, 1×97×97, float32, channels_last, forward + backward",
    "asymmetric_attention 256, 1×97×97, float32, nchw, forward",
    "APNB 512→512, 1×97×97, float32, nchw, evaluation",
    "APNB 512→512, 1×97×97, float32, nchw, training step",
    "AFNB 1024/2048→2048, 1×49×49, float32, nchw, training step",
    "APNB 2048→2048, 1×128×256, float32, nchw, evaluation",
)
"""The cases that the README shows, of every record that holds them."""


def new_folder(device_name: str) -> Path:
    """The folder of today's record of a device."""
    device = re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-").lower()
    return RESULTS / f"{device}-{date.today().isoformat()}"


def summary(record: Record, cases: Sequence[str] | None = None) -> str:
    """One row per case: ours in ms, how much longer each peer takes, how much more memory the plain one needs.

    ``cases`` are the names of those to show; None shows all.
    """
    lines = [
        f"**{describe(record)}**",
        "",
        f"| case | ours, ms | {' | '.join(f'{peer}, time ÷ ours' for peer in PEERS)} | {PLAIN}, memory ÷ ours |",
        f"| --- |{' ---: |' * (len(PEERS) + 2)}",
    ]
    for case in record["cases"]:
        if cases is not None and case["name"] not in cases:
            continue
        found = {row.provider: row for row in rows(case)}
        ours = found.get(OURS)
        if ours is None or ours.seconds is None:
            continue
        seconds = (ours.kernel_seconds or ours.seconds)[1]
        plain = found.get(PLAIN)
        larger = "" if plain is None or plain.larger is None else f"{plain.larger:.2f}"
        peers = " | ".join(_slower(found.get(peer)) for peer in PEERS)
        lines.append(f"| {case['name']} | {seconds * 1e3:.2f} | {peers} | {larger} |")
    return "\n".join(lines)


def _slower(row: Row | None) -> str:
    """The ratio of kernel times where there are some, else of times."""
    if row is None:
        return ""
    ratio = row.kernel_slower or row.slower
    if ratio is not None:
        return f"{ratio:.2f}"
    return row.status if row.status == OUT_OF_MEMORY else ""


def generate(page: str, records: list[Record], cases: Sequence[str] | None = None) -> str:
    """The page with the part between its two markers rewritten.

    Raises:
        ValueError: the markers are missing.
    """
    if BEGIN not in page or END not in page:
        raise ValueError(f"expected the markers {BEGIN} and {END} in the page")
    before, rest = page.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    tables = "\n\n".join(summary(record, cases) for record in records) or "Nothing measured yet."
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def recorded() -> list[Record]:
    """All records, in the order of their folders' names."""
    return [load(path) for path in sorted(RESULTS.glob(f"*/{RECORD}"))]


def pages() -> dict[Path, str]:
    """What the README and docs/performance.md have to say, by their paths."""
    records = recorded()
    return {
        README: generate(README.read_text(), records, HEADLINES),
        PERFORMANCE: generate(PERFORMANCE.read_text(), records),
    }


def run(check: bool, console: Console) -> int:
    """Rewrite the two pages, or with ``check`` say which differs (exit code 1)."""
    differing = {path: wanted for path, wanted in pages().items() if path.read_text() != wanted}
    for path, wanted in differing.items():
        if check:
            console.print(f"{path.name} differs from the records; run: python -m benchmarks readme")
        else:
            path.write_text(wanted)
            console.print(f"{path.name} rewritten from the records")
    if not differing:
        console.print("README.md and docs/performance.md agree with the records")
    return 1 if check and differing else 0
