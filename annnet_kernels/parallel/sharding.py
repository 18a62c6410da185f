"""Blocks on row shards: one map, too large for one device, spread by rows over the processes of a group.

Each process holds a band of neighbouring rows of every map, in the order of its rank; bands may differ in height, low-
and high-level maps too. Queries stay where they are. What a block knows of the whole map is small: statistics of its
batch norms and T pooled tokens, and these are added up over the group (:mod:`.row_shards`). So output,
gradients and running statistics are those of the unsplit block, and what is sent does not depend on the map's size.

A training step takes six messages, three forward (statistics of key and query; tokens of the low-level map and of the
keys; statistics of the tail) and three backward (gradients of the tokens; sums of key's and query's norms; sums of the
tail's). In evaluation it is one. :func:`traffic` counts them. Ahead of each forward the processes also tell each other
in a few integers what they hold, so that what does not fit raises everywhere instead of leaving others to wait.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import checks
from ..blocks.collapse import Parts
from ..blocks.folding import Foldable
from ..blocks.forward import Collapsed, block_forward
from ..blocks.normalization import FUSABLE_NORMS, uses_batch_statistics
from ..blocks.requirements import TO_COLLAPSE, why_not
from ..blocks.structures import OddStructure
from ..interop.recognition import names_of
from ..pyramid import num_tokens
from ..runtime.autocast import autocast_dtype
from .row_shards import Band, Rows

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Traffic", "shard_rows", "traffic", "unshard_rows"]

_Module = TypeVar("_Module", bound=nn.Module)


def shard_rows(module: _Module, group: ProcessGroup | DeviceMesh | None = None) -> _Module:
    """Make every AFNB and APNB of ``module`` take row shards of its maps, in place; :func:`unshard_rows` undoes it.

    Each process then calls a block with its own rows, (B, C, rows, W), and gets the output of its own rows; rank r of
    the group holds the rows that follow those of rank r − 1. Batch, width and dtype are alike everywhere, and each
    process holds at least one row of every map (``torch.tensor_split`` gives that, ``torch.chunk`` may not). Blocks
    keep their parameters, keys, hooks and identity; folds are not used, compiled code calls them uncompiled, and
    ``unshard_rows`` comes before ``restore_blocks``. The other modules of ``module`` are left as they are: a 3 × 3
    convolution needs rows of its neighbours, which is the caller's matter.

    **Parameter gradients** are each process's part; their sum over the group is the gradient of the unsplit block.
    With a loss that is summed over pixels (or divided by the all-reduced count of them), the sum over *all* processes
    of a (replicas × rows) mesh is the whole gradient: wrap the model in DDP over all of them and multiply the loss by
    their number, since DDP averages. Gradients of the maps are complete.

    **Statistics.** A BatchNorm2d in training normalises over the group's whole map, as unsplit, and leaves the same
    running statistics everywhere. A SyncBatchNorm asks its own processes, which all of the group's must be among.

    **Dropout2d** drops a channel of an image on all of its shards or on none: the draw of the group's first process
    counts (others draw too), and comes with the tokens.

    Args:
        module: a module that holds blocks of this package or replaced ones, or is one.
        group: a process group or a one-dimensional DeviceMesh (``mesh["rows"]``); None means all processes. On a GPU
            prefer one that also serves CPU tensors (``"cpu:gloo,cuda:nccl"``, PyTorch's default): with ``"nccl"``
            alone the integers ahead of each forward wait for the device.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no module instance, or ``group`` is none of the above.
        RuntimeError: there is no process group.
        ValueError: ``module`` holds no block, one that is sharded already, one that :func:`replace_blocks` has not
            replaced, or one that cannot be sharded, since its published forward or one of its own would run, or its
            norm is unknown; this process is not in ``group``; or the mesh has several dimensions.

    Example:
        >>> import torch, torch.distributed as dist, annnet_kernels as ak
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> block = ak.parallel.shard_rows(ak.APNB(64, 64, key_channels=32, value_channels=32))
        >>> block(torch.randn(1, 64, 20, 40)).shape
        torch.Size([1, 64, 20, 40])
        >>> dist.destroy_process_group()
    """
    checks.module("module", module)
    rows = _Rows(_process_group(group))
    blocks = []
    for name, block in module.named_modules():
        label = name or "the module"
        if isinstance(block, _RowSharded):
            raise ValueError(f"module: {label} is sharded already; unshard_rows first")
        if isinstance(block, Foldable):
            try:
                reason = _why_not(block.parts(), rows.group)
            except OddStructure as odd:
                reason = str(odd)
            if block.has_own_forward():
                reason = "a forward of its own"
            if reason is not None:
                raise ValueError(f"module: {label} cannot be sharded, because of {reason}")
            blocks.append(block)
        elif names_of(block) is not None:
            raise ValueError(f"module: {label} runs {type(block).__name__}'s own forward; replace_blocks first")
    if not blocks:
        raise ValueError(f"module: expected an AFNB or APNB, or a module that holds one, got {type(module).__name__}")
    for block in blocks:
        block.__class__ = _sharded_class(type(block))  # type: ignore[assignment]
        cast(_RowSharded, block)._rows = rows
    return module


def unshard_rows(module: _Module) -> _Module:
    """Undo :func:`shard_rows`, in place: every block takes whole maps again.

    Args:
        module: a module, or a sharded block itself.

    Returns:
        ``module``.

    Raises:
        TypeError: ``module`` is no module instance.
        ValueError: something else, such as ``fully_shard``, has changed a block's class since.
    """
    checks.module("module", module)
    blocks = [block for block in module.modules() if isinstance(block, _RowSharded)]
    for block in blocks:
        if type(block) is not _sharded_classes.get(type(block).unsharded):
            raise ValueError(f"module: {type(block).__name__} was wrapped after it was sharded; unwrap it first")
    for block in blocks:
        del block._rows
        block.__class__ = type(block).unsharded  # type: ignore[assignment]
    return module


class Traffic(NamedTuple):
    """What one call of a sharded block, or a step with it, puts into all-reduces: how many, and bytes altogether.

    A ring of R processes moves 2 (R − 1) / R times these bytes in and out of each.
    """

    messages: int
    bytes: int


def traffic(block: nn.Module, batch: int = 1, *, backward: bool = True) -> Traffic:
    """What ``block`` sends once it is sharded, in its present mode and dtype, for maps of any size.

    With a = 4 (8 in float64) bytes, n norms of batch statistics among key and query (an APNB has one) and T tokens:
    forward a·B·(T·(C_l + C_k) + C_o) for tokens and dropout, 8·n·(2·C_k + 1) and 8·(2·C_o + 1) for statistics;
    backward a·B·T·(C_l + C_k), a·n·2·C_k and a·2·C_o.

    Args:
        block: an AFNB or APNB of this package, or a replaced one.
        batch: B, images per map.
        backward: whether to count the backward pass too.

    Raises:
        TypeError, ValueError: ``block`` is no such block, or ``batch`` no positive integer.

    Example:
        >>> import annnet_kernels as ak
        >>> ak.parallel.traffic(ak.AFNB(1024, 2048, 2048, 256, 256))
        Traffic(messages=6, bytes=1196056)
        >>> ak.parallel.traffic(ak.APNB(512, 512, 256, 256))
        Traffic(messages=6, bytes=696336)
    """
    checks.module("block", block)
    if not isinstance(block, Foldable):
        raise ValueError(f"block: expected an AFNB or APNB, got {type(block).__name__}")
    batch = checks.positive_int("batch", batch)
    parts = block.parts()
    size = torch.promote_types(parts.value.weight.dtype, torch.float32).itemsize
    projections = {id(p.norm): p for p in (parts.key, parts.query)}.values()
    keys = [p.conv.out_channels for p in projections if uses_batch_statistics(p.norm)]
    tail = [parts.out.out_channels for norm in parts.tail[:1] if uses_batch_statistics(norm)]
    dropped = batch * parts.out.out_channels * _drops(parts)
    tokens = batch * num_tokens(*_pyramid(parts)) * (parts.value.in_channels + parts.key.conv.out_channels)
    forward = [size * (tokens + dropped)]
    forward += [8 * sum(2 * c + 1 for c in channels) for channels in (keys, tail) if channels]
    back = [size * tokens, *(size * 2 * sum(channels) for channels in (keys, tail) if channels)] if backward else []
    return Traffic(len(forward) + len(back), sum(forward) + sum(back))


def _process_group(group: Any) -> Any:
    """The process group meant; raises where there is none."""
    if not dist.is_available() or not dist.is_initialized():
        why = (
            "call torch.distributed.init_process_group" if dist.is_available() else "this PyTorch is built without any"
        )
        raise RuntimeError(f"group: there is no process group; {why}")
    if group is None:
        return dist.group.WORLD
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f'group: expected a one-dimensional mesh, such as mesh["rows"], got {group}')
        return group.get_group()
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: this process is not in it")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a ProcessGroup, a DeviceMesh or None, got {type(group).__name__}")
    return group


def _why_not(parts: Parts, group: Any) -> str | None:
    """Why a block cannot run on row shards; None if it can."""
    reason = why_not(parts, TO_COLLAPSE)
    if reason is not None:
        return reason
    norms = [parts.key.norm, parts.query.norm, *parts.tail[:1]]
    for norm in norms:
        if type(norm) not in FUSABLE_NORMS:
            return f"{type(norm).__name__} in the place of a batch norm"
    for projection in (parts.key, parts.query):
        if type(projection.activation) is not nn.ReLU:
            return f"{type(projection.activation).__name__} in the place of ReLU"
    kinds = [type(module) for module in parts.tail[1:]]
    if kinds not in ([], [nn.ReLU], [nn.Dropout2d], [nn.ReLU, nn.Dropout2d]):
        return f"a tail of {', '.join(kind.__name__ for kind in kinds)}"
    ranks = set(dist.get_process_group_ranks(group))
    for norm in norms:
        if isinstance(norm, nn.SyncBatchNorm):
            own = dist.group.WORLD if norm.process_group is None else norm.process_group
            if not ranks <= set(dist.get_process_group_ranks(own)):
                return "a SyncBatchNorm that leaves out processes of the group"
    return None


class _Rows:
    """The processes that hold the bands of one map. A copied block belongs to the same; no file can hold it."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, facts: list[int], device: torch.device) -> list[list[int]]:
        """These integers of every process. On the CPU where the group can: a GPU's queue need not be waited for."""
        if "cpu:" in dist.get_backend_config(self.group):
            device = torch.device("cpu")
        mine = torch.tensor(facts, device=device)
        found = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(found, mine, group=self.group)
        return [row.tolist() for row in found]

    def __deepcopy__(self, memo: Any) -> _Rows:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a row-sharded block belongs to a process group and is not pickled: save its state dict")


class _RowSharded(Foldable):
    """The forward of a sharded block; mixed in before the block's own class."""

    unsharded: type[nn.Module]
    _rows: _Rows

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        parts, maps, band = self._agree(args, kwargs)
        rows = Rows(band, self._rows.group)
        return block_forward(parts, Collapsed.of(parts), maps[0], maps[-1], rows, recompute=self.recompute)

    def _agree(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Parts, tuple[Tensor, ...], Band]:
        """The block's parts, the maps that it is called with, and which rows of the low-level one these are.

        Raises on every process if one of them cannot go on, or if they hold what does not fit together.
        """
        facts = dict.fromkeys(_FACTS, 0)
        error: Exception | None = None
        try:
            parts = self._present_parts()
            maps = self._maps(parts, args, kwargs)
            facts = _facts(self, parts, maps)
        except Exception as refusal:  # whatever it is: the others wait for this process
            error = refusal
        rows = self._rows
        found = rows.gather(list(facts.values()), next(self.parameters()).device)
        if error is not None:
            raise error
        held = {name: [process[i] for process in found] for i, name in enumerate(_FACTS)}
        if 0 in held["rows"]:
            raise RuntimeError(f"rank {held['rows'].index(0)} of the group cannot go on; its own error says why")
        for name, values in held.items():
            if name != "rows" and len(set(values)) > 1:
                raise ValueError(f"{name}: expected the same on all processes of the group, got {values}")
        band = Band(sum(held["rows"][: rows.rank]), facts["rows"], sum(held["rows"]), *_pyramid(parts))
        return parts, maps, band

    def _present_parts(self) -> Parts:
        """The block's parts; ValueError if they are not where they were."""
        try:
            return self.parts()
        except OddStructure as odd:
            raise ValueError(f"the block can no longer run on row shards, because of {odd}") from odd

    def _maps(self, parts: Parts, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
        own = getattr(type(self), "original", type(self).unsharded)
        arguments = inspect.signature(own.forward).bind(self, *args, **kwargs).arguments
        names = list(arguments)[1:]
        projections = (parts.query,) if parts.is_shared() else (parts.key, parts.query)
        if len(names) != len(projections):
            raise TypeError(f"expected {len(projections)} maps, got the arguments {', '.join(names)}")
        checks.block_inputs(**{name: (arguments[name], p.conv) for name, p in zip(names, projections, strict=True)})
        return tuple(arguments[name] for name in names)

    def current_fold(self) -> None:
        """None: a fold is of whole maps."""

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank {self._rows.rank} of {self._rows.size} row shards"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (type(self).unsharded,), nn.Module.__getstate__(self)


_FACTS = ("rows", "batch", "width", "width of the high-level map", "dtype", "autocast", "gradients", "mode")
"""What the processes tell each other ahead of a forward; 0 rows stand for an error."""


def _facts(block: nn.Module, parts: Parts, maps: tuple[Tensor, ...]) -> dict[str, int]:
    low, high = maps[0], maps[-1]
    reason = why_not(parts, TO_COLLAPSE)
    if reason is not None:
        raise ValueError(f"the block can no longer run on row shards, because of {reason}")
    autocast = autocast_dtype(low)
    recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (*maps, *block.parameters()))
    norms = [uses_batch_statistics(norm) for norm in (parts.key.norm, parts.query.norm, *parts.tail[:1])]
    values = (
        low.shape[2],
        low.shape[0],
        low.shape[3],
        high.shape[3],
        checks.FLOAT_DTYPES.index(low.dtype) * len(checks.FLOAT_DTYPES) + checks.FLOAT_DTYPES.index(high.dtype),
        0 if autocast is None else 1 + checks.FLOAT_DTYPES.index(autocast),
        int(recorded),
        sum(on << i for i, on in enumerate([*norms, _drops(parts)])),
    )
    return dict(zip(_FACTS, values, strict=True))


def _drops(parts: Parts) -> bool:
    """Whether the tail drops channels now, and so the draw is sent."""
    return any(isinstance(module, nn.Dropout2d) and module.training and module.p > 0 for module in parts.tail)


def _pyramid(parts: Parts) -> tuple[tuple[int, ...], tuple[int, ...]]:
    heights, widths = zip(*parts.pool_sizes(), strict=True)
    return heights, widths


_sharded_classes: dict[type[nn.Module], type[nn.Module]] = {}


def _sharded_class(unsharded: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``unsharded`` that takes row shards; made once, so that equal blocks have equal classes."""
    if unsharded not in _sharded_classes:
        members = {"unsharded": unsharded, "__module__": unsharded.__module__, "__doc__": unsharded.__doc__}
        _sharded_classes[unsharded] = type(unsharded.__name__, (_RowSharded, unsharded), members)
    return _sharded_classes[unsharded]


def _rebuild(unsharded: type[nn.Module]) -> nn.Module:
    """What deepcopy calls: an empty sharded block, whose state it sets."""
    sharded = _sharded_class(unsharded)
    block: nn.Module = sharded.__new__(sharded)
    return block
