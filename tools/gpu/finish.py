"""The end of a call: Markdown and plots from the record."""

from __future__ import annotations

from pathlib import Path

from benchmarks.runner import first_line

from .store import Store
from .summary import markdown


def finish(store: Store, tree: str) -> None:
    """Write what people read; plots that fail cost themselves alone."""
    pictures: list[Path] = []
    if store.record["cases"]:
        try:
            from benchmarks import plots

            pictures = plots.draw(store.record, store.folder)
        except Exception as error:
            store.note(f"no plots: {first_line(error)}")
    store.finish(markdown(store.record, tree), pictures)
    store.note(f"Written: {store.folder}" + (f", copied to {store.out}" if store.out else ""))
