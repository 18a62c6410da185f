"""What a record says, for people: ratios, limits, what went wrong, the table in Markdown."""

from __future__ import annotations

from typing import Any, NamedTuple

from .providers import COPY, OURS
from .runner import IMPOSSIBLE, NO_TIME, OK, OUT_OF_MEMORY, WRONG

Record = dict[str, Any]


class Row(NamedTuple):
    """One provider in one case; None where nothing was measured.

    slower, kernel_slower and larger are ratios to ours: above 1, ours is faster or smaller.
    """

    provider: str
    status: str
    reason: str
    slower: float | None
    kernel_slower: float | None
    larger: float | None
    seconds: tuple[float, float, float] | None
    kernel_seconds: tuple[float, float, float] | None
    peak: int | None
    kept: int | None
    error: float | None


def rows(case: Record) -> list[Row]:
    """The providers of a case, ours first."""
    ours = next((p for p in case["providers"] if p["name"] == OURS), {})

    def ratio(provider: Record, key: str, index: int | None = None) -> float | None:
        mine, theirs = ours.get(key), provider.get(key)
        if not mine or not theirs:
            return None
        return float(theirs / mine if index is None else theirs[index] / mine[index])

    def triple(value: list[float] | None) -> tuple[float, float, float] | None:
        return None if value is None else (value[0], value[1], value[2])

    return [
        Row(
            provider=p["name"],
            status=p["status"],
            reason=p.get("reason", ""),
            slower=ratio(p, "quartiles_s", 1),
            kernel_slower=ratio(p, "graph_quartiles_s", 1),
            larger=None if p["family"] == COPY else ratio(p, "peak_bytes"),
            seconds=triple(p.get("quartiles_s")),
            kernel_seconds=triple(p.get("graph_quartiles_s")),
            peak=p.get("peak_bytes"),
            kept=p.get("kept_bytes"),
            error=p.get("check", {}).get("error"),
        )
        for p in case["providers"]
    ]


def limit_seconds(case: Record, limits: Record) -> float | None:
    """The time that this machine cannot beat: the FLOP of ours at its fastest product, or the minimal bytes at its
    copy bandwidth, whichever takes longer."""
    ours = next((p for p in case["providers"] if p["name"] == OURS), {})
    rate = limits.get(f"flop_per_s_{case['dtype']}")
    if rate is None or "flop" not in ours:
        return None
    return float(max(ours["flop"] / rate, case["minimal_bytes"] / limits["copy_bytes_per_s"]))


def limit_note(case: Record, limits: Record) -> str:
    """How near ours comes to the limit."""
    limit = limit_seconds(case, limits)
    ours = rows(case)[0]
    taken = ours.kernel_seconds or ours.seconds
    if limit is None or taken is None:
        return ""
    return f"limit {_milliseconds(limit)} ms, ours at {limit / taken[1]:.0%} of it"


HEADINGS = (
    "provider",
    "time\n÷ ours",
    "mem.\n÷ ours",
    "median\nms",
    "quartiles\nms",
    "peak\nMiB",
    "kept\nMiB",
    "error",
)
KERNEL_HEADINGS = ("kernel\n÷ ours", "kernel\nms")
_SHORT = {OUT_OF_MEMORY: "OOM", NO_TIME: "–"}


def cells(row: Row, kernel: bool) -> list[str]:
    """A row as text, in the order of the headings; a provider that was not timed shows why in the place of its time."""
    if row.status != OK:
        texts = [row.provider, _SHORT.get(row.status, row.status), *[""] * 6]
        texts[-1] = "" if row.error is None else f"{row.error:.1e}"
        return [*texts, "", ""] if kernel else texts
    quartiles = "" if row.seconds is None else f"{_milliseconds(row.seconds[0])}–{_milliseconds(row.seconds[2])}"
    texts = [
        row.provider,
        _ratio(row.slower),
        _ratio(row.larger),
        "" if row.seconds is None else _milliseconds(row.seconds[1]),
        quartiles,
        "" if row.peak is None else f"{row.peak / 2**20:.1f}",
        "" if row.kept is None else f"{row.kept / 2**20:.1f}",
        "" if row.error is None else f"{row.error:.1e}",
    ]
    if kernel:
        texts += [_ratio(row.kernel_slower), "" if row.kernel_seconds is None else _milliseconds(row.kernel_seconds[1])]
    return texts


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}×"


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 1000 else f"{value:.0f}"


def has_kernel_times(record: Record) -> bool:
    return any("graph_quartiles_s" in p for case in record["cases"] for p in case["providers"])


def describe(record: Record) -> str:
    environment = record["environment"]
    threads = "" if environment["device"] == "cuda" else f", {environment['threads']} threads"
    return (
        f"{environment['device_name']}{threads}, torch {environment['versions']['torch']}, "
        f"commit {environment['commit'][:12]}, {environment['date'][:10]}"
    )


def wrong_results(record: Record) -> list[str]:
    """Providers that computed something wrong, whose times no machine can have had, or of ours that raised."""
    return [
        f"{row.status}: {row.provider} in {case['name']}: {row.reason}"
        for case in record["cases"]
        for row in rows(case)
        if row.status in (WRONG, IMPOSSIBLE) or (row.provider == OURS and row.status != OK)
    ]


def remarks(record: Record) -> list[str]:
    """What else went wrong or was left out, one line each."""
    first = wrong_results(record)
    lines = [
        line
        for case in record["cases"]
        for row in rows(case)
        if row.status != OK and (line := f"{row.status}: {row.provider} in {case['name']}: {row.reason}") not in first
    ]
    left_out: dict[str, list[str]] = {}
    for case in record["cases"]:
        for name in case["left_out"]:
            subjects = left_out.setdefault(name, [])
            if case["subject"] not in subjects:
                subjects.append(case["subject"])
    lines += [f"left out: {name} for {', '.join(subjects)}" for name, subjects in left_out.items()]
    lines += [f"not run: {case['name']}: {case['reason']}" for case in record["not_run"]]
    return lines


def ours_failed(record: Record) -> bool:
    """Whether ours was wrong or raised in some case."""
    return any(row.provider == OURS and row.status != OK for case in record["cases"] for row in rows(case))


def markdown(record: Record) -> str:
    """The tables of all cases, with the conditions they were measured under."""
    kernel = has_kernel_times(record)
    headings = [heading.replace("\n", " ") for heading in HEADINGS + (KERNEL_HEADINGS if kernel else ())]
    lines = [f"# {describe(record)}", ""]
    wrong = wrong_results(record)
    lines += [*(f"**{line}**  " for line in wrong), ""] if wrong else []
    for name, value in record["limits"].items():
        lines.append(f"- {name.replace('_', ' ')}: {value:.3g}")
    lines.append(f"- input: {', '.join(record['input']['pictures'])}; {record['input']['features']}")
    for case in record["cases"]:
        lines += ["", f"## {case['name']}", ""]
        note = limit_note(case, record["limits"])
        lines += [note, ""] if note else []
        lines.append(f"| {' | '.join(headings)} |")
        lines.append(f"| --- |{' ---: |' * (len(headings) - 1)}")
        lines += [f"| {' | '.join(cells(row, kernel))} |" for row in rows(case)]
    notes = remarks(record)
    if notes:
        lines += ["", "## Remarks", "", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"
