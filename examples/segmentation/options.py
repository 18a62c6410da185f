"""Every option of a run, with its default; the command line is made from this class."""

# ruff: noqa: RUF009
# Every default is made by a function that returns a dataclass field, which the linter cannot see.

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args, get_type_hints

from .errors import UserError


def _option(default: Any, help: str, *, choices: Sequence[str] | None = None, recipe: bool = False) -> Any:
    """A field; ``recipe`` marks what a resumed run must share with its checkpoint."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "recipe": recipe})


@dataclasses.dataclass(frozen=True)
class Options:
    """One run. Defaults are the recipe of the paper where it gives one."""

    data: Path = _option(Path("data"), "folder of the data set")
    dataset: str = _option(
        "camvid",
        "how the folder is read; camvid and folder: {train,val}/{images,labels}/NAME.*",
        choices=("camvid", "folder", "voc", "cityscapes", "pets"),
        recipe=True,
    )
    num_classes: int = _option(0, "classes of --dataset folder: label values 0 to N-1", recipe=True)
    void: int = _option(255, "label value that --dataset folder ignores", recipe=True)
    download: bool = _option(False, "fetch voc or pets into the folder first")
    out: Path = _option(Path("runs/annnet"), "folder of checkpoints, log and pictures")
    resume: str | None = _option(
        None, "continue: alone, from the last good checkpoint of --out if there is one; with a path, from that file"
    )

    backbone: str = _option("resnet50", "torchvision's, dilated", choices=("resnet50", "resnet101"), recipe=True)
    weights: str | None = _option(None, "to start from: a checkpoint file, or a name torchvision knows (DEFAULT)")
    width_small: bool = _option(
        False,
        "a narrow network for a CPU; unless given, --batch-size is 4, --crop 256, --workers 1",
        recipe=True,
    )
    blocks: str = _option("fused", "fused kernels or the published forward", choices=("fused", "plain"))
    dropout: float = _option(0.05, "probability of the head's Dropout2d", recipe=True)
    freeze_backbone_norm: bool = _option(False, "backbone BatchNorm in evaluation mode", recipe=True)

    steps: int = _option(40000, "training steps", recipe=True)
    batch_size: int = _option(8, "pictures per step, over all processes", recipe=True)
    crop: int = _option(512, "height and width of a training crop", recipe=True)
    scale: tuple[float, ...] = _option((0.5, 2.0), "range of the random scale", recipe=True)
    jitter: float = _option(0.3, "strength of the colour jitter", recipe=True)
    lr: float = _option(0.01, "learning rate at the start", recipe=True)
    power: float = _option(0.9, "power of the poly schedule", recipe=True)
    momentum: float = _option(0.9, "momentum of SGD", recipe=True)
    weight_decay: float = _option(5e-4, "weight decay, not on norms and biases", recipe=True)
    aux_weight: float = _option(0.4, "weight of the auxiliary loss; 0 leaves the auxiliary head out", recipe=True)
    ohem: bool = _option(False, "learn from hard pixels only", recipe=True)
    ohem_threshold: float = _option(0.7, "a pixel is hard below this probability of its class", recipe=True)
    ohem_fraction: float = _option(0.1, "hardest share of a picture's pixels that is kept in any case", recipe=True)
    seed: int = _option(0, "of weights, order, augmentation and dropout", recipe=True)

    device: str = _option("auto", "cuda, cpu, or auto")
    precision: str = _option(
        "fp32",
        "bf16, fp16: autocast; fp64: for checks",
        choices=("fp32", "bf16", "fp16", "fp64"),
        recipe=True,
    )
    channels_last: bool = _option(True, "memory layout")
    compile: bool = _option(False, "torch.compile")
    parallel: str = _option("ddp", "how torchrun's processes share the work", choices=("ddp", "fsdp"))
    sync_bn: bool = _option(True, "BatchNorm statistics over all processes", recipe=True)
    workers: int = _option(4, "processes that load pictures; 0 loads in this one")

    save_every: int = _option(500, "steps between checkpoints")
    keep: int = _option(2, "checkpoints to keep")
    log_every: int = _option(10, "steps between lines and log entries")
    evaluate_every: int = _option(0, "steps between evaluations; 0 evaluates at the end only")
    tensorboard: bool = _option(True, "write a TensorBoard log")
    window: int = _option(0, "evaluate in overlapping windows of this size; 0 takes pictures whole")
    eval_scales: tuple[float, ...] = _option((1.0,), "scales that an evaluation averages over")
    flip: bool = _option(False, "average over mirrored pictures as well")
    picture: int = _option(0, "number of the validation picture that is drawn")
    attention_pixel: tuple[int, ...] = _option((), "ROW COLUMN of that picture: draw what this pixel attends to")

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value < least:
                raise UserError(f"{_flag(name)}: expected at least {least}, got {value}")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise UserError(f"--scale: expected a smallest and a largest factor, got {self.scale}")
        if not self.eval_scales or min(self.eval_scales) <= 0:
            raise UserError(f"--eval-scales: expected factors above 0, got {self.eval_scales}")
        if len(self.attention_pixel) not in (0, 2):
            raise UserError(f"--attention-pixel: expected ROW COLUMN, got {self.attention_pixel}")
        if self.dataset == "folder" and self.num_classes < 2:
            raise UserError("--num-classes: expected at least 2 classes with --dataset folder")

    def recipe(self) -> dict[str, Any]:
        """What decides the weights that a run ends with."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.metadata["recipe"]}


LAST = "last"
_LEAST = {"steps": 1, "batch_size": 1, "crop": 1, "workers": 0, "save_every": 1, "keep": 1, "log_every": 1, "window": 0}


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Options from a command line."""
    parser = argparse.ArgumentParser(
        description="Train and evaluate ANNNet. Many processes: torchrun --nproc-per-node N examples/train.py ...",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    types = get_type_hints(Options)
    for field in dataclasses.fields(Options):
        settings: dict[str, Any] = {"help": field.metadata["help"], "default": field.default}
        if field.name == "data":
            settings["required"] = True
        if field.name == "resume":
            settings |= {"nargs": "?", "const": LAST}
        settings |= _conversion(types[field.name], field.metadata["choices"])
        parser.add_argument(_flag(field.name), **settings)
    if parser.parse_args(arguments).width_small:
        parser.set_defaults(batch_size=4, crop=256, workers=1)
    values = vars(parser.parse_args(arguments))
    return Options(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _conversion(kind: Any, choices: Sequence[str] | None) -> dict[str, Any]:
    """How argparse reads a value of this type."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if choices is not None:
        return {"choices": choices}
    element = next((part for part in get_args(kind) if part not in (type(None), ...)), None)
    if element is None:
        return {"type": kind}
    return {"type": element, "nargs": "+"} if get_args(kind)[-1] is ... else {"type": element}
