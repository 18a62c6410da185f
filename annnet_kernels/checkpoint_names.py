"""Which key of a state dict is which tensor of which part, whatever the dialect: ``dialects``' table read backwards.

A tensor is addressed by an :class:`Entry`, the same in every dialect; a :class:`Layout` maps entries to keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .dialects import BLOCKS, BOTTLENECK_SLOTS, CONTEXT_SLOTS, HEADS, BlockNames, HeadNames

CONV_NORM_PAIRS = (
    ("key.conv", "key.norm"),
    ("query.conv", "query.norm"),
    ("join", "tail.norm"),
    ("reduce.conv", "reduce.norm"),
    ("aux.conv", "aux.norm"),
)
"""Convolutions ahead of a batch norm: their bias may as well be in its running mean."""

_NORMS = tuple(norm for _, norm in CONV_NORM_PAIRS)
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_PADDLE_NAMES = {"running_mean": "_mean", "running_var": "_variance"}
_ENOUGH = 3
"""So many parts of a block have to be there for the rest to be missed."""


class Entry(NamedTuple):
    """One tensor, alike in every dialect: where it belongs, which part it is of, which of its tensors.

    ``place`` is ``"fusion"``, ``"pyramid"``, ``"head"`` or ``"aux"``.
    """

    place: str
    slot: str
    tensor: str


@dataclass(frozen=True)
class Layout:
    """The keys of a state dict sorted out: those of a whole head, or of one block."""

    dialect: str
    block: str | None
    """``"fusion"`` or ``"pyramid"`` for a block on its own, None for a head."""
    root: str
    """What comes before the network's keys; nothing where there is only a block."""
    prefix: str
    """What comes before the head's keys, or those of a block on its own."""
    keys: dict[Entry, str]
    unknown: list[str]
    """Keys inside of the block or head that belong to no part of it."""
    rest: list[str]
    """Keys outside, those of a backbone."""

    def key_of(self, entry: Entry) -> str:
        """The key that an entry has here, or would have."""
        if entry in self.keys:
            return self.keys[entry]
        if self.block is not None:
            return self.prefix + key_in_block(self.dialect, entry)
        if entry.place == "aux":
            return self.root + key_in_network(self.dialect, entry)
        return self.prefix + _key_in_head(_head(self.dialect), entry)


def locate(state: Mapping[str, Tensor], block: str | None = None) -> Layout:
    """The layout of a state dict that holds a head, or a single block.

    Args:
        state: tensors by key.
        block: what a single block is meant to be; None finds out: query and key of a pyramid block are one tensor.

    Raises:
        ValueError: it holds neither, or several blocks and no head; the message is what was found.
    """
    blocks = _find_blocks(list(state))
    for head in HEADS:
        for prefix, names in blocks.items():
            if names.dialect == head.dialect and prefix.endswith(head.fusion + "."):
                found = _head_layout(list(state), head, prefix.removesuffix(head.fusion + "."))
                if found is not None:
                    return found
    if not blocks:
        raise ValueError("no asymmetric non-local block")
    if len(blocks) > 1:
        raise ValueError(
            f"{len(blocks)} blocks ({', '.join(prefix[:-1] for prefix in blocks)}) and no head around them"
        )
    ((prefix, names),) = blocks.items()
    if block is None:
        query, key = (state.get(f"{prefix}{names.slots[slot]}.weight") for slot in ("query.conv", "key.conv"))
        alike = query is None or key is None or (query.shape == key.shape and torch.equal(query, key))
        block = "pyramid" if alike else "fusion"
    own = {key for key in state if key.startswith(prefix)}
    paths = {entry: prefix + path for entry, path in _block_paths(block, names)}
    located = {entry: key for entry, key in paths.items() if key in own}
    unknown = sorted(own - set(located.values()))
    return Layout(names.dialect, block, "", prefix, located, unknown, sorted(state.keys() - own))


def key_in_block(dialect: str, entry: Entry) -> str:
    """The key, relative to the block, of an entry of a block."""
    names = _names(dialect, entry.place)
    return f"{names.slots[entry.slot]}.{_tensor_name(dialect, entry)}"


