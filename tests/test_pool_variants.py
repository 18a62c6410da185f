"""How many kernels the pooling compiles: counted by the keys under which Triton would keep them, without a GPU."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from annnet_kernels.layouts import empty_map, empty_tokens
from annnet_kernels.pyramid import POOL_SIZES, num_tokens
from annnet_kernels.runtime.backends import interpreting

if interpreting():
    pytest.skip("the interpreter replaces what Triton would compile", allow_module_level=True)
pytest.importorskip("triton")

from annnet_kernels.kernels import bn_relu_pool, pyramid_pool
from annnet_kernels.kernels.bn_relu_pool import Gradients
from annnet_kernels.kernels.launch import Device
from tools.compile_table.table import specialise

H100 = Device((9, 0), 132)
ARCH = 90
PER_DTYPE = {"forward": 5, "combine": 1, "backward": 12}
"""Layouts: channels_last and NCHW, each aligned and odd, and strided; gradients are token-major or not, and
those that are may be added."""


def keys(launches) -> set[str]:
    return {specialise(launch, ARCH)[2] for launch in launches}


def enumerated(module, dtype: torch.dtype) -> set[str]:
    name = str(dtype).removeprefix("torch.")
    return keys(launch for dtype_name, _, launch in module.launch_variants(H100) if dtype_name == name)


def twenty_maps(dtype: torch.dtype) -> list[Tensor]:
    like = torch.empty(0, dtype=dtype, device="meta")
    maps = []
    for _ in range(20):
        size = random.randint(1, 300), random.choice((random.randint(1, 300), 16 * random.randint(1, 16)))
        batch, channels = random.randint(1, 9), random.choice((19, 64, 80, 512, 2048))
        maps += [empty_map(like, (batch, channels, *size), channels_last) for channels_last in (False, True)]
        maps.append(like.new_empty(batch, channels, size[0], 2 * size[1])[..., ::2])
    return maps


def pooling(x: Tensor) -> list:
    tokens = empty_tokens(x, x.shape[0], x.shape[1], num_tokens(POOL_SIZES, POOL_SIZES))
    launches = pyramid_pool.plan_forward(x, None, POOL_SIZES, POOL_SIZES, tokens, H100)
    for channels_last in (False, True):
        dx = empty_map(x, tuple(x.shape), channels_last)
        for grad in (tokens, tokens.contiguous(), tokens[:, :, :1].expand_as(tokens)):
            launches += pyramid_pool.plan_backward(grad, POOL_SIZES, POOL_SIZES, dx, H100)
    return launches


def rectified(y: Tensor) -> list:
    tokens = empty_tokens(y, y.shape[0], y.shape[1], num_tokens(POOL_SIZES, POOL_SIZES))
    norm = y.new_empty((4, y.shape[1]), dtype=torch.float32)
    sums = y.new_empty((2, y.shape[1]), dtype=torch.float32)
    dense = empty_map(y, tuple(y.shape), y.stride(1) == 1)
    return [
        *pyramid_pool.plan_forward(y, norm, POOL_SIZES, POOL_SIZES, tokens, H100),
        *bn_relu_pool.plan_sums(y, norm, Gradients(tokens, dense), POOL_SIZES, POOL_SIZES, sums, H100),
        *bn_relu_pool.plan_input(y, norm, Gradients(tokens, dense, sums), POOL_SIZES, POOL_SIZES, dense, H100),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("plan", "module"), [(pooling, pyramid_pool), (rectified, bn_relu_pool)])
def test_twenty_image_sizes_compile_nothing_that_is_not_enumerated(
    plan: Callable[[Tensor], list], module, dtype: torch.dtype
):
    launched = set()
    for x in twenty_maps(dtype):
        launched |= keys(plan(x))
    assert launched <= enumerated(module, dtype)


def test_the_list_is_short():
    assert len(enumerated(pyramid_pool, torch.bfloat16)) <= sum(PER_DTYPE.values())


@pytest.mark.parametrize("channels_last", [False, True])
def test_an_unaligned_map_is_not_read_in_vectors(channels_last: bool):
    """A view that starts 2 bytes behind a multiple of 16 has the strides of an aligned map."""
    memory = torch.empty(64 * 32 * 32 + 1, dtype=torch.bfloat16)
    shape = (1, 32, 32, 64) if channels_last else (1, 64, 32, 32)
    for offset, vector in ((0, 8), (1, 1)):
        x = memory[offset:][: 64 * 32 * 32].view(shape)
        x = x.permute(0, 3, 1, 2) if channels_last else x
        assert pyramid_pool.layout_of(x).vector == vector
