"""Checkpoints across code bases: read any dialect's into a block or network, write a state dict in any dialect.

Three things differ beside names. A convolution ahead of a batch norm may have a bias or not: without one, the bias is
subtracted from the running mean, which is exact in both modes. A pyramid block stores its shared projection twice: one
copy is enough to read it, and two must agree. Paddle counts no batches.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import checks
from .checkpoint_files import read_state_dict, state_dict_of, unwrapped
from .checkpoint_names import (
    CONV_NORM_PAIRS,
    Entry,
    Layout,
    block_prefix,
    key_in_block,
    key_in_network,
    locate,
)

DIALECTS = ("mmseg", "mendelxu", "paddleseg")

_SHOWN = 8
"""How many keys a message lists before it counts the others."""


@dataclass
class CheckpointReport:
    """What :func:`load_checkpoint` did."""

    dialect: str
    """Whose names the file has."""
    loaded: dict[str, str] = field(default_factory=dict)
    """The model's keys, each with the key of the file that it came from, or how it was made."""
    folded: dict[str, str] = field(default_factory=dict)
    """Biases of the file, each with the running mean of the model that took it in."""
    initialised: dict[str, str] = field(default_factory=dict)
    """The model's keys that stayed as they were, each with the reason."""
    unused: list[str] = field(default_factory=list)
    """The file's keys that went nowhere."""

    def kept(self) -> list[str]:
        """What stayed as initialised: a reason with its keys per line."""
        reasons: dict[str, list[str]] = {}
        for key, why in self.initialised.items():
            reasons.setdefault(why, []).append(key)
        return [f"{_listed(keys)} ({why})" for why, keys in reasons.items()]

    def __str__(self) -> str:
        renamed = [f"  {key} <- {origin}" for key, origin in self.loaded.items() if key != origin]
        lines = [
            f"{self.dialect} checkpoint: {len(self.loaded)} tensors read, {len(renamed)} from other names",
            *renamed,
        ]
        lines += [f"folded {bias} into {mean}" for bias, mean in self.folded.items()]
        lines += [f"kept as initialised: {line}" for line in self.kept()]
        lines += [f"not used: {_listed(self.unused)}"] if self.unused else []
        return "\n".join(lines)


def load_checkpoint(
    block_or_model: nn.Module, path: str | os.PathLike[str] | Mapping[str, Any], *, strict: bool = False
) -> CheckpointReport:
    """Load a checkpoint of MendelXu/ANN, mmsegmentation or PaddleSeg into a block or network, whatever its dialect.

    Only weights are read; nothing in the file is executed. Options, paths and NumPy's numbers beside the weights are
    read over. The state dict may be inside of other containers, and wrappers' prefixes (``module.``) anywhere in its
    keys. A bias ahead of a batch norm that the model does not have is folded into
    the running mean. From a whole network's file a block takes its part. What is around the head, a backbone, is
    loaded where all its keys and shapes are the model's.

    Args:
        block_or_model: :class:`AFNB`, :class:`APNB`, :class:`ANNNet`, or a block, head or network of any dialect,
            replaced or not.
        path: a file that ``torch.save`` wrote, a ``.safetensors`` file (with that package), or a ``.pdparams`` file of
            Paddle; or a mapping, what was read from a file.
        strict: a block or head is always loaded completely or not at all. True refuses as well to leave anything
            around it, a backbone or an auxiliary head, as initialised; False reports it.

    Returns:
        A report of what went where and what did not; ``print`` it.

    Raises:
        TypeError: ``block_or_model`` is no module instance, or ``path`` neither a path nor a mapping.
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or holds objects of other types, several state dicts or several heads; a key of
            a block or head is missing or unknown, a shape differs, or two copies of a shared projection disagree. The
            message names the type, the state dicts or the key, and the model is as it was.

    Example:
        >>> import tempfile, torch, annnet_kernels as ak
        >>> block = ak.APNB(64, 64, 32, 32)
        >>> with tempfile.NamedTemporaryFile(suffix=".pth") as file:
        ...     torch.save({"state_dict": ak.to_dialect(block.state_dict(), "mmseg")}, file.name)
        ...     report = ak.load_checkpoint(block, file.name)
        >>> report.dialect, report.loaded["stages.0.W.weight"]
        ('mmseg', 'stages.0.out_project.weight')
    """
    checks.module("block_or_model", block_or_model)
    return load_state(block_or_model, read_state_dict(path), strict=strict)