def key_in_network(dialect: str, entry: Entry) -> str:
    """The key of an entry, relative to the network."""
    head = _head(dialect)
    if entry.place == "aux":
        return f"{head.auxiliary_prefix}{head.auxiliary[entry.slot]}.{_tensor_name(dialect, entry)}"
    return head.prefix + _key_in_head(head, entry)


def block_prefix(layout: Layout, place: str) -> str:
    """What comes before the keys of one block of a layout."""
    if layout.block is not None:
        return layout.prefix
    head = _head(layout.dialect)
    return f"{layout.prefix}{head.fusion if place == 'fusion' else head.pyramid}."


def tensors_of(slot: str) -> tuple[str, ...]:
    """The tensors that a part can have."""
    return _NORM_TENSORS if slot in _NORMS else ("weight", "bias")


def _names(dialect: str, kind: str) -> BlockNames:
    return next(names for names in BLOCKS if names.dialect == dialect and names.kind in (kind, "either"))


def _head(dialect: str) -> HeadNames:
    return next(head for head in HEADS if head.dialect == dialect)


def _key_in_head(head: HeadNames, entry: Entry) -> str:
    if entry.place in ("fusion", "pyramid"):
        block = head.fusion if entry.place == "fusion" else head.pyramid
        return f"{block}.{key_in_block(head.dialect, entry)}"
    return f"{head.slots[entry.slot]}.{_tensor_name(head.dialect, entry)}"


def _tensor_name(dialect: str, entry: Entry) -> str:
    return _PADDLE_NAMES.get(entry.tensor, entry.tensor) if dialect == "paddleseg" else entry.tensor


def _block_paths(place: str, names: BlockNames) -> Iterator[tuple[Entry, str]]:
    """Every entry that such a block can have, with its key relative to the block."""
    for slot in (*CONTEXT_SLOTS, *BOTTLENECK_SLOTS):
        if slot in names.slots:
            for entry in (Entry(place, slot, tensor) for tensor in tensors_of(slot)):
                yield entry, f"{names.slots[slot]}.{_tensor_name(names.dialect, entry)}"


def _find_blocks(keys: list[str]) -> dict[str, BlockNames]:
    """Prefixes of the blocks among ``keys``, each with the names that fit it best."""
    scores: dict[str, dict[int, int]] = {}
    for index, names in enumerate(BLOCKS):
        paths = [path for entry, path in _block_paths(names.kind, names) if entry.tensor == "weight"]
        for suffix in paths:
            for key in keys:
                prefix = key.removesuffix(suffix)
                if prefix != key and (not prefix or prefix.endswith(".")):
                    counts = scores.setdefault(prefix, {})
                    counts[index] = counts.get(index, 0) + 1
    best = {prefix: max(counts, key=lambda i: counts[i]) for prefix, counts in scores.items()}
    return {prefix: BLOCKS[index] for prefix, index in sorted(best.items()) if scores[prefix][index] >= _ENOUGH}


def _head_layout(keys: list[str], head: HeadNames, prefix: str) -> Layout | None:
    """The layout of a head whose keys begin with ``prefix``; None if only a fusion block is there."""
    root = prefix.removesuffix(head.prefix)
    blocks = [entry for kind in ("fusion", "pyramid") for entry, _ in _block_paths(kind, _names(head.dialect, kind))]
    own = [Entry("head", slot, tensor) for slot in head.slots for tensor in tensors_of(slot)]
    aux = [Entry("aux", slot, tensor) for slot in head.auxiliary for tensor in tensors_of(slot)]
    paths = {entry: prefix + _key_in_head(head, entry) for entry in (*blocks, *own)}
    paths |= {entry: root + key_in_network(head.dialect, entry) for entry in aux}
    present = set(keys)
    located = {entry: key for entry, key in paths.items() if key in present}
    if not any(entry.place in ("head", "pyramid") for entry in located):
        return None
    names = {path.partition(".")[0] for path in (head.fusion, head.pyramid, *head.slots.values())}
    # At the network's root, wrapped or not, the head's parts are beside the backbone.
    inside = (prefix,) if prefix != root else tuple(f"{prefix}{name}." for name in names)
    others = sorted(present - set(located.values()))
    unknown = [key for key in others if key.startswith(inside) and not key.startswith(root + head.auxiliary_prefix)]
    rest = [key for key in others if key not in set(unknown)]
    return Layout(head.dialect, None, root, prefix, located, unknown, rest)
