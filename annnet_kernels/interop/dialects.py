"""What the parts of the blocks and of the whole head are called in every code base: one table for all who ask.

Replacement finds a block's modules by it, reading and writing checkpoints its tensors. A dialect is one code base's way
of naming; a path is relative to the block or to the head. PaddleSeg's blocks are no PyTorch modules, so its entries
serve checkpoints only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ..blocks.structures import LENGTH, Places, Structure, module_at, path_of, structure_of

CONTEXT_SLOTS = ("key.conv", "key.norm", "query.conv", "query.norm", "value", "out")
"""The parts with tensors of every block."""

BOTTLENECK_SLOTS = ("join", "tail.norm")
"""The parts with tensors that a bottleneck adds."""


@dataclass(frozen=True)
class BlockNames:
    """What the parts of a block are called; ``slots`` maps a part to its path inside the block."""

    dialect: str
    kind: str
    """``"fusion"`` (AFNB), ``"pyramid"`` (APNB) or ``"either"``."""
    slots: Mapping[str, str]
    pools: str = ""
    bottleneck: str = ""
    """The module that joins context and input; ``join`` is its first part, the others are the tail."""
    settings: tuple[tuple[str, object], ...] = ()
    """Attributes that the published forward reads, with the one value that is supported."""
    width: str = ""
    """The attribute from which the published forward takes the softmax's scale."""
    unused: tuple[str, ...] = ()
    """Modules that the published forward never calls."""

    def matches(self, block: nn.Module) -> bool:
        """Whether ``block`` has the modules by which this kind of block is recognised."""
        roles = (self._role(slot) for slot in ("key.conv", "query.conv", "value", "out"))
        return (
            all(module_at(block, path_of(role)) is not None for role in roles)
            and isinstance(module_at(block, path_of(self.pools)), nn.ModuleList)
            and (not self.bottleneck or hasattr(block, self.bottleneck))
        )

    def structure_of(self, block: nn.Module) -> Structure:
        """Where the parts of ``block`` are, whatever their nesting; raises OddStructure if they are others."""
        settings = [(*_split(path), supported) for path, supported in self.settings]
        settings += [(("stages",), LENGTH, 1)] if self.pools.startswith("stages.") else []
        bottleneck = self.bottleneck if block._modules.get(self.bottleneck) is not None else ""
        places = Places(
            path_of(self._role("key.conv")),
            path_of(self._role("query.conv")),
            path_of(self._role("value")),
            path_of(self._role("out")),
            path_of(self.pools),
            path_of(bottleneck) if bottleneck else None,
            tuple(settings),
            _split(self.width) if self.width else None,
        )
        return structure_of(block, places)

    def _role(self, slot: str) -> str:
        """What holds a projection, in whatever nesting."""
        return self.slots[slot].removesuffix(".0").removesuffix(".conv") if slot.endswith(".conv") else self.slots[slot]


def _split(path: str) -> tuple[tuple[str, ...], str]:
    """The module that has an attribute, and the attribute's name."""
    *owner, attribute = path.split(".")
    return tuple(owner), attribute


@dataclass(frozen=True)
class HeadNames:
    """What the parts of a whole head are called; ``prefix`` is what comes before them in a network's checkpoint."""

    dialect: str
    prefix: str
    fusion: str
    pyramid: str
    slots: Mapping[str, str]
    auxiliary_prefix: str
    auxiliary: Mapping[str, str]
    """The auxiliary head on stage 4; its prefix is relative to the network, its paths to the prefix."""


def _mendelxu(kind: str, tail_norm: str) -> BlockNames:
    return BlockNames(
        dialect="mendelxu",
        kind=kind,
        slots={
            "key.conv": "stages.0.f_key.0",
            "key.norm": "stages.0.f_key.1.0",
            "key.activation": "stages.0.f_key.1.1",
            "query.conv": "stages.0.f_query.0",
            "query.norm": "stages.0.f_query.1.0",
            "query.activation": "stages.0.f_query.1.1",
            "value": "stages.0.f_value",
            "out": "stages.0.W",
            "join": "conv_bn_dropout.0",
            "tail.norm": tail_norm,
        },
        pools="stages.0.psp.stages",
        bottleneck="conv_bn_dropout",
        settings=(("stages.0.scale", 1),),
        width="stages.0.key_channels",
        unused=("stages.0.pool",),
    )


