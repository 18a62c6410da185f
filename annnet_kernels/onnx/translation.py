"""The operators of a program that ``torch.export`` made, in ONNX: the same forms as in ``graph.py``, for its exporter.

The functions have the operators' signatures and build the graph while they run. Imported on demand: needs onnxscript.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import ir, opset18

from .graph import bins, token_positions

Value = Any
op: Any = opset18


def pyramid_pool(x: Value, norm: Value | None, heights: Sequence[int], widths: Sequence[int]) -> Value:
    return op.CastLike(_pool(_finished(x, norm), heights, widths), x)


def asymmetric_attention(
    query: Value,
    norm: Value | None,
    key: Value,
    value: Value,
    skip: Value | None,
    constant: Value | None,
    scale: float,
    statistics: bool,
) -> tuple[Value, Value, Value]:
    out, logsumexp = _attend(_finished(query, norm), _wide(key), _wide(value), scale)
    out = out if skip is None else op.Add(out, _wide(skip))
    out = out if constant is None else op.Add(out, op.Unsqueeze(constant, _integers([1, 2])))
    assert not statistics, "blocks in training mode are not exported"
    nothing = op.Constant(value=ir.tensor([], dtype=ir.DataType.DOUBLE))
    return op.CastLike(out, query), logsumexp, nothing


def batch_norm_table(
    y: Value,
    mean: Value,
    var: Value,
    weight: Value | None,
    bias: Value | None,
    conv_bias: Value | None,
    eps: float,
) -> Value:
    like = _wide(y)
    mean, var = op.CastLike(mean, like), op.CastLike(var, like)
    mean = mean if conv_bias is None else op.Sub(mean, op.CastLike(conv_bias, like))
    epsilon = op.CastLike(op.Constant(value=ir.tensor(eps, dtype=ir.DataType.DOUBLE)), like)
    one = op.CastLike(_integers(1), like)
    weight = op.Expand(one, op.Shape(mean)) if weight is None else op.CastLike(weight, like)
    bias = op.Sub(mean, mean) if bias is None else op.CastLike(bias, like)
    invstd = op.Reciprocal(op.Sqrt(op.Add(var, epsilon)))
    return op.Concat(*(op.Unsqueeze(row, _integers([0])) for row in (mean, invstd, weight, bias)), axis=0)


def batch_norm_apply(y: Value, norm: Value, channel_scale: Value | None, relu: bool) -> Value:
    z = _normalised(y, norm)
    z = op.Relu(z) if relu else z
    if channel_scale is not None:
        z = op.Mul(z, op.Unsqueeze(channel_scale, _integers([2, 3])))
    return op.CastLike(z, y)


def upsampled_argmax(logits: Value, size: Sequence[Value], align_corners: bool) -> Value:
    shape = op.Concat(op.Shape(logits, start=0, end=2), *(_length(value) for value in size), axis=0)
    mode = "align_corners" if align_corners else "half_pixel"
    upsampled = op.Resize(_wide(logits), None, None, shape, mode="linear", coordinate_transformation_mode=mode)
    return op.ArgMax(upsampled, axis=1, keepdims=0)


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    getattr(torch.ops.annnet, function.__name__).default: function
    for function in (
        pyramid_pool,
        asymmetric_attention,
        batch_norm_table,
        batch_norm_apply,
        upsampled_argmax,
    )
}


def _wide(x: Value) -> Value:
    """In float32, or as it is in float64: what the operators compute in."""
    return x if x.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE) else op.Cast(x, to=ir.DataType.FLOAT.value)


def _length(value: Any) -> Value:
    """A size, which is an integer or, where it follows an input, a scalar of the graph, as a vector of one."""
    return _integers([value]) if isinstance(value, int) else op.Reshape(value, _integers([1]))


def _integers(values: Any) -> Value:
    return op.Constant(value=ir.tensor(values, dtype=ir.DataType.INT64))


def _finished(x: Value, norm: Value | None) -> Value:
    """What readers of a map see of it."""
    return _wide(x) if norm is None else op.Relu(_normalised(x, norm))


def _normalised(y: Value, norm: Value) -> Value:
    """As the node that runtimes merge with the convolution ahead of it."""
    mean, invstd, weight, bias = (op.Gather(norm, _integers(row), axis=0) for row in range(4))
    variance = op.Reciprocal(op.Mul(invstd, invstd))
    return op.BatchNormalization(_wide(y), weight, bias, mean, variance, epsilon=0.0)


def _pool(x: Value, heights: Sequence[int], widths: Sequence[int]) -> Value:
    rows, columns = _averages(x, 2, heights), _averages(x, 3, widths)
    levels = op.MatMul(rows, op.MatMul(x, op.Transpose(columns, perm=[1, 0])))
    pairs = op.Reshape(levels, _integers([0, 0, sum(heights) * sum(widths)]))
    return op.Gather(pairs, _integers(token_positions(heights, widths)), axis=2)


def _averages(x: Value, dim: int, sizes: Sequence[int]) -> Value:
    length = op.Squeeze(op.Shape(x, start=dim, end=dim + 1))
    numbers, counts = (_integers([[value] for value in values]) for values in bins(sizes))
    one = _integers(1)
    pixel = op.Range(_integers(0), length, one)
    starts = op.Less(op.Mul(pixel, counts), op.Mul(op.Add(numbers, one), length))
    ends = op.Greater(op.Mul(op.Add(pixel, one), counts), op.Mul(numbers, length))
    weights = op.CastLike(op.And(starts, ends), x)
    return op.Div(weights, op.ReduceSum(weights, _integers([1]), keepdims=1))


def _attend(query: Value, key: Value, value: Value, scale: float) -> tuple[Value, Value]:
    """(B, Cv, H, W), and the logsumexp (B, N), which no block reads and an optimizer drops."""
    pixels = op.Reshape(query, op.Concat(op.Shape(query, start=0, end=2), _integers([-1]), axis=0))
    factor = op.CastLike(op.Constant(value=ir.tensor(scale, dtype=ir.DataType.DOUBLE)), query)
    logits = op.MatMul(op.Transpose(op.Mul(key, factor), perm=[0, 2, 1]), pixels)
    out = op.MatMul(value, op.Softmax(logits, axis=1))
    shape = (op.Shape(query, start=0, end=1), op.Shape(value, start=1, end=2), op.Shape(query, start=2, end=4))
    return op.Reshape(out, op.Concat(*shape, axis=0)), op.ReduceLogSumExp(logits, _integers([1]), keepdims=0)
