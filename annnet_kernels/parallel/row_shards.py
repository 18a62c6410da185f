"""Arithmetic of row shards: how the bands that several processes hold of one map make its tokens and its statistics.

A token is a mean over a rectangle, so the tokens of a map are the sum of what each band adds to them, weighted by the
area of the whole map's bins. A band is pooled by the operators that pool whole maps, with every row as a bin of its
own: S columns of bins become rows × S tokens. What is left, adding rows to the row bins that hold them, is done on
these few numbers. So batch norm and ReLU are still applied as a map is read, whatever implementation reads it, and a
non-finite pixel stays in its bins, which a product with a matrix of bins would not grant.

The price is 18 tokens per row and channel of the usual pyramid, written and read again: 18 / W of the map. An operator
that knew a row offset would save that, and would have to be written in Triton, C++, CUDA and PyTorch: much, for maps
that are worth splitting only because they are wide. (Triton compiles a pooling kernel per number of rows in a band.)

Sums over processes are float32 at least, and all that is known at one time goes in one message: see :func:`add_up`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..blocks.collapse import Parts, Projection
from ..blocks.forward import Linear, Read, project, shift_of
from ..blocks.normalization import (
    NO_SHIFT,
    FeatureMap,
    Shift,
    batch_norm,
    channel_scale,
    frozen_norm,
    refuse_one_value,
    shared_by,
    sums_of,
    uses_batch_statistics,
)
from ..layouts import is_channels_last
from ..ops.functions import apply
from ..ops.normalized import (
    Gradients,
    Levels,
    NormalizedAttention,
    Parameters,
    Share,
    present,
    skip_gradients,
)
from ..ops.registration import steps
from ..pyramid import bin_edges, num_tokens
from ..runtime.backends import requested_backend


class Band(NamedTuple):
    """Rows ``top`` to ``top + rows - 1`` of a map of ``height`` rows, and the pyramid of that whole map."""

    top: int
    rows: int
    height: int
    heights: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def row_sizes(self) -> tuple[list[int], list[int]]:
        """Pool sizes with which every row of the band is a row of bins."""
        return [self.rows] * len(self.widths), list(self.widths)

    def add_rows(self, lines: Tensor) -> Tensor:
        """What the band adds to the tokens, (B, T, C): ``lines`` (B, rows · ΣS, C) are its tokens of ``row_sizes``."""
        tokens = lines.new_zeros(len(lines), num_tokens(self.heights, self.widths), lines.shape[2])
        for token, line, width, length in self._meetings():
            tokens[:, token] = lines[:, line].unflatten(1, (-1, width)).sum(1) / length
        return tokens

    def spread(self, tokens: Tensor) -> Tensor:
        """The transpose of :meth:`add_rows`, (B, T, C) → (B, rows · ΣS, C)."""
        lines = tokens.new_zeros(len(tokens), self.rows * sum(self.widths), tokens.shape[2])
        for token, line, width, length in self._meetings():
            lines[:, line].unflatten(1, (-1, width)).add_((tokens[:, token] / length)[:, None])
        return lines

    def _meetings(self) -> Iterator[tuple[slice, slice, int, int]]:
        """Tokens of each row bin that meets the band, lines of the rows it meets, its column bins, its own rows."""
        first_token = first_line = 0
        for height, width in zip(self.heights, self.widths, strict=True):
            for i, (top, bottom) in enumerate(bin_edges(self.height, height)):
                start, stop = max(top - self.top, 0), min(bottom - self.top, self.rows)
                if start < stop:
                    token, line = first_token + i * width, first_line + start * width
                    yield (
                        slice(token, token + width),
                        slice(line, line + (stop - start) * width),
                        width,
                        bottom - top,
                    )
            first_token += height * width
            first_line += self.rows * width


def add_up(tensors: Sequence[Tensor], groups: Sequence[Any]) -> list[Tensor]:
    """Each tensor summed over the processes of its group (None: as it is); one message per group, one dtype each."""
    sums = list(tensors)
    for group in dict.fromkeys(groups):
        mine = [i for i, other in enumerate(groups) if other is group and tensors[i].numel()]
        if group is None or not mine:
            continue
        message = torch.cat([tensors[i].flatten() for i in mine])
        dist.all_reduce(message, group=group)
        parts = message.split([tensors[i].numel() for i in mine])
        for i, part in zip(mine, parts, strict=True):
            sums[i] = part.view(tensors[i].shape)
    return sums


class Reading(NamedTuple):
    """A batch norm and the raw map it is about to read: the arguments of ``norm_of``."""

    norm: Any
    y: Tensor
    shift: Shift = NO_SHIFT
    calls: int = 1


def with_norms(readings: Sequence[Reading], group: Any) -> list[FeatureMap]:
    """As ``norm_of``, for maps of which every process of ``group`` holds a band; what they add up is one message.

    A SyncBatchNorm in training asks its own processes, which those of ``group`` are among.
    """
    groups: list[Any] = []
    local: list[Tensor] = []
    for norm, y, _, _ in readings:
        batch = uses_batch_statistics(norm)
        own = shared_by(norm) if batch else None
        groups.append(own if own is not None or not batch or y.shape[0] == 0 else group)
        if batch:
            refuse_one_value(y, groups[-1])
        local.append(torch.empty(0) if groups[-1] is None else sums_of(y))
    with torch.no_grad():
        totals = add_up(local, groups)
    maps = []
    for (norm, y, shift, calls), total, shared in zip(readings, totals, groups, strict=True):
        if uses_batch_statistics(norm):
            sums = None if shared is None else total
            maps.append(FeatureMap(y, batch_norm(norm, y, sums, shift, calls, shared)))
        else:
            maps.append(FeatureMap(y, frozen_norm(norm, y, shift)))
    return maps


class ShardedTokens(torch.autograd.Function):
    """Tokens of ``low``, tokens of the rectified key map, and the query map; both maps raw, each with its norm.

    low (B, C_l, rows, W), key map (B, C_k, rows, W), query map (B, C_k, rows', W') or None, if the key map serves for
    both → (B, C_l, T) float32 at least, (B, C_k, T), the query map as it came, and ``scale`` (B, C_o) of the group's
    first process. ``norms`` are the operands of the norms of both maps, of one where there is one; ``shares`` say with
    whom each map shares its statistics.

    What comes back for the query map is the gradient of the rectified one. So each raw map gets its own gradient in
    one pass over it, whoever reads it, and all that the processes have to add up for it takes two messages.
    """

    @staticmethod
    def forward(
        ctx: Any,
        low: Tensor,
        key_y: Tensor,
        query_y: Tensor | None,
        scale: Tensor | None,
        shares: Sequence[Share],
        band: Band,
        group: Any,
        backend: str | None,
        *norms: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        ctx.constants = shares, band, group, backend
        groups_of_four = [norms[i : i + 4] for i in range(0, len(norms), 4)]
        ctx.parameters = [Parameters.of(weight, bias, (shift,)) for _, weight, bias, shift in groups_of_four]
        ctx.save_for_backward(low, key_y, query_y, *norms[::4])
        sizes = band.row_sizes
        lines = steps.pyramid_pool(low, None, *sizes), steps.pyramid_pool(key_y, norms[0], *sizes)
        wide = torch.promote_types(torch.promote_types(low.dtype, key_y.dtype), torch.float32)
        tokens = band.add_rows(torch.cat([x.transpose(1, 2).to(wide) for x in lines], dim=2))
        message, groups = [tokens], [group]
        if scale is not None:
            message.append(scale.to(wide) * float(dist.get_rank(group) == 0))
            groups.append(group)
        tokens, *first = add_up(message, groups)
        ctx.mark_non_differentiable(*first)
        low_tokens, keys = (x.contiguous().transpose(1, 2) for x in tokens.split([low.shape[1], key_y.shape[1]], dim=2))
        query = key_y if query_y is None else query_y
        return low_tokens, keys.to(key_y.dtype), query.view_as(query), first[0] if first else None

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_low: Tensor, grad_keys: Tensor, grad_query: Tensor, *_: Any) -> Gradients:
        shares, band, group, backend = ctx.constants
        low, key_y, query_y, *tables = ctx.saved_tensors
        sizes = band.row_sizes
        tokens = torch.cat([x.transpose(1, 2).to(grad_low.dtype) for x in (grad_low, grad_keys)], dim=2)
        lines = band.spread(*add_up([tokens], [group]))
        low_lines, key_lines = (x.transpose(1, 2) for x in lines.split([low.shape[1], key_y.shape[1]], dim=2))
        dlow = None
        if ctx.needs_input_grad[0]:
            dlow = steps.pyramid_pool_bwd(
                low_lines.to(low.dtype), None, low.shape[2:], *sizes, is_channels_last(low), backend
            )
        readers = [(key_y, tables[0], key_lines.to(key_y.dtype), grad_query if query_y is None else None)]
        if query_y is not None:
            readers.append((query_y, tables[1], None, grad_query))
        sums = [steps.bn_relu_bwd_sums(*reader, *sizes, backend) for reader in readers]
        totals = add_up(sums, [share.group for share in shares])
        dys, dnorms = [], []
        for i, (reader, share) in enumerate(zip(readers, shares, strict=True)):
            of_batch = Share(share.samples, None).of_batch(totals[i])
            dys.append(steps.bn_relu_bwd_input(*reader, *of_batch, *sizes, backend))
            parameters = ctx.parameters[i]
            dnorms += [None, *parameters.gradients(sums[i]), *parameters.zeros(sums[i])]
        dquery = dys[1] if query_y is not None else None
        return dlow, dys[0], dquery, *(None,) * 5, *dnorms  # scale, shares, band, group, backend


class RectifiedAttention(NormalizedAttention):
    """Attention whose gradient of y is that of the rectified query, for :class:`ShardedTokens` to carry on."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> Gradients:
        y, table, key, value, logsumexp = ctx.saved_tensors
        grad = present(grad, y, value)
        needs = [ctx.needs_input_grad[i] for i in (0, 4, 5)]
        gradients = steps.asymmetric_attention_bwd(
            grad, y, table, key, value, logsumexp, y.shape[1] ** -0.5, needs, ctx.constants[-1]
        )
        dz, dkey, dvalue = (g if needed else None for g, needed in zip(gradients, needs, strict=True))
        # table, weight, bias; share, levels, backend, cancelled
        return dz, *(None,) * 3, dkey, dvalue, *skip_gradients(grad, ctx.needs_input_grad[6:8]), *(None,) * 4


