"""What got faster or slower between two records, beyond the noise."""

from __future__ import annotations

from typing import NamedTuple

from rich.console import Console

from .providers import OURS
from .report import Record, Row, describe, rows
from .runner import OK

THRESHOLD = 0.05


class Change(NamedTuple):
    """A difference of one provider in one case that is no noise."""

    case: str
    provider: str
    what: str
    better: bool

    @property
    def is_regression(self) -> bool:
        return self.provider == OURS and not self.better

    def __str__(self) -> str:
        return f"{'better' if self.better else 'WORSE'}: {self.provider} in {self.case}: {self.what}"


def changes(before: Record, after: Record) -> list[Change]:
    """Times whose medians differ by more than 5 % and whose quartiles do not overlap, memory, and outcomes."""
    earlier = {(case["name"], row.provider): row for case in before["cases"] for row in rows(case)}
    found = []
    for case in after["cases"]:
        for row in rows(case):
            old = earlier.get((case["name"], row.provider))
            if old is not None:
                found += [Change(case["name"], row.provider, what, better) for what, better in _differences(old, row)]
    return found


def _differences(old: Row, new: Row) -> list[tuple[str, bool]]:
    if old.status != new.status:
        return [(f"{old.status} → {new.status}", new.status == OK)] if OK in (old.status, new.status) else []
    found = []
    for label, earlier, later in (
        ("time", old.seconds, new.seconds),
        ("kernel time", old.kernel_seconds, new.kernel_seconds),
    ):
        if earlier is None or later is None:
            continue
        apart = later[0] > earlier[2] or later[2] < earlier[0]
        if apart and abs(later[1] / earlier[1] - 1) > THRESHOLD:
            what = f"{label} {earlier[1] * 1e3:.3f} → {later[1] * 1e3:.3f} ms ({later[1] / earlier[1] - 1:+.0%})"
            found.append((what, later[1] < earlier[1]))
    if old.peak and new.peak and abs(new.peak / old.peak - 1) > THRESHOLD:
        what = f"peak memory {old.peak / 2**20:.1f} → {new.peak / 2**20:.1f} MiB ({new.peak / old.peak - 1:+.0%})"
        found.append((what, new.peak < old.peak))
    return found


def run(before: Record, after: Record, console: Console) -> int:
    """Print the changes; 1 if ours got worse somewhere."""
    console.print(f"before: {describe(before)}\nafter:  {describe(after)}")
    device = "device_name"
    if before["environment"][device] != after["environment"][device]:
        console.print("The devices differ: the times cannot be compared as if only the code had changed.")
    shared = {case["name"] for case in before["cases"]} & {case["name"] for case in after["cases"]}
    if not shared:
        raise ValueError("compare: the two records have no case in common")
    found = changes(before, after)
    for change in sorted(found, key=lambda change: change.better):
        console.print(str(change))
    regressions = sum(change.is_regression for change in found)
    console.print(
        f"{len(shared)} cases compared, {len(found)} changes beyond the noise, {regressions} regressions of ours"
    )
    return 1 if regressions else 0
