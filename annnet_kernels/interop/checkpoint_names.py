"""Which key of a state dict is which tensor of which part, whatever the dialect: ``dialects``' table read backwards.

A tensor is addressed by an :class:`Entry`, the same in every dialect; a :class:`Layout` maps entries to keys.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
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
_INNER_NAMES = ("conv", "bn", "_conv", "_batch_norm")
"""What modules are called inside of one that holds convolution, norm and activation."""

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
    blocks = find_blocks(state)
    heads: dict[str, Layout] = {}
    for head in HEADS:
        for prefix, names in blocks.items():
            if names.dialect == head.dialect and prefix.endswith(head.fusion + "."):
                found = _head_layout(state, head, prefix.removesuffix(head.fusion + "."), blocks)
                if found is not None:
                    heads.setdefault(found.prefix, found)
    if len(heads) > 1:
        prefixes = " and ".join(repr(prefix) for prefix in heads)
        raise ValueError(f"{len(heads)} heads, whose keys begin with {prefixes}: keep the keys of one of them")
    if heads:
        return next(iter(heads.values()))
    if not blocks:
        raise ValueError("no asymmetric non-local block")
    if len(blocks) > 1:
        raise ValueError(
            f"{len(blocks)} blocks ({', '.join(prefix[:-1] for prefix in blocks)}) and no head around them"
        )
    ((prefix, names),) = blocks.items()
    if block is None:
        entries = _located_in_block(state, "fusion", names, prefix)
        query, key = (
            state.get(entries.get(Entry("fusion", slot, "weight"), "")) for slot in ("query.conv", "key.conv")
        )
        alike = query is None or key is None or (query.shape == key.shape and torch.equal(query, key))
        block = "pyramid" if alike else "fusion"
    own = {key for key in state if key.startswith(prefix)}
    located = _located_in_block(state, block, names, prefix)
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


def find_blocks(state: Iterable[str]) -> dict[str, BlockNames]:
    """Prefixes of the blocks among the keys of ``state``, each with the names that fit it best.

    A part counts as found if anything is inside of it, since people nest convolution, norm and activation as they
    like; among names that fit as well, those count that also fit the nesting.
    """
    found: dict[str, dict[int, tuple[set[str], int]]] = {}
    for index, names in enumerate(BLOCKS):
        roles = sorted({_role(path) for path in names.slots.values()})
        exact = {f"{path}.weight" for path in names.slots.values()}
        for key in state:
            for role in roles:
                for prefix in _prefixes(key, f"{role}."):
                    seen, fitting = found.setdefault(prefix, {}).get(index, (set(), 0))
                    found[prefix][index] = seen | {role}, fitting + (key.removeprefix(prefix) in exact)
    blocks = {}
    for prefix, scores in sorted(found.items()):
        index = max(scores, key=lambda i: (len(scores[i][0]), scores[i][1]))
        if len(scores[index][0]) >= _ENOUGH:
            blocks[prefix] = BLOCKS[index]
    return blocks


def _prefixes(key: str, part: str) -> Iterator[str]:
    """What may come before ``part`` in a key, of whole names."""
    start = key.find(part)
    while start >= 0:
        if start == 0 or key[start - 1] == ".":
            yield key[:start]
        start = key.find(part, start + 1)


def _role(path: str) -> str:
    """The module that holds a part, in whatever nesting: ``stages.0.f_key`` for ``stages.0.f_key.1.0``."""
    *owner, name = path.split(".")
    while owner and (name.isdecimal() or name in _INNER_NAMES):
        *owner, name = *owner[:-1], owner[-1]
    return ".".join((*owner, name))


def _located_in_block(state: Mapping[str, Tensor], place: str, names: BlockNames, prefix: str) -> dict[Entry, str]:
    slots = {slot: names.slots[slot] for slot in (*CONTEXT_SLOTS, *BOTTLENECK_SLOTS) if slot in names.slots}
    return _located_parts(state, place, slots, prefix, names.dialect)


def _located_parts(
    state: Mapping[str, Tensor], place: str, slots: Mapping[str, str], prefix: str, dialect: str, within: str = ""
) -> dict[Entry, str]:
    """The keys of every part: at its usual place, or else in the module that usually holds it.

    Where a part is elsewhere, a convolution is known by the four dimensions of its weight, a norm by the one of its
    own. What begins with ``within`` belongs to something else.
    """
    located: dict[Entry, str] = {}
    taken: set[str] = set()
    homeless = []
    for slot, path in slots.items():
        entries = {Entry(place, slot, tensor): tensor for tensor in tensors_of(slot)}
        keys = {entry: f"{prefix}{path}.{_tensor_name(dialect, entry)}" for entry in entries}
        present = {entry: key for entry, key in keys.items() if key in state}
        if present and _fits(slot, path, state, prefix):
            located |= present
            taken.add(f"{prefix}{path}")
        else:
            homeless.append(slot)
    for slot in homeless:
        start = f"{prefix}{_role(slots[slot])}."
        owners = dict.fromkeys(key.rpartition(".")[0] for key in state if key.startswith(start))
        owners |= {start[:-1]: None} if f"{start}weight" in state else {}
        for owner in owners:
            path = owner.removeprefix(prefix)
            free = owner not in taken and not (within and owner.startswith(within))
            if free and (slot in _NORMS or f"{owner}.weight" in state) and _fits(slot, path, state, prefix):
                taken.add(owner)
                for tensor in tensors_of(slot):
                    entry = Entry(place, slot, tensor)
                    if (key := f"{owner}.{_tensor_name(dialect, entry)}") in state:
                        located[entry] = key
                break
    return located


def _fits(slot: str, path: str, state: Mapping[str, Tensor], prefix: str) -> bool:
    """Whether a weight has as many dimensions as such a part's; one without a weight fits."""
    weight = state.get(f"{prefix}{path}.weight")
    return weight is None or (weight.dim() == 1) == (slot in _NORMS)


def _head_layout(
    state: Mapping[str, Tensor], head: HeadNames, prefix: str, blocks: Mapping[str, BlockNames]
) -> Layout | None:
    """The layout of a head whose keys begin with ``prefix``; None if only a fusion block is there."""
    root = prefix.removesuffix(head.prefix)
    around = f"{prefix}{head.pyramid.partition('.')[0]}."
    pyramid = next((found for found in blocks if found.startswith(around)), f"{prefix}{head.pyramid}.")
    located: dict[Entry, str] = {}
    for place, start in (("fusion", f"{prefix}{head.fusion}."), ("pyramid", pyramid)):
        located |= _located_in_block(state, place, _names(head.dialect, place), start)
    located |= _located_parts(state, "head", head.slots, prefix, head.dialect, within=pyramid)
    auxiliary = {slot: f"{head.auxiliary_prefix}{path}" for slot, path in head.auxiliary.items()}
    located |= _located_parts(state, "aux", auxiliary, root, head.dialect)
    if not any(entry.place in ("head", "pyramid") for entry in located):
        return None
    names = {path.partition(".")[0] for path in (head.fusion, head.pyramid, *head.slots.values())}
    # At the network's root, wrapped or not, the head's parts are beside the backbone.
    inside = (prefix,) if prefix != root else tuple(f"{prefix}{name}." for name in names)
    others = sorted(state.keys() - set(located.values()))
    unknown = [key for key in others if key.startswith(inside) and not key.startswith(root + head.auxiliary_prefix)]
    rest = [key for key in others if key not in set(unknown)]
    return Layout(head.dialect, None, root, prefix, located, unknown, rest)
