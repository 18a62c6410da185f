"""What a finished run leaves beside its checkpoints: weights, scores, and pictures."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import annnet_kernels as ak

from . import checkpoint
from .distributed import whole
from .evaluation import Scores, labeller
from .monitor import Monitor
from .training import Training


def write_results(training: Training, scores: Scores, monitor: Monitor) -> None:
    """Weights and scores, the loss curve, a prediction, and the attention of a pixel if one is asked for."""
    options = training.options
    weights = checkpoint.gathered(training.network.state_dict())
    with whole(training.network):
        if not training.processes.leads:
            return
        checkpoint.write(options.out / "weights.pt", weights)
        facts = {
            "mIoU": scores.mean,
            "IoU": {name: None if iou != iou else iou for name, iou in scores.classes.items()},
            "losses": training.loss_history().tolist(),
            "versions": {"annnet_kernels": ak.__version__, "torch": torch.__version__},
            "options": {name: str(value) for name, value in vars(options).items()},
        }
        (options.out / "results.json").write_text(json.dumps(facts, indent=1))
        for path in _draw(training):
            monitor.say(f"wrote {path}")


@torch.no_grad()
def _draw(training: Training) -> list[Path]:
    from . import pictures

    options, device = training.options, training.processes.device
    image, labels = training.validation[0, options.picture % len(training.validation)]
    image = image.to(device, training.dtype)
    label = labeller(training.network.eval(), options, training.autocast)
    predicted = label(image[None])[0]
    classes = training.pictures.source.classes
    drawn = {
        "loss.png": pictures.loss_curves({options.blocks: training.loss_history().tolist()}),
        "prediction.png": pictures.prediction(image, labels, predicted, classes),
    }
    if options.attention_pixel:
        row, column = options.attention_pixel
        drawn["attention.png"] = pictures.attention(training.network, image, (row, column))
    return [pictures.save(figure, options.out / name) for name, figure in drawn.items()]
