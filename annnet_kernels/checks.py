"""Every error that a user's arguments can cause, raised once, at the public door.

A message names the argument, what was expected and what came. The functions return the argument in canonical form.
While ``torch.jit`` traces, sizes are tensors that stand for any later size, and are not asked about.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real

import torch

from .runtime.autocast import autocast_dtype
from .runtime.tracers import jit_tracing

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


_LONGEST = 80


def shown(value: object) -> str:
    """A value as a message shows it: no whole dictionary, no whole tensor."""
    if isinstance(value, (Mapping, torch.Tensor)):
        return f"a {type(value).__name__} of {len(value) if isinstance(value, Mapping) else tuple(value.shape)}"
    text = repr(value).replace("\n", " ")
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _shape(x: torch.Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def tensor(name: str, value: object) -> torch.Tensor:
    """A tensor of a floating-point type that the operators support."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected dtype float32, float64, bfloat16 or float16, got {value.dtype}")
    return value


def feature_map(name: str, value: object, channels: int | None = None) -> torch.Tensor:
    """A (B, C, H, W) map with at least one channel, row and column; the batch may be empty."""
    x = tensor(name, value)
    if x.dim() != 4:
        raise ValueError(f"{name}: expected a feature map of shape (B, C, H, W), got shape {_shape(x)}")
    if jit_tracing():
        return x
    if x.shape[1] == 0 or x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"{name}: expected at least one channel, row and column, got shape {_shape(x)}")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{name}: expected {channels} channels, got {x.shape[1]} in shape {_shape(x)}")
    return x


def tokens(name: str, value: object, batch: int, channels: int | None, count: int | None) -> torch.Tensor:
    """A (B, C, T) tensor of at least one token, with the batch, channels and count it must have."""
    x = tensor(name, value)
    if x.dim() != 3:
        raise ValueError(f"{name}: expected tokens of shape (B, C, T), got shape {_shape(x)}")
    if jit_tracing():
        return x
    if x.shape[1] == 0 or x.shape[2] == 0:
        raise ValueError(f"{name}: expected at least one channel and one token, got shape {_shape(x)}")
    if x.shape[0] != batch:
        raise ValueError(f"{name}: expected the batch of query, {batch}, got {x.shape[0]} in shape {_shape(x)}")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"{name}: expected the channels of query, {channels}, got {x.shape[1]} in shape {_shape(x)}")
    if count is not None and x.shape[2] != count:
        raise ValueError(f"{name}: expected the tokens of key, {count}, got {x.shape[2]} in shape {_shape(x)}")
    return x


def same_kind(name: str, x: torch.Tensor, other_name: str, other: torch.Tensor) -> None:
    """Both on one device and of one dtype."""
    if x.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {x.device}")
    if x.dtype != other.dtype:
        raise TypeError(f"{name}: expected the dtype of {other_name}, {other.dtype}, got {x.dtype}")


def positive_int(name: str, value: object) -> int:
    """An integer of at least 1 (a bool is none)."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a positive integer, got {shown(value)} of type {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {int(value)}")
    return int(value)


def output_sizes(name: str, value: object) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Heights and widths of the levels; each level is an integer or an (h, w) pair."""
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected a sequence of pool sizes, such as (1, 3, 6, 8), got {shown(value)}")
    heights, widths = [], []
    for index, size in enumerate(value):
        label = f"{name}[{index}]"
        if isinstance(size, (tuple, list)):
            if len(size) != 2:
                raise ValueError(f"{label}: expected an integer or a pair (h, w), got {shown(size)}")
            height, width = size
        else:
            height = width = size
        heights.append(positive_int(label, height))
        widths.append(positive_int(label, width))
    if not heights:
        raise ValueError(f"{name}: expected at least one pool size, got {shown(value)}")
    return tuple(heights), tuple(widths)


def map_size(name: str, value: object) -> tuple[int, int]:
    """A pair (H, W)."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name}: expected a pair (H, W), got {shown(value)}")
    if len(value) != 2:
        raise ValueError(f"{name}: expected a pair (H, W), got {shown(value)}")
    return positive_int(f"{name}[0]", value[0]), positive_int(f"{name}[1]", value[1])


def scale(name: str, value: object) -> float:
    """A finite real number."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a real number or None, got {shown(value)} of type {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name}: expected a finite number, got {shown(value)}")
    return float(value)


def block_options(dropout: object, sizes: object, norm_layer: object) -> None:
    """The options that every block shares."""
    if not isinstance(dropout, (int, float)) or isinstance(dropout, bool):
        raise TypeError(
            f"dropout: expected a probability from 0 to 1, got {shown(dropout)} of type {type(dropout).__name__}"
        )
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout: expected a probability from 0 to 1, got {shown(dropout)}")
    if not isinstance(sizes, (tuple, list)) or tuple(sizes) != (1,):
        raise ValueError(
            f"sizes: expected (1,), got {shown(sizes)}; "
            f"other query scales crash or are ignored in every published code base"
        )
    if not callable(norm_layer):
        raise TypeError(f"norm_layer: expected a callable that takes a channel count, got {shown(norm_layer)}")


def module(name: str, value: object) -> torch.nn.Module:
    """A torch.nn.Module instance."""
    if isinstance(value, type) or not isinstance(value, torch.nn.Module):
        got = f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
        raise TypeError(f"{name}: expected an instance of torch.nn.Module, got {got}")
    return value


