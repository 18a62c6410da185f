"""The network of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet

import annnet_kernels as ak

from .errors import UserError
from .options import Options

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


class _NarrowBottleneck(Bottleneck):
    expansion = 1


class SmallBackbone(nn.Module):
    """A dilated ResNet of one narrow bottleneck per stage: 1.2 million parameters, output stride 8."""

    channels = (256, 512)

    def __init__(self) -> None:
        super().__init__()
        resnet = ResNet(
            _NarrowBottleneck, [1, 1, 1, 1], width_per_group=32, replace_stride_with_dilation=[False, True, True]
        )
        children = [child for name, child in resnet.named_children() if name not in ("avgpool", "fc")]
        self.early, self.last = nn.Sequential(*children[:-1]), children[-1]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        low = self.early(x)
        return low, self.last(low)


def build(options: Options, num_classes: int, say: Callable[[str], None] = print) -> ak.ANNNet:
    """ANNNet as the options describe it, with the weights to start from; ``say`` is told what a file held."""
    settings = {"aux": options.aux_weight > 0, "dropout": options.dropout, "blocks": options.blocks}
    if options.width_small:
        network = ak.ANNNet(num_classes, SmallBackbone(), channels=128, key_channels=64, value_channels=64, **settings)
    elif options.weights is None or Path(options.weights).exists():
        network = ak.ANNNet(num_classes, options.backbone, **settings)
    else:
        network = _from_torchvision(options, num_classes, settings)
    if options.weights is not None and Path(options.weights).exists():
        say(str(ak.load_checkpoint(network, options.weights)))
    elif options.weights is not None and options.width_small:
        raise UserError(f"--weights: no such file: {options.weights} (torchvision has none for --width-small)")
    if options.precision == "fp64":
        network.double()
    if options.channels_last:
        for parameter in network.parameters():
            if parameter.dim() == 4 and parameter.shape[2:] != (1, 1):  # else DDP warns of strides that say the same
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return network


def _from_torchvision(options: Options, num_classes: int, settings: dict[str, object]) -> ak.ANNNet:
    try:
        return ak.ANNNet(num_classes, options.backbone, weights=options.weights, **settings)
    except (KeyError, ValueError) as error:
        raise UserError(f"--weights: neither a file nor a name torchvision knows: {options.weights}") from error


def training_mode(network: nn.Module, freeze_backbone_norm: bool) -> None:
    """Everything in training mode, except a frozen backbone's norms."""
    network.train()
    if freeze_backbone_norm:
        for module in network.backbone.modules():  # type: ignore[union-attr]
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
