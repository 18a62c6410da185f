"""``python -m benchmarks``: how fast and how small the blocks are on this machine, against their peers."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported; the memory probe would chatter

import torch
from rich.console import Console

from . import accuracy, compare, features, machine, plots, report, results, terminal
from .cases import CASES, select
from .providers import EFFORTS
from .records import load
from .runner import Options
from .session import Session

QUICK_SECONDS = 90.0  # of the two minutes that --quick promises; start-up, plots and one late case need the rest


def main(arguments: list[str] | None = None) -> int:
    """Run, compare or write tables; the exit code."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.action(chosen, Console()))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.set_defaults(action=_run)
    _add_run_options(parser)
    commands = parser.add_subparsers(title="other commands")
    comparison = commands.add_parser("compare", help="what got faster or slower beyond the noise; 1 on a regression")
    comparison.add_argument("before", type=Path)
    comparison.add_argument("after", type=Path)
    comparison.set_defaults(
        action=lambda chosen, console: compare.run(load(chosen.before), load(chosen.after), console)
    )
    errors = commands.add_parser("accuracy", help="errors of both operators relative to float64, ours and plain's")
    errors.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    errors.add_argument("--seeds", type=int, default=5)
    errors.set_defaults(action=lambda given, console: accuracy.run(torch.device(given.device), given.seeds, console))
    tables = commands.add_parser("readme", help="write the README's tables from the records in benchmarks/results")
    tables.add_argument("--check", action="store_true", help="change nothing; exit code 1 where they differ")
    tables.set_defaults(action=lambda given, console: results.run(given.check, console))
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    tags = sorted({tag for case in CASES for tag in case.tags})
    parser.add_argument("--quick", action="store_true", help="small maps, under two minutes on two CPU cores")
    parser.add_argument("--images", metavar="PATH", help="picture or folder of pictures (default: grace_hopper.jpg)")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder for record, table and plots")
    parser.add_argument("--record", action="store_true", help="write into benchmarks/results/DEVICE-DATE instead")
    parser.add_argument("--only", nargs="+", default=[], metavar="TEXT", help="cases whose name holds one of these")
    parser.add_argument("--cases", nargs="+", choices=tags, metavar="SET", help=f"sets of cases: {', '.join(tags)}")
    parser.add_argument("--without", nargs="+", default=[], metavar="NAME", help="providers to leave out")
    parser.add_argument("--effort", choices=EFFORTS, help="which providers: full adds max-autotune and compiled models")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--seeds", type=int, default=5, help="of the correctness check")
    parser.add_argument("--seconds", type=float, help="of timing per case")


def _run(chosen: argparse.Namespace, console: Console) -> int:
    start = time.monotonic()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    device = torch.device(chosen.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no CUDA GPU here")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    if device.type == "cpu":
        machine.keep_large_blocks()
    pictures = features.find_pictures(chosen.images)
    sets = chosen.cases or (["quick"] if chosen.quick else _default_sets(device))
    cases = select(sets, chosen.only)
    if not cases:
        raise ValueError(f"--only {' '.join(chosen.only)}: no such case in {', '.join(sets)}")
    out = results.new_folder(machine.device_name(device)) if chosen.record else chosen.out
    session = Session(out, device, pictures)
    session.measure_limits(sorted({case.dtype for case in cases}))
    options = Options(
        effort=chosen.effort or ("quick" if chosen.quick else "standard"),
        seeds=chosen.seeds,
        seconds=chosen.seconds or (2.0 if chosen.quick else 10.0),
        without=tuple(chosen.without),
    )
    if chosen.quick:
        options.until = start + QUICK_SECONDS
    with terminal.progress_bar(console) as session.watch:
        session.run(cases, options)
    written = write(session.record, out)
    terminal.print_record(session.record, console)
    console.print(f"Written: {', '.join(str(path) for path in [session.path, *written])}")
    return 1 if report.ours_failed(session.record) else 0


def _default_sets(device: torch.device) -> list[str]:
    return ["gpu-first", "gpu-models"] if device.type == "cuda" else ["cpu"]


def write(record: report.Record, out: Path) -> list[Path]:
    """The record's table in Markdown, and its plots."""
    table = out / "benchmark.md"
    table.write_text(report.markdown(record))
    return [table, *plots.draw(record, out)]


if __name__ == "__main__":
    sys.exit(main())