def block_inputs(**inputs: tuple[object, torch.nn.Conv2d]) -> None:
    """The maps that a block is called with, each with the convolution that reads it."""
    batch: tuple[str, int] | None = None
    for name, (value, conv) in inputs.items():
        x = feature_map(name, value, channels=conv.in_channels)
        weight = _unread_weight(conv)
        if x.device != weight.device:
            raise ValueError(f"{name}: expected the device of the block's parameters, {weight.device}, got {x.device}")
        if x.dtype != weight.dtype and autocast_dtype(x) is None:
            raise TypeError(f"{name}: expected the dtype of the block's parameters, {weight.dtype}, got {x.dtype}")
        if batch is not None and not jit_tracing() and x.shape[0] != batch[1]:
            raise ValueError(f"{name}: expected the batch of {batch[0]}, {batch[1]}, got {x.shape[0]}")
        batch = name, x.shape[0]


def _unread_weight(conv: torch.nn.Conv2d) -> torch.Tensor:
    """The weight, or what a parametrization makes it of: reading the weight would run that.

    A replica of ``torch.nn.DataParallel`` has no parameters; its weight is an ordinary attribute.
    """
    weight = conv._parameters.get("weight")
    weight = next(conv.parameters(), None) if weight is None else weight
    return conv.weight if weight is None else weight


def one_of(name: str, value: object, choices: tuple[str, ...]) -> str:
    """One of a few names."""
    if not isinstance(value, str):
        raise TypeError(
            f"{name}: expected one of {', '.join(choices)}, got {shown(value)} of type {type(value).__name__}"
        )
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {shown(value)}")
    return value


def stage_channels(name: str, backbone: torch.nn.Module) -> tuple[int, int]:
    """Channel counts of the last two stages, from the attribute ``channels`` of a backbone."""
    channels = getattr(backbone, "channels", None)
    if not isinstance(channels, (tuple, list)) or len(channels) != 2:
        raise ValueError(f"{name}: expected an attribute channels = (low, high), got {shown(channels)}")
    low, high = (positive_int(f"{name}.channels[{i}]", count) for i, count in enumerate(channels))
    return low, high


LABEL_DTYPES = (torch.int64, torch.int32, torch.uint8)


def labels(name: str, value: object, logits: torch.Tensor) -> torch.Tensor:
    """A (B, H, W) tensor of class indices, on the device of the logits (B, K, h, w)."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.is_floating_point():
        raise TypeError(
            f"{name}: expected class indices, int64, int32 or uint8, got {value.dtype}; class probabilities are "
            f"refused, because they are as large as the upsampled logits that this function does without"
        )
    if value.dtype not in LABEL_DTYPES:
        raise TypeError(f"{name}: expected dtype int64, int32 or uint8, got {value.dtype}")
    if value.dim() != 3:
        raise ValueError(f"{name}: expected class indices of shape (B, H, W), got shape {_shape(value)}")
    if value.device != logits.device:
        raise ValueError(f"{name}: expected the device of logits, {logits.device}, got {value.device}")
    if jit_tracing():
        return value
    if value.shape[0] != logits.shape[0]:
        raise ValueError(f"{name}: expected the batch of logits, {logits.shape[0]}, got shape {_shape(value)}")
    if value.shape[1] == 0 or value.shape[2] == 0:
        raise ValueError(f"{name}: expected at least one row and column, got shape {_shape(value)}")
    return value


def class_weights(name: str, value: object, logits: torch.Tensor) -> torch.Tensor:
    """One weight per class, in the dtype in which the logits (B, K, h, w) are summed."""
    weight = tensor(name, value)
    accumulator = torch.promote_types(logits.dtype, torch.float32)
    if weight.dtype not in (logits.dtype, accumulator):
        raise TypeError(f"{name}: expected dtype {accumulator} or that of logits, {logits.dtype}, got {weight.dtype}")
    if weight.dim() != 1 or (not jit_tracing() and weight.shape[0] != logits.shape[1]):
        raise ValueError(f"{name}: expected one weight per class, ({logits.shape[1]},), got shape {_shape(weight)}")
    if weight.device != logits.device:
        raise ValueError(f"{name}: expected the device of logits, {logits.device}, got {weight.device}")
    return weight.to(accumulator)


def integer(name: str, value: object) -> int:
    """An integer (a bool is none)."""
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected an integer, got {value!r} of type {type(value).__name__}")
    return int(value)


def fraction(name: str, value: object) -> float:
    """A real number from 0 to 1."""
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}: expected a number from 0 to 1, got {value!r} of type {type(value).__name__}")
    if not 0 <= float(value) <= 1:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
    return float(value)


def flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {value!r} of type {type(value).__name__}")
    return value


def pixel_size(name: str, value: object) -> tuple[int, int]:
    """A pair (H, W) of positive integers; while a tracer lets sizes vary, of what stands for them."""
    if isinstance(value, (tuple, list)) and len(value) == 2:
        traced = [
            isinstance(length, torch.SymInt) or (jit_tracing() and isinstance(length, torch.Tensor)) for length in value
        ]
        height, width = (
            length if free else positive_int(f"{name}[{i}]", length)
            for i, (length, free) in enumerate(zip(value, traced, strict=True))
        )
        return height, width
    return map_size(name, value)