def load_state(model: nn.Module, state: Mapping[str, Tensor], *, strict: bool) -> CheckpointReport:
    """:func:`load_checkpoint` of a file that has been read."""
    own = {key: x for key, x in model.state_dict(keep_vars=True).items() if isinstance(x, Tensor)}
    target = _located(own, "block_or_model")
    if target.block is not None:
        target = _located(own, "block_or_model", _kind_of(target, own))
    source = _located(state, "path", target.block)
    if target.block is None and source.block is not None:
        raise ValueError("path: expected the weights of a whole head, got those of a single block")
    weights = _weights(source, state, target.block, "path")
    report = CheckpointReport(source.dialect)
    for bias, mean in _fit(weights, target.keys.keys(), "path").items():
        report.folded[source.key_of(bias)] = target.key_of(mean)
    if reason := _why_no_auxiliary(weights, target, own):
        report.initialised |= {key: reason for entry, key in target.keys.items() if entry.place == "aux"}
    found: dict[str, Tensor] = {}
    problems: list[str] = []
    for entry, key in target.keys.items():
        weight = weights.get(entry)
        if key in report.initialised:
            continue
        if weight is None:
            problems.append(f"{source.key_of(entry)} is not in the file")
        elif weight.tensor.shape != own[key].shape:
            problems.append(f"{weight.origin} has {tuple(weight.tensor.shape)}, expected {tuple(own[key].shape)}")
        else:
            found[key], report.loaded[key] = weight.tensor, weight.origin
    surroundings = _surroundings(target, source, own, state) | _alike(target, source, own, state)
    found |= {key: state[origin] for key, origin in surroundings.items()}
    report.loaded |= surroundings
    report.initialised |= {key: "the file's backbone is another" for key in target.rest if key not in surroundings}
    report.initialised |= {key: "the file's head has no such part" for key in target.unknown if key not in surroundings}
    report.unused = sorted(state.keys() - {*report.loaded.values(), *report.folded})
    left_over = [key for key in _left_over(weights, target, source) if key not in surroundings.values()]
    problems += [f"{key} has no place in the model" for key in left_over]
    if strict:
        problems += [f"{line} would stay as initialised" for line in report.kept()]
    if problems:
        raise ValueError(f"path: {_listed(problems, '; ')}")
    model.load_state_dict(model.state_dict() | found)
    return report


def _kind_of(target: Layout, own: Mapping[str, Tensor]) -> str:
    """Which block a module is on its own: the query and key of a pyramid block are one module, not equal ones."""
    for entry, key in target.keys.items():
        twin = target.keys.get(entry._replace(slot=entry.slot.replace("key.", "query.")))
        if twin is not None and own[twin] is not own[key]:
            return "fusion"
    return "pyramid"


def _left_over(weights: Mapping[Entry, _Weight], target: Layout, source: Layout) -> list[str]:
    """Keys of the file's head or block that the model has no place for; an auxiliary head is for training only."""
    outside = [(entry, weight.origin) for entry, weight in weights.items() if entry not in target.keys]
    left = [origin for entry, origin in outside if entry.place != "aux" and not _counts(origin)]
    inside = "" if target.block is None else block_prefix(source, target.block)
    return left + [key for key in source.unknown if key.startswith(inside)]


def _why_no_auxiliary(weights: Mapping[Entry, _Weight], target: Layout, own: Mapping[str, Tensor]) -> str | None:
    """Why the model's auxiliary head stays as it is; None if all of it can be loaded, or there is none."""
    for entry, key in target.keys.items():
        if entry.place == "aux":
            if entry not in weights:
                return "the file has no such auxiliary head"
            if weights[entry].tensor.shape != own[key].shape:
                return f"{weights[entry].origin} has {tuple(weights[entry].tensor.shape)}"
    return None


