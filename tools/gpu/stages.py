"""What a campaign asks of a GPU machine: stages in the order of their worth, as data.

Stages of one group run at the same time, on all cores; the GPU is nobody's alone there, so nothing is timed. All other
stages have the GPU to themselves. The seconds are limits, and add up to what one call may take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WARM_UP_SHARES = 12
"""Processes that compile the kernels. One alone would need minutes: a variant takes one or two seconds."""

BLOCK_TESTS = ("test_cuda.py", "test_amp.py", "test_modules.py", "test_compile.py")
"""Files whose GPU tests concern blocks: streams, graphs, determinism, mixed precision, compilation."""
OPERATOR_TESTS = ("interpreter", "test_pyramid_pool_cuda.py", "test_warmup.py")

_PEERS = ("ours", "plain eager", "plain compiled", "collapsed compiled", "ours folded")
COMPILED_PEERS = ("plain compiled", "collapsed compiled")


@dataclass(frozen=True)
class Stage:
    """One process of a campaign.

    Args:
        name: in record and log; unique.
        step: what it does, see ``steps.py``.
        options: the step's arguments.
        seconds: what it may take at most.
        together: the group that it runs in; None where it needs the GPU alone.
        preparation: whether it fills caches: repeated whenever the sources changed or the caches are gone.
        full: whether it is part of ``--full`` only.
    """

    name: str
    step: str
    options: tuple[str, ...] = ()
    seconds: float = 60.0
    together: str | None = None
    preparation: bool = False
    full: bool = False


def _first_group() -> list[Stage]:
    """Everything that mostly waits for compilers."""
    seconds, group = 60.0, "first"
    build = Stage("build", "build", seconds=seconds, together=group, preparation=True)
    warm = [
        Stage(f"warm-up {share}", "warm-up", (str(share), str(WARM_UP_SHARES)), seconds, group, preparation=True)
        for share in range(1, WARM_UP_SHARES + 1)
    ]
    peers = [
        Stage(f"compile {block} {mode}, {peer}", "compile", (block, mode, peer), seconds, group, preparation=True)
        for block in ("APNB", "AFNB")
        for mode in ("training", "evaluation")
        for peer in COMPILED_PEERS
    ]
    tests = Stage("tests of blocks", "tests", BLOCK_TESTS, seconds, group)
    machine = Stage("machine", "machine", seconds=seconds, together=group)
    return [machine, build, *warm, *peers, tests]


STAGES: tuple[Stage, ...] = (
    *_first_group(),
    Stage("profile", "profile", seconds=40),
    Stage("accuracy", "accuracy", seconds=25),
    Stage("blocks 97×97", "measure", ("gpu-blocks", "97x97", *_PEERS), 150),
    Stage("products", "products", seconds=20),
    Stage("remaining tests", "tests", OPERATOR_TESTS, 75),
    Stage("operators", "measure", ("gpu-operators",), 75),
    Stage("blocks 128×256", "measure", ("gpu-blocks", "128x256", *_PEERS), 50),
    Stage("paper", "measure", ("paper-gpu", "ours", "plain eager", "naive non-local"), 30),
    Stage("blocks, all peers", "measure", ("gpu-blocks",), 400, full=True),
    Stage("models", "measure", ("gpu-models",), 400, full=True),
    Stage("sizes", "measure", ("sizes",), 300, full=True),
    Stage("memory checker", "sanitize", seconds=400, full=True),
    Stage("remaining shapes", "measure", ("gpu-rest",), 500, full=True),
    Stage("max-autotune", "measure", ("gpu-blocks", "effort=full"), 500, full=True),
)


def groups(stages: Sequence[Stage]) -> list[list[Stage]]:
    """The stages in order, those that run at the same time in one list."""
    found: list[list[Stage]] = []
    for stage in stages:
        if found and stage.together is not None and found[-1][0].together == stage.together:
            found[-1].append(stage)
        else:
            found.append([stage])
    return found