_MMSEG = BlockNames(
    dialect="mmseg",
    kind="either",
    slots={
        "key.conv": "stages.0.key_project.conv",
        "key.norm": "stages.0.key_project.bn",
        "key.activation": "stages.0.key_project.activate",
        "query.conv": "stages.0.query_project.conv",
        "query.norm": "stages.0.query_project.bn",
        "query.activation": "stages.0.query_project.activate",
        "value": "stages.0.value_project",
        "out": "stages.0.out_project",
        "join": "bottleneck.conv",
        "tail.norm": "bottleneck.bn",
    },
    pools="stages.0.key_downsample",
    bottleneck="bottleneck",
    settings=(
        ("stages.0.query_downsample", None),
        ("stages.0.matmul_norm", True),
        *(
            (f"{module}.order", ("conv", "norm", "act"))
            for module in ("stages.0.key_project", "stages.0.query_project", "bottleneck")
        ),
    ),
    width="stages.0.channels",
)


_PADDLESEG = BlockNames(
    dialect="paddleseg",
    kind="either",
    slots={
        "key.conv": "stages.0.f_key._conv",
        "key.norm": "stages.0.f_key._batch_norm",
        "query.conv": "stages.0.f_query._conv",
        "query.norm": "stages.0.f_query._batch_norm",
        "value": "stages.0.f_value",
        "out": "stages.0.W",
        "join": "conv_bn._conv",
        "tail.norm": "conv_bn._batch_norm",
    },
)


def _simple(kind: str, key: str, query: str, value: str, out: str) -> BlockNames:
    return BlockNames(
        dialect="simple",
        kind=kind,
        slots={
            "key.conv": f"{key}.0",
            "key.norm": f"{key}.1",
            "key.activation": f"{key}.2",
            "query.conv": f"{query}.0",
            "query.norm": f"{query}.1",
            "query.activation": f"{query}.2",
            "value": value,
            "out": out,
        },
        pools="ppm",
        width="key_channels",
    )


BLOCKS = (
    _mendelxu("fusion", "conv_bn_dropout.1"),
    _mendelxu("pyramid", "conv_bn_dropout.1.0"),
    _MMSEG,
    _PADDLESEG,
    _simple("fusion", "Conv_key", "Conv_query", "Conv_value", "ConvOut"),
    _simple("pyramid", "Conv_Key", "Conv_Query", "Conv_Value", "Conv_Out"),
)

PUBLISHED = BLOCKS[0]
"""The names of MendelXu/ANN, which are this package's, too."""

HEADS = (
    HeadNames(
        dialect="mendelxu",
        prefix="",
        fusion="fusion",
        pyramid="context.2",
        slots={"reduce.conv": "context.0", "reduce.norm": "context.1.0", "cls": "cls"},
        auxiliary_prefix="dsn.",
        auxiliary={"aux.conv": "0", "aux.norm": "1.0", "aux.cls": "3"},
    ),
    HeadNames(
        dialect="mmseg",
        prefix="decode_head.",
        fusion="fusion",
        pyramid="context",
        slots={"reduce.conv": "bottleneck.conv", "reduce.norm": "bottleneck.bn", "cls": "conv_seg"},
        auxiliary_prefix="auxiliary_head.",
        auxiliary={"aux.conv": "convs.0.conv", "aux.norm": "convs.0.bn", "aux.cls": "conv_seg"},
    ),
    HeadNames(
        dialect="paddleseg",
        prefix="head.",
        fusion="fusion",
        pyramid="context.1",
        slots={"reduce.conv": "context.0._conv", "reduce.norm": "context.0._batch_norm", "cls": "cls"},
        auxiliary_prefix="head.auxlayer.",
        auxiliary={"aux.conv": "conv_bn_relu._conv", "aux.norm": "conv_bn_relu._batch_norm", "aux.cls": "conv"},
    ),
)
