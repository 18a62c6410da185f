"""``python -m tools.gpu``: everything a GPU machine is asked for, the most important first, recorded as it happens.

The record lies in ``bench-results/gpu`` of the checkout, where the next call finds it and goes on with what is not
done; ``--out`` (or the environment variable OUT) names a folder that gets a copy of the files for people.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.records import DEFINITIONS, SCHEMA

from .campaign import Campaign
from .stages import STAGES
from .store import Store
from .tree import ROOT, tree_hash

FOLDER = ROOT / "bench-results" / "gpu"
BUDGET = 540.0
"""Seconds of one call."""


def main(arguments: list[str] | None = None) -> int:
    """Run what is due; the exit code is 1 where something failed."""
    start = time.monotonic()
    parser = argparse.ArgumentParser(prog="python -m tools.gpu", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the record lies and is gone on with")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), help="folder that gets a copy")
    parser.add_argument("--budget", type=float, default=float(os.environ.get("BUDGET", BUDGET)), help="seconds")
    parser.add_argument("--full", action="store_true", help="go on with the rest; call again until all is done")
    parser.add_argument("--stages", nargs="+", choices=[stage.name for stage in STAGES], help="these alone")
    parser.add_argument("--again", action="store_true", help="put aside what earlier calls did and begin anew")
    chosen = parser.parse_args(arguments)
    import torch

    if not torch.cuda.is_available():
        parser.exit(2, f"{parser.prog}: PyTorch sees no GPU here; python -m tools.gpu.rehearsal does without\n")
    folder = chosen.folder.resolve()
    if chosen.again and folder.exists():
        folder.replace(folder.with_name(f"{folder.name}-{int(time.time())}"))
    store = Store(folder, chosen.out and chosen.out.resolve(), new_record())
    for line in store.notes:
        store.note(line)
    stages = [s for s in STAGES if (s.name in chosen.stages if chosen.stages else chosen.full or not s.full)]
    tree = tree_hash()
    fine = Campaign(store, chosen.budget - (time.monotonic() - start), tree).run(stages)
    from .finish import finish

    finish(store, tree)
    return 0 if fine else 1


def new_record() -> dict[str, Any]:
    """A record with nothing in it but what is known before PyTorch has been asked; a stage adds the machine."""
    environment = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "tree": tree_hash(),
        "device": "cuda",
        "device_name": "unknown GPU",
        "commit": "unknown",
        "python": platform.python_version(),
        "versions": {"torch": "unknown"},
    }
    record = {"schema": SCHEMA, "environment": environment, "limits": {}, "input": {"pictures": [], "features": "none"}}
    return record | {"definitions": DEFINITIONS, "cases": [], "not_run": []}


if __name__ == "__main__":
    sys.exit(main())
