"""A stage's process: its own group, its output straight into a file, ended at a deadline or with its parent."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux
_GRACE = 3.0
"""Seconds between the request to end and the kill, in which a step may write its last line."""


class Process:
    """One running command.

    Args:
        command: program and arguments.
        log: file that gets stdout and stderr, byte by byte as they come; nothing is decoded.
        seconds: what the command may take.
        environment: variables on top of this process's own.
        folder: where it runs.
    """

    def __init__(
        self, command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str], folder: Path
    ) -> None:
        self.start = time.monotonic()
        self.deadline = self.start + seconds
        self.timed_out = False
        self.cpu_seconds = 0.0
        self.code: int | None = None
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=_lead_a_group_that_dies_with_its_parent,
            )

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.start

    def poll(self) -> bool:
        """Whether it has ended; past its deadline it is told to, and killed soon after."""
        if self.code is None and self._reap():
            self._signal(signal.SIGKILL)  # what it has left behind
        if self.code is None and time.monotonic() >= self.deadline:
            self.stop()
        return self.code is not None

    def stop(self) -> None:
        """End the whole group and wait for it."""
        if self.code is not None:
            return
        self.timed_out = True
        self._signal(signal.SIGTERM)
        patience = time.monotonic() + _GRACE
        while not self._reap() and time.monotonic() < patience:
            time.sleep(0.02)
        self._signal(signal.SIGKILL)
        while not self._reap():
            time.sleep(0.02)

    def _reap(self) -> bool:
        if self.code is None:
            pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
            if pid:
                self.code = self._process.returncode = os.waitstatus_to_exitcode(status)
                self.cpu_seconds = usage.ru_utime + usage.ru_stime
        return self.code is not None

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _lead_a_group_that_dies_with_its_parent() -> None:
    """In the child, before its program starts. Without Linux's signal a killed campaign would leave it running."""
    os.setpgrp()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
