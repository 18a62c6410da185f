"""Where the modules of one block are: found once, then followed at every call.

People nest convolution, norm and activation as they like, and leave some of them out. :func:`structure_of` finds them
in a block of some dialect, whatever the nesting. What it finds is a :class:`Structure`, which reads the modules again
at every call of the block and notices what somebody has exchanged since.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..runtime.tracers import exporting
from .collapse import Parts, Projection

Path = tuple[str, ...]

LENGTH = "__len__"
"""As the attribute of a setting: how many modules the owner holds."""

NOTHING = nn.Identity().eval()
"""Stands for a norm or an activation that a block does not have."""


class OddStructure(Exception):
    """A block is not built as its structure says; the message names what differs."""


class Setting(NamedTuple):
    """An attribute that the published forward reads, at the module ``owner``, and the only value that is supported."""

    owner: Path
    attribute: str
    supported: object


@dataclass(frozen=True)
class Structure:
    """The places of a block's modules, as paths below the block.

    A projection is the places of its convolution, norm and activation; None where there is none. Hashable and
    picklable.
    """

    key: tuple[Path, Path | None, Path | None]
    query: tuple[Path, Path | None, Path | None]
    value: Path
    out: Path
    join: Path | None
    tail: tuple[Path, ...]
    pools: Path
    containers: tuple[tuple[Path, type[nn.Module]], ...]
    """Modules that only call others; the collapse does not call them, so each must keep its class."""
    settings: tuple[Setting, ...] = ()
    widths: tuple[tuple[Path, str, Path], ...] = ()
    """Attributes (owner, name) that say how many channels a convolution puts out, and where that convolution is."""
    known: tuple[type[nn.Module], ...] = ()
    """The classes that the projections hold where a block is found and compared."""

    _steps: tuple[tuple[int, str, type[nn.Module] | None], ...] = field(init=False, repr=False, compare=False)
    _places: Mapping[str, tuple[int, ...]] = field(init=False, repr=False, compare=False)
    """Where in the list of modules that the steps make the parts are; 0, the block itself, stands for none."""

    def __post_init__(self) -> None:
        """Every module below the block is one step away from another: parent, name, and the class it must have."""
        kinds = dict(self.containers)
        owners = [owner for owner, _, _ in self.settings]
        owners += [owner for owner, _, _ in self.widths]
        paths = [self.value, self.out, self.pools, *self.tail, *kinds, *owners, *self.key, *self.query, self.join]
        known = {path[:end] for path in paths if path for end in range(1, len(path) + 1)}
        every = [(), *sorted(known, key=lambda path: (len(path), path))]
        at: dict[Path | None, int] = {None: 0} | {path: index for index, path in enumerate(every)}
        places: dict[str, tuple[Path | None, ...]] = {
            "key": self.key,
            "query": self.query,
            "single": (self.value, self.out, self.join, self.pools),
            "tail": self.tail,
            "optional": tuple(path for path in self.tail if kinds.get(path[:-1]) is nn.Sequential),
            "containers": tuple(kinds),
            "settings": tuple(owner for owner, _, _ in self.settings),
            "owners": tuple(owner for owner, _, _ in self.widths),
            "fitting": tuple(conv for _, _, conv in self.widths),
        }
        object.__setattr__(self, "_places", {name: tuple(at[path] for path in some) for name, some in places.items()})
        object.__setattr__(self, "_steps", tuple((at[path[:-1]], path[-1], kinds.get(path)) for path in every[1:]))

    def __reduce__(self) -> tuple[Any, ...]:
        fields = self.key, self.query, self.value, self.out, self.join, self.tail, self.pools
        return Structure, (*fields, self.containers, self.settings, self.widths, self.known)

    def parts(self, block: nn.Module) -> Parts:
        """The modules of ``block``; raises OddStructure if they are not where they were."""
        if exporting():
            block = _itself(block)
        found: list[Any] = [block]
        for parent, name, kind in self._steps:
            child = found[parent]._modules.get(name)
            if child is None and len(found) not in self._places["optional"]:
                raise OddStructure(f"{type(found[parent]).__name__} without a module {name!r}")
            if kind is not None and type(child) is not kind:
                raise OddStructure(f"{type(child).__name__} in the place of {kind.__name__}")
            found.append(child)
        places = self._places
        for index, setting in zip(places["settings"], self.settings, strict=True):
            if setting.attribute == LENGTH:
                if len(found[index]) != setting.supported:
                    raise OddStructure(
                        f"{len(found[index])} stages (query_scales or sizes): only one, of scale 1, is supported"
                    )
                continue
            value = getattr(found[index], setting.attribute, None)
            if isinstance(value, Tensor) or value != setting.supported:
                path = ".".join((*setting.owner, setting.attribute))
                raise OddStructure(f"{path} is {value}, supported is {setting.supported}")
        value, out, join, pools = places["single"]
        containers = [found[index] for index in places["containers"]]
        levels = []
        for level in found[pools]._modules.values():
            wrapped = type(level) is nn.Sequential and len(level) == 1
            levels.append(level[0] if wrapped else level)
            if wrapped:
                containers.append(level)
        query = _projection(found, places["query"])
        key = _projection(found, places["key"])
        key = query if key.conv is query.conv else key
        tail = [found[index] for index in places["tail"] if found[index] is not None]
        convolutions = key.conv, query.conv, found[value], found[out], found[join] if join else None
        return Parts(
            key=key,
            query=query,
            value=found[value],
            out=found[out],
            join=convolutions[-1],
            tail=tail,
            pools=levels,
            containers=containers,
            widths=[
                (attribute, getattr(found[owner], attribute, None), found[conv])
                for (_, attribute, _), owner, conv in zip(self.widths, places["owners"], places["fitting"], strict=True)
            ],
            known=self.known,
            skipped=[
                *[(nn.Conv2d, conv) for conv in convolutions if conv is not None],
                *[(nn.AdaptiveAvgPool2d, level) for level in levels],
                *[(None, module) for module in (*key[1:], *query[1:], *containers, *tail)],
            ],
        )


def _projection(found: Sequence[Any], places: Sequence[int]) -> Projection:
    conv, norm, activation = places
    return Projection(found[conv], found[norm] if norm else NOTHING, found[activation] if activation else NOTHING)


def path_of(name: str) -> Path:
    """``"a.b"`` as a path; the empty name is the block itself."""
    return tuple(name.split(".")) if name else ()


def _itself(module: nn.Module) -> nn.Module:
    """What ``torch.export`` put a stand-in for: under those, a shared projection would be two modules."""
    get_base = getattr(type(module), "get_base", None)
    return module if get_base is None else get_base(module)


def module_at(block: nn.Module, path: Path) -> nn.Module | None:
    """The submodule at ``path``, None if there is none."""
    module: nn.Module | None = block
    for name in path:
        module = None if module is None else module._modules.get(name)
    return module


class Places(NamedTuple):
    """Where a dialect has what a block is made of: the modules that hold its parts, in whatever nesting."""

    key: Path
    query: Path
    value: Path
    out: Path
    pools: Path
    bottleneck: Path | None
    settings: tuple[tuple[Path, str, object], ...]
    width: tuple[Path, str] | None


def structure_of(block: nn.Module, places: Places) -> Structure:
    """The structure of a block; raises OddStructure, naming what is there, if it holds other parts than expected."""
    containers: dict[Path, type[nn.Module]] = {}

    def leaves(path: Path) -> list[Path]:
        module = module_at(block, path)
        if module is None:
            return []
        if _is_leaf(module) and type(module) is not nn.Identity:
            return [path]
        containers[path] = type(module)
        return [leaf for name in module._modules for leaf in leaves((*path, name))]

    def in_order(path: Path) -> list[Path]:
        """The leaves as they are called: a class may define convolution, norm and activation in any order."""
        found = leaves(path)
        convs = [leaf for leaf in found if _is_conv(block, leaf)]
        if len(convs) != 1 or found[0] in convs or isinstance(module_at(block, convs[0][:-1]), nn.Sequential):
            return found
        width = getattr(module_at(block, convs[0]), "out_channels", None)
        norms = [leaf for leaf in found if getattr(module_at(block, leaf), "num_features", None) == width]
        return [*convs, *norms, *(leaf for leaf in found if leaf not in (*convs, *norms))]

    def described(paths: Sequence[Path]) -> str:
        return ", ".join(type(module_at(block, path)).__name__ for path in paths) or "nothing"

    def projection(path: Path) -> tuple[Path, Path | None, Path | None]:
        found = in_order(path)
        if (
            not 1 <= len(found) <= 3
            or not _is_conv(block, found[0])
            or any(_is_conv(block, leaf) for leaf in found[1:])
        ):
            expected = "a convolution, then at most a norm and an activation"
            raise OddStructure(f"{'.'.join(path)} holds {described(found)}; expected {expected}")
        conv, *rest = found
        if len(rest) == 1:
            norm = _is_norm(module_at(block, rest[0]))
            return (conv, rest[0], None) if norm else (conv, None, rest[0])
        return (conv, rest[0], rest[1]) if rest else (conv, None, None)

    def convolution(path: Path) -> Path:
        found = leaves(path)
        if len(found) != 1 or not _is_conv(block, found[0]):
            raise OddStructure(f"{'.'.join(path)} holds {described(found)}; expected one convolution")
        return found[0]

    key, query = projection(places.key), projection(places.query)
    value, out = convolution(places.value), convolution(places.out)
    join: Path | None = None
    tail: list[Path] = []
    if places.bottleneck is not None:
        found = in_order(places.bottleneck)
        if [_is_conv(block, leaf) for leaf in found] != [True, *(False for _ in found[1:])]:
            expected = "one convolution, then norm, activation and dropout"
            raise OddStructure(f"{'.'.join(places.bottleneck)} holds {described(found)}; expected {expected}")
        join, *tail = found
    parts = [path for path in (*key, *query, value, out, join, *tail) if path is not None]
    around = {path[:end] for path in (*parts, places.pools) for end in range(1, len(path))} | {places.pools}
    for path in around - {("stages",)}:
        module = module_at(block, path)
        assert module is not None
        containers.setdefault(path, type(module))
    called_twice = [module_at(block, path) for path in (*key[1:], *query[1:]) if path is not None]
    return Structure(
        key,
        query,
        value,
        out,
        join,
        tuple(tail),
        places.pools,
        tuple(sorted(containers.items(), key=lambda item: item[0])),
        tuple(_present(block, places.settings)),
        tuple(_widths(block, places, query[0])),
        tuple(dict.fromkeys(type(inner) for leaf in called_twice if leaf is not None for inner in leaf.modules())),
    )


def _present(block: nn.Module, settings: Sequence[tuple[Path, str, object]]) -> Iterator[Setting]:
    """The settings whose attributes the block has."""
    for owner, attribute, supported in settings:
        module = module_at(block, owner)
        if module is not None and hasattr(module, attribute):
            yield Setting(owner, attribute, supported)


def _widths(block: nn.Module, places: Places, query: Path) -> Iterator[tuple[Path, str, Path]]:
    """The attribute from which the published forward takes the softmax's scale, if it says what the query has."""
    if places.width is not None:
        owner, attribute = places.width
        conv = module_at(block, query)
        if getattr(module_at(block, owner), attribute, None) == getattr(conv, "out_channels", 0):
            yield owner, attribute, query


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module is one operation, and not one that calls others."""
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        return False
    return not module._modules or _is_library(module) or any(True for _ in module.parameters(recurse=False))


def _is_library(module: nn.Module) -> bool:
    return any(
        base.__module__.startswith("torch.nn.modules.") and base is not nn.Module for base in type(module).__mro__
    )


def _is_conv(block: nn.Module, path: Path) -> bool:
    return isinstance(module_at(block, path), nn.modules.conv._ConvNd)


def _is_norm(module: nn.Module | None) -> bool:
    """Whether a module that stands alone behind a convolution is its norm: it has parameters or statistics."""
    known = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LocalResponseNorm)
    if module is None or isinstance(module, known):
        return module is not None
    return not type(module).__module__.startswith("torch.nn.modules.activation") and any(
        True for tensors in (module.parameters(), module.buffers()) for _ in tensors
    )
