"""What a campaign says to people: failures first, then profiles, products, and the benchmark's own tables."""

from __future__ import annotations

from collections import Counter
from typing import Any

from benchmarks import report

from .store import DONE, FAILED, PARTIAL

Record = dict[str, Any]


def markdown(record: Record, tree: str) -> str:
    """The whole record as Markdown; its first lines are what is wrong."""
    wrong = problems(record)
    head = [f"**WRONG: {line}**  " for line in wrong] or ["Nothing failed and nothing was wrong."]
    parts = ["\n".join(head), _stages(record, tree), _accuracy(record), _profiles(record), _products(record)]
    return "\n\n".join([*filter(None, parts), report.markdown(record)])


def problems(record: Record) -> list[str]:
    """Everything that failed or is wrong, one line each, what matters most first."""
    lines = [
        f"{name}: {verdict if isinstance(verdict, str) else _verdict(verdict)}"
        for case, verdicts in record.get("accuracy", {}).items()
        for name, verdict in ((f"{provider} in {case}", v) for provider, v in verdicts.items())
        if isinstance(verdict, str) or not verdict["right"]
    ]
    lines += [
        f"test {name}: {outcome.get('error', '')}".strip()
        for name, outcome in record.get("tests", {}).items()
        if outcome["outcome"] == "failed"
    ]
    lines += report.wrong_results(record)
    lines += [
        f"profile of {provider} in {case}, {row['kernel']}: {row['error']}"
        for case, tables in record.get("profile", {}).items()
        for provider, table in tables.items()
        for row in [*table.get("kernels", []), {"kernel": "all of it"} | table]
        if "error" in row
    ]
    lines += [
        f"stage {name} {FAILED}: {entry.get('reason') or 'exit code ' + str(entry['exit_code'])}; see log.txt"
        for name, entry in record["stages"].items()
        if entry["status"] == FAILED
    ]
    return lines


def _verdict(verdict: Record) -> str:
    return f"{verdict['tensor']}: error {verdict['error']:.1e}, allowed {verdict['allowed']:.1e}"


def _stages(record: Record, tree: str) -> str:
    tests = Counter(outcome["outcome"] for outcome in record.get("tests", {}).values())
    lines = [f"Sources {tree}. Tests: {', '.join(f'{n} {what}' for what, n in sorted(tests.items())) or 'none ran'}."]
    lines += ["", "| stage | status | seconds | seconds of CPU | sources |", "| --- | --- | ---: | ---: | --- |"]
    for name, entry in record["stages"].items():
        sources = "" if entry["tree"] == tree else entry["tree"]
        seconds = [f"{entry[key]:.1f}" if key in entry else "" for key in ("seconds", "cpu_seconds")]
        lines.append(f"| {name} | {entry['status']} | {' | '.join(seconds)} | {sources} |")
    if any(entry["tree"] != tree and entry["status"] in (DONE, PARTIAL) for entry in record["stages"].values()):
        lines += ["", "Stages that name other sources ran before the sources changed, and were not repeated."]
    return "\n".join(lines)


def _accuracy(record: Record) -> str:
    lines = []
    for case, verdicts in record.get("accuracy", {}).items():
        for provider, verdict in verdicts.items():
            text = verdict if isinstance(verdict, str) else f"{_verdict(verdict)}, {verdict['maps']}"
            lines.append(f"- {provider} in {case}: {text}")
    return "\n".join(["## Errors against float64", "", *lines]) if lines else ""


def _profiles(record: Record) -> str:
    lines = []
    for case, tables in record.get("profile", {}).items():
        for provider, table in tables.items():
            lines += ["", f"## Profile: {provider}, {case}", ""]
            if "kernels" not in table:
                lines.append(table["error"])
                continue
            lines.append(
                f"{table['device_us']:.0f} µs in kernels ({table['source']}), {table['host_us']:.0f} µs of host time, "
                f"{table['step_us']:.0f} µs from begin to end of a step."
            )
            lines += ["", "| kernel | calls | µs | floor, µs |", "| --- | ---: | ---: | ---: |"]
            for row in table["kernels"]:
                floor = f"{row['floor_us']:.1f}" if "floor_us" in row else ""
                lines.append(f"| `{row['kernel'][:90]}` | {row['calls']:g} | {row['us']:.1f} | {floor} |")
    return "\n".join(lines).strip()


def _products(record: Record) -> str:
    found = record.get("products", {})
    if not found:
        return ""
    names = [name for name in next(iter(found.values())) if name != "flop"]
    lines = ["## 1 × 1 convolutions: cuDNN's convolution or cuBLAS's product, µs", ""]
    lines += [f"| channels | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for widths, row in found.items():
        lines.append(f"| {widths} | {' | '.join(f'{row[name][1] * 1e6:.0f}' for name in names)} |")
    return "\n".join(lines)