def to_dialect(state_dict: Mapping[str, Tensor], dialect: str) -> dict[str, Tensor]:
    """A block's or network's state dict under the names of another code base, ready for its ``load_state_dict``.

    Biases ahead of a batch norm are folded into its running mean for mmsegmentation, which has none, and are zero where
    they are made up. Keys of a whole head get the prefix that they have in a network's checkpoint (``decode_head.``,
    ``head.``). Keys outside, those of a backbone, stay as they are: backbones differ, and do not convert.

    Args:
        state_dict: of any dialect, this package's included; may be under ``state_dict`` or behind ``module.``.
        dialect: ``"mmseg"``, ``"mendelxu"`` or ``"paddleseg"``. For Paddle save ``{key: x.numpy()}`` of the result.

    Returns:
        New keys; tensors that did not change are shared.

    Raises:
        TypeError: an argument is not as described.
        ValueError: an unknown dialect, a state dict without block, two copies of a shared projection that disagree,
            or a block that the dialect cannot hold (mmsegmentation has one width for keys and values, no bias ahead of
            a norm without running mean, and like PaddleSeg no block without bottleneck).

    Example:
        >>> import annnet_kernels as ak
        >>> sorted(ak.to_dialect(ak.APNB(8, 8, 4, 4).state_dict(), "mmseg"))[:2]
        ['bottleneck.bn.bias', 'bottleneck.bn.num_batches_tracked']
    """
    checks.one_of("dialect", dialect, DIALECTS)
    state = state_dict_of(state_dict, "state_dict")
    if state is None:
        raise TypeError(f"state_dict: expected a state dict of tensors, got {type(state_dict).__name__}")
    source = _located(state, "state_dict")
    weights = _weights(source, state, source.block, "state_dict")
    _refuse_what_has_no_form(weights, dialect)
    wanted = {made for entry in weights for made in (entry, *_companions(entry)) if _has(dialect, made)}
    _fit(weights, wanted, "state_dict")
    for entry, (origin, _) in weights.items():
        if entry not in wanted and not _counts(origin):
            raise ValueError(f"state_dict: {origin} has no place in {dialect}, nor a running mean to be folded into")
    converted = {key: state[key] for key in (*source.rest, *source.unknown)}
    for entry, weight in weights.items():
        if entry in wanted:
            if source.block is None:
                converted[source.root + key_in_network(dialect, entry)] = weight.tensor
            else:
                converted[source.prefix + key_in_block(dialect, entry)] = weight.tensor
    return converted


