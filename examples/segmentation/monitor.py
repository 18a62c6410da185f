"""What a run tells: a progress bar or lines, and a TensorBoard log. Only the leading process tells anything."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .evaluation import Scores
from .options import Options


class Monitor:
    """Progress of training and evaluation; a context manager."""

    def __init__(self, options: Options, step: int, leads: bool) -> None:
        self.options, self.leads = options, leads
        self.console = Console(quiet=not leads, highlight=False, soft_wrap=True)
        self.log: Any = None
        if leads and options.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # What a killed run logged behind its last checkpoint is shown no more.
            self.log = SummaryWriter(str(options.out / "tensorboard"), purge_step=step + 1)
        self._since, self._first = time.perf_counter(), step
        self._latest = step
        self.images_per_second = 0.0
        self._stack = ExitStack()

    def __enter__(self) -> Monitor:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"),
            TimeRemainingColumn(),
        )
        bars = Progress(*columns, console=self.console, disable=not (self.leads and self.console.is_terminal))
        self._bars = self._stack.enter_context(bars)
        self._training = bars.add_task("training", total=self.options.steps, completed=self._first, facts="")
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        if self.log is not None:
            self.log.close()

    def trained(self, step: int) -> None:
        """After every step; reads nothing from a GPU."""
        self._bars.update(self._training, completed=step)

    def report(self, step: int, loss: float, lr: float) -> None:
        """Every ``--log-every`` steps."""
        now = time.perf_counter()
        rate = (step - self._latest) / (now - self._since)
        self._since, self._latest = now, step
        self.images_per_second = rate * self.options.batch_size
        seconds_left = (self.options.steps - step) / rate
        memory = peak_memory()
        facts = f"loss {loss:.4f}  {self.images_per_second:.1f} images/s  {memory / 2**30:.2f} GiB"
        self._bars.update(self._training, facts=facts)
        if not self.console.is_terminal:
            left = f"{int(seconds_left) // 3600}:{int(seconds_left) // 60 % 60:02}:{int(seconds_left) % 60:02}"
            self.say(f"step {step}/{self.options.steps}  {facts}  {left} left")
        if self.log is not None:
            values = {"loss": loss, "lr": lr, "images_per_second": self.images_per_second, "memory_bytes": memory}
            for name, value in values.items():
                self.log.add_scalar(f"training/{name}", value, step)

    def evaluating(self, pictures: int) -> Callable[[], None]:
        """A second bar; call the result once per picture."""
        task = self._bars.add_task("evaluation", total=pictures, facts="")
        return lambda: self._bars.advance(task)

    def evaluated(self, step: int, scores: Scores) -> None:
        """Print and log mIoU and the IoU of every class; the time an evaluation took is no training time."""
        width = max(map(len, scores.classes))
        for name, iou in scores.classes.items():
            self.say(f"  {name:{width}}  {'absent' if iou != iou else f'{iou:6.1%}'}")
        self.say(f"step {step}: mIoU {scores.mean:.2%}")
        if self.log is not None:
            self.log.add_scalar("evaluation/mIoU", scores.mean, step)
            for name, iou in scores.classes.items():
                if iou == iou:
                    self.log.add_scalar(f"evaluation/IoU {name}", iou, step)
        self._since = time.perf_counter()

    def say(self, text: str) -> None:
        self.console.print(text, markup=False)
        sys.stdout.flush()


def peak_memory() -> int:
    """Bytes: of the GPU's allocator, or of this process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
