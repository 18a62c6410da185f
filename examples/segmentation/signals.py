"""Ctrl-C and SIGTERM as a request that the loop answers between two steps."""

from __future__ import annotations

import signal
from types import FrameType


class StopRequest:
    """Within, ``number`` is the signal that asked to stop, 0 while none did. A second one acts as it always does."""

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._asked) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def release(self) -> None:
        """From here on signals act as they did before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.release()