def head_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of :class:`ANNNet` that a checkpoint's shapes tell.

    Raises:
        ValueError: it holds no whole head, or lacks a key that tells a width.
    """
    layout = _located(state, "path")
    if layout.block is not None:
        raise ValueError("path: expected the weights of a whole head, got those of a single block")

    def shape(place: str, slot: str) -> torch.Size:
        key = layout.key_of(Entry(place, slot, "weight"))
        if key not in state:
            raise ValueError(f"path: the file has no {key}")
        return state[key].shape

    num_classes, channels = shape("head", "cls")[:2]
    auxiliary = state.get(layout.key_of(Entry("aux", "aux.conv", "weight")))
    return {
        "num_classes": num_classes,
        "backbone": "resnet101" if any("layer3.22." in key for key in layout.rest) else "resnet50",
        "aux": auxiliary is not None and len(auxiliary) == channels,
        "channels": channels,
        "key_channels": shape("fusion", "query.conv")[0],
        "value_channels": shape("fusion", "value")[0],
    }


class _Weight(NamedTuple):
    """A tensor of a file, with its key there or how it was made."""

    origin: str
    tensor: Tensor


def _located(state: Mapping[str, Tensor], argument: str, block: str | None = None) -> Layout:
    try:
        return locate(state, block)
    except ValueError as error:
        raise ValueError(f"{argument}: expected one block or a whole head, got {error}") from None


def _weights(source: Layout, state: Mapping[str, Tensor], block: str | None, argument: str) -> dict[Entry, _Weight]:
    """The weights of a whole head or of one block; the shared projection of a pyramid block under both its names."""
    weights = {e: _Weight(key, state[key]) for e, key in source.keys.items() if block in (None, e.place)}
    for entry, (origin, tensor) in list(weights.items()):
        if entry.place == "pyramid" and entry.slot in ("key.conv", "key.norm", "query.conv", "query.norm"):
            role, _, part = entry.slot.partition(".")
            twin = weights.setdefault(
                entry._replace(slot=f"{'query' if role == 'key' else 'key'}.{part}"), _Weight(origin, tensor)
            )
            if twin.tensor.shape != tensor.shape or not torch.equal(twin.tensor, tensor):
                names = " and ".join(sorted((origin, twin.origin)))
                raise ValueError(f"{argument}: {names} differ, but a pyramid block has one projection for both")
    return weights


def _fit(weights: dict[Entry, _Weight], wanted: Collection[Entry], argument: str) -> dict[Entry, Entry]:
    """Give convolutions ahead of norms the biases that are wanted, in place, and norms their counters.

    Returns:
        The entry of every bias that went into a running mean, with the entry of that.
    """
    folded = {}
    for place in dict.fromkeys(entry.place for entry in weights):
        for conv, norm in CONV_NORM_PAIRS:
            weight, bias = Entry(place, conv, "weight"), Entry(place, conv, "bias")
            mean, counter = Entry(place, norm, "running_mean"), Entry(place, norm, "num_batches_tracked")
            if bias in weights and bias not in wanted and mean in weights:
                (origin, shift), (mean_origin, value) = weights.pop(bias), weights[mean]
                if shift.shape != value.shape:
                    expected, got = tuple(value.shape), tuple(shift.shape)
                    raise ValueError(f"{argument}: {origin} has {got}, expected {expected}")
                weights[mean] = _Weight(mean_origin, value - shift.to(value.dtype))
                folded[bias] = mean
            if bias in wanted and bias not in weights and weight in weights:
                tensor = weights[weight].tensor
                weights[bias] = _Weight("zero: the file has no bias ahead of a norm", tensor.new_zeros(len(tensor)))
            if counter in wanted and counter not in weights and mean in weights:
                weights[counter] = _Weight("zero: the file counts no batches", torch.tensor(0))
    return folded


_AHEAD_OF_NORMS = tuple(conv for conv, _ in CONV_NORM_PAIRS)


def _companions(entry: Entry) -> Iterator[Entry]:
    """What other dialects store beside an entry."""
    if entry.slot in _AHEAD_OF_NORMS and entry.tensor == "weight":
        yield entry._replace(tensor="bias")
    if entry.tensor == "running_mean":
        yield entry._replace(tensor="num_batches_tracked")


def _has(dialect: str, entry: Entry) -> bool:
    """Whether a dialect stores such an entry."""
    if entry.tensor == "bias" and entry.slot in _AHEAD_OF_NORMS:
        return dialect != "mmseg"
    return entry.tensor != "num_batches_tracked" or dialect != "paddleseg"


def _refuse_what_has_no_form(weights: Mapping[Entry, _Weight], dialect: str) -> None:
    """Raise ValueError for a block that ``dialect`` cannot hold."""
    for place in ("fusion", "pyramid"):
        key, value, join = (weights.get(Entry(place, slot, "weight")) for slot in ("key.conv", "value", "join"))
        if value is not None and join is None and dialect != "mendelxu":
            raise ValueError(f"state_dict: the {place} block has no bottleneck; {dialect} has no such block")
        if dialect == "mmseg" and key is not None and value is not None and len(key.tensor) != len(value.tensor):
            widths = f"{len(key.tensor)} and {len(value.tensor)}"
            raise ValueError(f"state_dict: mmseg has one width for keys and values, the {place} block has {widths}")


def _surroundings(
    target: Layout, source: Layout, own: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> dict[str, str]:
    """The model's keys around the head with the file's, if all of them are there with their shapes; else none."""
    pairs = {}
    for mine in target.rest:
        relative = mine.removeprefix(
            target.root
        )  # the root is a wrapper's, or the head's own and the backbone is beside it
        names = (source.root + relative, relative, mine)
        key = next((key for key in (*names, *map(unwrapped, names)) if key in state), None)
        if key is not None and state[key].shape == own[mine].shape:
            pairs[mine] = key
        elif not _counts(mine):
            return {}
    return pairs


def _alike(target: Layout, source: Layout, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, str]:
    """What model and file have in the head beyond any dialect, such as the slope of a PReLU, where names are equal."""
    theirs = {key.removeprefix(source.prefix): key for key in source.unknown}
    pairs = {mine: theirs.get(mine.removeprefix(target.prefix), "") for mine in target.unknown}
    return {mine: key for mine, key in pairs.items() if key and state[key].shape == own[mine].shape}


def _counts(key: str) -> bool:
    return key.endswith("num_batches_tracked")


def _listed(items: Iterable[str], separator: str = ", ") -> str:
    """The first few items, and how many there are beside."""
    items = list(items)
    more = [f"and {len(items) - _SHOWN} more"] if len(items) > _SHOWN else []
    return separator.join(items[:_SHOWN] + more)