class Rows(NamedTuple):
    """A process holds a band of rows of every map: a ``Cut`` for ``block_forward``."""

    band: Band
    group: Any

    def read(self, parts: Parts, linear: Linear, low: Tensor, high: Tensor) -> Read:
        """As of whole maps; tokens, keys and the first process's draw of the dropout come in one message."""
        shared = parts.is_shared()
        raw = project(parts, linear.skip_weight, low, high, None)
        readings = [_reading(parts.query, raw.query, linear, calls=2 if shared else 1)]
        if not shared:
            readings.insert(0, _reading(parts.key, raw.key, linear, calls=1))
        maps = with_norms(readings, self.group)
        norms = [map.norm for map in maps if map.norm is not None]
        dropout = next((m for m in parts.tail if type(m) is nn.Dropout2d), None)
        tokens, keys, query, scale = ShardedTokens.apply(
            low,
            maps[0].data,
            None if shared else maps[1].data,
            channel_scale(dropout, maps[-1].data, parts.out.out_channels),
            [norm.share for norm in norms],
            self.band,
            self.group,
            requested_backend(),
            *(operand for norm in norms for operand in (norm.table, norm.weight, norm.bias, *norm.biases(1))),
        )
        return Read(tokens, keys, FeatureMap(query, norms[-1]), raw.skip, scale)

    def attend(self, read: Read, values: Tensor, constant: Tensor | None, parts: Parts) -> Tensor:
        """As for whole maps; the gradient of the rectified query goes to :class:`ShardedTokens`."""
        y, norm = read.query
        assert norm is not None
        out: Tensor
        addends = read.keys, values, read.skip, constant
        constants = Share(None, None), Levels([], []), requested_backend()
        out, _, _ = apply(RectifiedAttention, y, norm.table, norm.weight, norm.bias, *addends, *constants, None)
        return out

    def with_norm(self, norm: Any, y: Tensor, shift: Shift) -> FeatureMap:
        """``y`` with what ``norm`` does to the whole map."""
        (map,) = with_norms([Reading(norm, y, shift)], self.group)
        return map


def _reading(projection: Projection, y: Tensor | None, linear: Linear, calls: int) -> Reading:
    assert y is not None
    return Reading(projection.norm, y, shift_of(projection, linear), calls)
