"""A record in the terminal: its tables in colours, and the bar of a run that is under way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from .providers import OURS
from .report import (
    HEADINGS,
    KERNEL_HEADINGS,
    Record,
    Row,
    cells,
    describe,
    has_kernel_times,
    limit_note,
    remarks,
    rows,
    wrong_results,
)
from .runner import NO_TIME, OK
from .session import Watch


@contextmanager
def progress_bar(console: Console) -> Iterator[Watch]:
    """What a session is given to show how far it is."""
    columns = (TextColumn("{task.fields[case]}"), BarColumn(), TextColumn("{task.fields[doing]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as progress:
        bar = progress.add_task("", total=1.0, case="", doing="")
        yield lambda case, done, doing: progress.update(bar, completed=done, case=case, doing=doing)


def print_record(record: Record, console: Console) -> None:
    """The table, and what it does not show."""
    kernel = has_kernel_times(record)
    console.print(describe(record))
    for case in record["cases"]:
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for index, heading in enumerate(HEADINGS + (KERNEL_HEADINGS if kernel else ())):
            table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
        for row in rows(case):
            table.add_row(*(_styled(text, row, i) for i, text in enumerate(cells(row, kernel))))
        console.print(Text(case["name"], style="bold"))
        if note := limit_note(case, record["limits"]):
            console.print(Text(note, style="dim"))
        console.print(table)
    console.print(f"Ratios above 1: ours is faster, or smaller. Input: {record['input']['features']}.")
    for line in [*wrong_results(record), *remarks(record)]:
        console.print(line)


def _styled(text: str, row: Row, column: int) -> Text:
    """Green where ours wins clearly, red where it loses or something failed."""
    if row.status != OK:
        return Text(text, style="red" if row.status != NO_TIME else "yellow")
    ratio = {1: row.slower, 2: row.larger, len(HEADINGS): row.kernel_slower}.get(column)
    if ratio is None or row.provider == OURS or abs(ratio - 1) <= 0.05:
        return Text(text)
    return Text(text, style="green" if ratio > 1 else "red")
