"""The README's tables, written from the records in ``benchmarks/results/DEVICE-DATE/``."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path

from rich.console import Console

from .machine import ROOT
from .providers import NAIVE, OURS, PLAIN
from .records import RECORD, load
from .report import Record, Row, describe, rows
from .runner import OUT_OF_MEMORY

README = ROOT / "README.md"
RESULTS = Path(__file__).with_name("results")
BEGIN, END = "<!-- benchmark:begin -->", "<!-- benchmark:end -->"
PEERS = (PLAIN, "plain compiled", "SDPA on pooled keys", NAIVE)


def new_folder(device_name: str) -> Path:
    """The folder of today's record of a device."""
    device = re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-").lower()
    return RESULTS / f"{device}-{date.today().isoformat()}"


def summary(record: Record) -> str:
    """One row per case: ours in ms, how much longer each peer takes, how much more memory the plain one needs."""
    lines = [
        f"**{describe(record)}**",
        "",
        f"| case | ours, ms | {' | '.join(f'{peer}, time ÷ ours' for peer in PEERS)} | {PLAIN}, memory ÷ ours |",
        f"| --- |{' ---: |' * (len(PEERS) + 2)}",
    ]
    for case in record["cases"]:
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


def generate(readme: str, records: list[Record]) -> str:
    """The README with the part between its two markers rewritten.

    Raises:
        ValueError: the markers are missing.
    """
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"README.md: expected the markers {BEGIN} and {END}")
    before, rest = readme.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    tables = "\n\n".join(summary(record) for record in records) or "Nothing measured yet."
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def recorded() -> list[Record]:
    """All records, in the order of their folders' names."""
    return [load(path) for path in sorted(RESULTS.glob(f"*/{RECORD}"))]


def run(check: bool, console: Console) -> int:
    """Rewrite the README, or with ``check`` say whether it differs (exit code 1)."""
    current = README.read_text()
    wanted = generate(current, recorded())
    if current == wanted:
        console.print("README.md agrees with the records")
        return 0
    if check:
        console.print("README.md differs from the records; run: python -m benchmarks readme")
        return 1
    README.write_text(wanted)
    console.print("README.md rewritten from the records")
    return 0
