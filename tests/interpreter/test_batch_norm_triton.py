"""The Triton kernels of the normalising tail: errors, layouts, parts, statistics far from zero, non-finite values."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from batch_norm_rule import assert_tail_accurate, plain_tail, statistics, tail
from helpers import LAYOUTS, assert_as_accurate_as_plain, random_map

import annnet_kernels as ak
from annnet_kernels.kernels import batch_norm as launches
from annnet_kernels.kernels.launch import INTERPRETER
from annnet_kernels.runtime.backends import interpreting

DEVICE = "cpu" if interpreting() else "cuda"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
OF_TRAINING = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
SEEDS = 1 if interpreting() else 5
OPERATORS = (
    "batch_norm_moments",
    "batch_norm_update",
    "batch_norm_apply",
    "batch_norm_bwd_sums",
    "batch_norm_bwd_input",
)
SHAPES = [
    (2, 19, 13, 11),  # a masked chunk of channels
    (3, 5, 1, 20),
    (3, 5, 20, 1),
    (40, 3, 1, 1),
    (1, 70, 8, 16),  # several chunks, and a multiple of a vector
]
if not interpreting():
    SHAPES += [(2, 512, 97, 97), (1, 80, 128, 256)]
ops = torch.ops.annnet


@pytest.fixture(autouse=True)
def _triton_backend():
    with ak.use_backend("triton"):
        yield


@OF_TRAINING
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy_of_shapes(shape, layout, dtype):
    assert_tail_accurate(shape, dtype, "triton", layout, layout, device=DEVICE, seeds=SEEDS)
    assert [ak.last_backend(name) for name in OPERATORS] == ["triton"] * len(OPERATORS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_of_layouts(layout, dtype):
    grad_layout = LAYOUTS[(LAYOUTS.index(layout) + 2) % len(LAYOUTS)]
    assert_tail_accurate((2, 9, 13, 12), dtype, "triton", layout, grad_layout, device=DEVICE, seeds=SEEDS)


@OF_TRAINING
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("absent", ["relu", "dropout", "batch statistics"])
def test_accuracy_of_what_may_be_absent(absent, layout, dtype):
    flags = {"relu": absent != "relu", "dropout": absent != "dropout", "frozen": absent == "batch statistics"}
    shape = (2, 19, 9, 12)
    assert_tail_accurate(shape, dtype, "triton", layout, layout, device=DEVICE, seeds=SEEDS, **flags)


@OF_TRAINING
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("ratio", [5, 20, 1000])
def test_accuracy_far_from_zero(ratio, layout, dtype):
    shape, relu = (2, 64, 9, 12), ratio < 1000  # so many channels that single draws do not scatter
    assert_tail_accurate(shape, dtype, "triton", layout, layout, relu=relu, offset=ratio, device=DEVICE, seeds=SEEDS)


@OF_TRAINING
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_a_map_of_several_parts(layout, dtype):
    """Splits of several blocks each, the last one shorter."""
    shape = (1, 3, 97, 97)
    y = random_map(shape, dtype, layout, DEVICE)
    main, _ = launches.plan_moments(y, torch.empty(3, 3, dtype=torch.float64, device=DEVICE), INTERPRETER)
    splits, split_pixels = main.arguments["partial_ptr"].shape[0], main.arguments["split_pixels"]
    assert splits > 1
    assert split_pixels > main.arguments["BLOCK_PIXELS"]
    assert splits * split_pixels != 97 * 97
    assert_tail_accurate(shape, dtype, "triton", layout, layout, offset=3, device=DEVICE, seeds=SEEDS)


@OF_TRAINING
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("position", [0, -1])
def test_non_finite_pixels_spoil_their_channel_as_in_torch(position, layout, dtype):
    y = random_map((2, 6, 9, 11), dtype, layout, DEVICE)
    y[0, :3, position, position] = torch.tensor([torch.nan, torch.inf, -torch.inf], device=DEVICE)
    y[0, 3, 0, 0], y[1, 3, 5, 5] = torch.inf, -torch.inf
    mean, var = statistics(y)
    expected_mean, expected_var = torch.zeros(6), torch.zeros(6)
    F.batch_norm(y.cpu().float(), expected_mean, expected_var, None, None, True, 1.0)
    torch.testing.assert_close(mean.cpu().float(), expected_mean, equal_nan=True)
    torch.testing.assert_close(var.cpu().float(), expected_var * (197 / 198), equal_nan=True)


@OF_TRAINING
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_the_relu_lets_nan_pass_and_holds_back_infinite_gradients(layout, dtype):
    y = random_map((1, 18, 5, 23), dtype, layout, DEVICE)
    y[0, :, 2, 3], y[0, :, 4, 22], y[0, :, 1, 1] = torch.nan, -torch.inf, 0
    grad = random_map(y.shape, dtype, layout, DEVICE)
    grad[y <= 0] = torch.inf
    norm = torch.tensor([0.0, 1.0, 1.0, 0.0], device=DEVICE)[:, None].repeat(1, 18)
    operands = (y, norm, None, True)
    torch.testing.assert_close(ops.batch_norm_apply(*operands), y.relu(), equal_nan=True)
    in_place = y.clone()
    ops.batch_norm_apply_(in_place, *operands[1:])
    assert torch.equal(in_place.nan_to_num(), ops.batch_norm_apply(*operands).nan_to_num())
    passed = torch.where(y <= 0, 0, grad)
    sums = ops.batch_norm_bwd_sums(grad, *operands, None)
    torch.testing.assert_close(sums[0], passed.float().sum((0, 2, 3)), atol=1e-4, rtol=1e-5)
    assert sums[1].isnan().all()
    torch.testing.assert_close(ops.batch_norm_bwd_input(grad, *operands, None, 1, None), passed)


@OF_TRAINING
def test_frozen_statistics_keep_infinite_pixels_to_themselves(dtype):
    y, grad = (random_map((1, 3, 5, 7), dtype, device=DEVICE) for _ in range(2))
    y[0, 0, 1, 1] = -torch.inf
    dy = ops.batch_norm_bwd_input(grad, y, torch.ones(4, 3, device=DEVICE), None, False, None, 1, None)
    torch.testing.assert_close(dy, grad)


@OF_TRAINING
@pytest.mark.parametrize("channels_last", [False, True])
def test_memory_around_a_map_is_not_read(channels_last, dtype):
    memory = torch.full((2, 24, 9, 42), torch.nan, dtype=dtype, device=DEVICE)
    memory = memory.to(memory_format=torch.channels_last) if channels_last else memory

    def run(_):
        y, grad = (memory.clone()[:, 2:19, 1:-2, 3:40] for _ in range(2))
        for x in (y, grad):
            x.copy_(random_map(tuple(x.shape), dtype) + 0.5)
        operands = y, grad, *torch.randn(2, 17, device=DEVICE)
        others = None, None, True
        truth = plain_tail(*(x.double() for x in operands), *others)
        return tail(*operands, *others, "triton"), plain_tail(*operands, *others), truth

    assert_as_accurate_as_plain(run, dtype, seeds=SEEDS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_of_none(dtype):
    y = torch.empty(0, 3, 5, 7, dtype=dtype, device=DEVICE)
    operands = (y, torch.ones(4, 3, device=DEVICE), torch.empty(0, 3, device=DEVICE), True)
    assert not ops.batch_norm_moments(y).any()
    assert ops.batch_norm_apply(*operands).shape == y.shape
    assert not ops.batch_norm_bwd_sums(y, *operands, None).any()
    assert ops.batch_norm_bwd_input(y, *operands, torch.zeros(2, 3, device=DEVICE), 1, None).shape == y.shape
