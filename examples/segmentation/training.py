"""The state of a run: one step of it, its checkpoints, and the loop."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import checkpoint
from .data import Pictures, open_source
from .distributed import Processes, shared
from .errors import CheckpointError, DamagedError, UserError
from .evaluation import Scores, evaluate, labeller
from .losses import training_loss
from .monitor import Monitor
from .network import DTYPES, build, training_mode
from .options import LAST, Options
from .order import Order
from .recipe import make_optimizer, set_learning_rate
from .signals import StopRequest
from .transforms import evaluation_transform, training_transform


class Training:
    """Network, optimizer, pictures, and how far the run has come."""

    def __init__(self, options: Options, processes: Processes) -> None:
        self.options, self.processes = options, processes
        self.pictures = Pictures(open_source(options, "train"), training_transform(options), options.seed)
        self.validation = Pictures(open_source(options, "val"), evaluation_transform())
        self.order = Order(self.pictures, options, processes)
        torch.manual_seed(options.seed)
        self.network = build(options, len(self.pictures.source.classes), self.say).to(processes.device)
        if options.compile:
            self.network.compile()
        self.model = shared(self.network, options.parallel, options.sync_bn, processes)
        self.optimizer = make_optimizer(self.network, options)
        self.scaler = torch.amp.GradScaler(processes.device.type, enabled=options.precision == "fp16")
        self.step = 0
        self._losses = torch.empty(0, dtype=torch.float64)
        self._new_losses: list[Tensor] = []
        self._seed_dropout()

    def say(self, text: str) -> None:
        """Print, if this is the leading process."""
        if self.processes.leads:
            print(text, flush=True)

    @property
    def dtype(self) -> torch.dtype:
        """Of pictures and parameters."""
        return torch.float64 if self.options.precision == "fp64" else torch.float32

    def autocast(self) -> torch.autocast:
        enabled = self.options.precision in ("bf16", "fp16")
        dtype = DTYPES[self.options.precision] if enabled else None
        return torch.autocast(self.processes.device.type, dtype, enabled=enabled)

    def advance(self, images: Tensor, labels: Tensor) -> float:
        """One step of SGD; returns its learning rate. The loss is kept where it was computed."""
        lr = set_learning_rate(self.optimizer, self.step, self.options)
        device = self.processes.device
        images = images.to(device, self.dtype, non_blocking=True)
        if self.options.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        plain = self.options.blocks == "plain"
        labels = labels.to(device, non_blocking=True)
        labels = labels.long() if plain else labels  # the fused loss reads labels of one byte
        training_mode(self.network, self.options.freeze_backbone_norm)
        with self.autocast():
            share, loss = training_loss(self.model(images, upsample=plain), labels, self.options, self.processes)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(share).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self._new_losses.append(loss.detach())
        return lr

    def loss_history(self) -> Tensor:
        """Every loss so far, (steps) float64; refuses to go on from one that is not finite."""
        if self._new_losses:
            self._losses = torch.cat([self._losses, torch.stack(self._new_losses).double().cpu()])
            self._new_losses = []
        wrong = (~self._losses.isfinite()).nonzero()
        if len(wrong):
            step = int(wrong[0]) + 1
            raise UserError(f"the loss of step {step} is {self._losses[step - 1]}; try a smaller --lr")
        return self._losses

    def evaluate(self, monitor: Monitor) -> Scores:
        seen = monitor.evaluating(len(range(self.processes.rank, len(self.validation), self.processes.count)))
        label = labeller(self.network, self.options, self.autocast)
        scores = evaluate(self.network, self.validation, label, self.processes, self.dtype, seen)
        monitor.evaluated(self.step, scores)
        return scores

    @property
    def folder(self) -> Path:
        return self.options.out / "checkpoints"

    def save(self) -> Path:
        """A checkpoint of this step, written by the leading process; the others wait for it."""
        path = checkpoint.path_of(self.folder, self.step)
        content = {
            "format": checkpoint.FORMAT,
            "recipe": self._recipe(),
            "step": self.step,
            "losses": self.loss_history(),
            "network": checkpoint.gathered(self.network.state_dict()),
            "optimizer": checkpoint.gathered(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "random": self.processes.gather(_random_state(self.processes.device)),
        }
        if self.processes.leads:
            checkpoint.write(path, content)
            checkpoint.remove_older(path, self.options.keep)
        self.processes.wait()
        return path

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint; CheckpointError, and nothing changed, if it is damaged or of another run."""
        content = checkpoint.read(path)
        checkpoint.check_recipe(path, content["recipe"], self._recipe())
        checkpoint.check_shapes(path, content["network"], self.network)
        checkpoint.load_network(self.network, content["network"])
        checkpoint.load_optimizer(self.optimizer, content["optimizer"])
        self.scaler.load_state_dict(content["scaler"])
        self.step, self._losses = content["step"], content["losses"]
        if len(content["random"]) == self.processes.count:
            _set_random_state(content["random"][self.processes.rank], self.processes.device)
        else:  # of another number of processes, no state of which would be right here
            self._seed_dropout()

    def resume(self) -> None:
        """Continue as ``--resume`` or a restart by torchrun asks."""
        asked = self.options.resume
        found = checkpoint.newest_first(self.folder)
        if asked == LAST or self.processes.restarted:
            for path in found:
                try:
                    self.restore(path)
                except DamagedError as refusal:
                    self.say(f"refused: {refusal}")
                else:
                    break
        elif found and asked is None:
            raise CheckpointError(f"{found[0]}: a run has been here; --resume continues it, another --out starts anew")
        if not self.step and asked not in (None, LAST):
            self.restore(Path(asked))
        if self.step:
            self.say(f"continuing at step {self.step} of {self.options.steps}")
        elif asked is not None:
            self.say(f"no checkpoint in {self.folder}, starting anew")

    def _recipe(self) -> dict[str, Any]:
        """The options that decide the weights, and the number of training pictures."""
        return self.options.recipe() | {"training_pictures": len(self.pictures)}

    def _seed_dropout(self) -> None:
        """Processes draw differently, and steps after a change of their number do."""
        torch.manual_seed(self.options.seed + 1 + self.processes.rank + 1000 * self.step)


def _random_state(device: torch.device) -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def _set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def train(training: Training, monitor: Monitor, stop: StopRequest) -> int:
    """All steps that remain. Returns 0, or the number of the signal that ended it early; a checkpoint is there."""
    options = training.options
    remaining = options.steps - training.step
    for images, labels in islice(training.order.batches(training.step), remaining):
        lr = training.advance(images, labels)
        step = training.step
        last = step == options.steps
        monitor.trained(step)
        if last or step % options.log_every == 0:
            monitor.report(step, float(training.loss_history()[-1]), lr)
        asked = training.processes.any(stop.number)
        evaluates = not last and options.evaluate_every > 0 and step % options.evaluate_every == 0
        if last or asked or evaluates or step % options.save_every == 0:
            path = training.save()
        if asked:
            monitor.say(f"saved {path}; --resume continues there")
            return asked
        if evaluates:
            training.evaluate(monitor)
    return 0
