"""The tail and its norm as operators: error, layouts, statistics far from zero, non-finite values, threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from batch_norm_rule import EPS, assert_tail_accurate, statistics, tail, vector_dtype
from helpers import LAYOUTS, assert_as_accurate_as_plain, random_map, relative_error

import annnet_kernels as ak
from annnet_kernels.runtime import native

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))
)
BACKENDS = ("reference", NATIVE)
OPERATORS = (
    "batch_norm_moments",
    "batch_norm_update",
    "batch_norm_apply",
    "batch_norm_bwd_sums",
    "batch_norm_bwd_input",
)
ops = torch.ops.annnet


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_of_layouts(layout, dtype, backend):
    assert_tail_accurate((2, 21, 9, 37), dtype, backend, layout, grad_layout=layout)
    assert [ak.last_backend(name) for name in OPERATORS] == [backend] * len(OPERATORS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("grad_layout", LAYOUTS)
def test_accuracy_of_gradients_in_another_layout(grad_layout, layout, backend):
    assert_tail_accurate((2, 20, 9, 13), torch.float32, backend, layout, grad_layout)


SHAPES = [
    (2, 1, 3, 2),
    (3, 5, 1, 20),
    (3, 5, 20, 1),
    (40, 3, 1, 1),
    (1, 1100, 3, 5),  # several blocks of channels, the last one with a rest
    (1, 9, 97, 97),  # several pieces of a plane
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy_of_shapes(shape, layout, backend):
    assert_tail_accurate(shape, torch.float32, backend, layout, layout, relu=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("absent", ["relu", "dropout", "batch statistics"])
def test_accuracy_of_what_may_be_absent(absent, dtype, backend):
    flags = {"relu": absent != "relu", "dropout": absent != "dropout", "frozen": absent == "batch statistics"}
    for layout in ("nchw", "channels_last"):
        assert_tail_accurate((2, 19, 17, 24), dtype, backend, layout, layout, **flags)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_in_place_is_the_same_map(layout, dtype, backend):
    y = random_map((2, 19, 17, 24), dtype, layout)
    operands = (torch.randn(4, 19), torch.rand(2, 19), True)
    with ak.use_backend(backend):
        out = ops.batch_norm_apply(y, *operands)
        ops.batch_norm_apply_(y, *operands)
    assert torch.equal(y, out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("ratio", [5, 20, 1000])
def test_accuracy_far_from_zero(ratio, layout, backend):
    assert_tail_accurate(
        (2, 16, 33, 40), torch.float32, backend, layout, layout, relu=ratio < 1000, offset=float(ratio)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_statistics_of_a_map_that_starts_with_outliers(layout, backend):
    """Whatever shift the first pixels suggest is a thousand deviations off."""

    def run(_):
        y = random_map((1, 16, 97, 97), torch.float32, layout) + 1000
        y[:, :, 0, :2] = 0
        with ak.use_backend(backend):
            mean, var = statistics(y)
        plain, truth = (torch.var_mean(x, (0, 2, 3), correction=0) for x in (y.contiguous(), y.double()))
        return {"var": var, "mean": mean}, *({"var": var, "mean": mean} for var, mean in (plain, truth))

    assert_as_accurate_as_plain(run, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_variance_of_a_constant_map_is_nothing(backend):
    for layout in ("nchw", "channels_last"):
        y = random_map((3, 1, 1, 1), torch.float32).expand(3, 7, 31, 11).contiguous() * 0 + 1234.567
        y = y.to(memory_format=torch.channels_last) if layout == "channels_last" else y
        with ak.use_backend(backend):
            _, var = statistics(y)
        assert (var >= 0).all()
        assert (var <= (1234.567 * 2**-22) ** 2).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("position", [0, -1])
def test_non_finite_pixels_spoil_their_channel_as_in_torch(position, layout, backend):
    y = random_map((2, 21, 37, 40), torch.float32, layout)
    values = torch.tensor([torch.nan, torch.inf, -torch.inf])
    y[0, :3, position, position] = values
    y[0, 3, 0, 0], y[1, 3, 5, 5] = torch.inf, -torch.inf
    with ak.use_backend(backend):
        mean, var = statistics(y)
    expected_mean, expected_var = torch.zeros(21), torch.zeros(21)
    F.batch_norm(y, expected_mean, expected_var, None, None, True, 1.0)
    count = y.numel() / 21
    torch.testing.assert_close(mean.float(), expected_mean, equal_nan=True)
    torch.testing.assert_close(var.float(), expected_var * (count - 1) / count, equal_nan=True)
    assert mean[:4].isfinite().sum() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_the_relu_lets_nan_pass_and_holds_back_infinite_gradients(layout, backend):
    channels = 18
    y = random_map((1, channels, 5, 23), torch.float32, layout)
    y[0, :, 2, 3], y[0, :, 4, 22], y[0, :, 1, 1] = torch.nan, -torch.inf, 0
    grad = random_map(y.shape, torch.float32, layout)
    norm = torch.tensor([0.0, 1.0, 1.0, 0.0])[:, None].repeat(1, channels)
    grad[y <= 0] = torch.inf
    operands = (y, norm, None, True)
    with ak.use_backend(backend):
        out = ops.batch_norm_apply(*operands)
        sums = ops.batch_norm_bwd_sums(grad, *operands, backend)
        dy = ops.batch_norm_bwd_input(grad, *operands, None, 1, backend)
    leaf = y.clone().requires_grad_()
    torch.testing.assert_close(out, y.relu(), equal_nan=True)
    torch.testing.assert_close(dy, torch.autograd.grad(leaf.relu(), leaf, grad)[0], equal_nan=True)
    passed = torch.where(y <= 0, 0, grad)
    torch.testing.assert_close(sums[0], passed.sum((0, 2, 3)), atol=1e-4, rtol=1e-5)
    assert sums[1].isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_frozen_statistics_keep_infinite_pixels_to_themselves(backend):
    y, grad = (random_map((1, 3, 5, 7), torch.float32) for _ in range(2))
    y[0, 0, 1, 1] = torch.inf
    dy = ops.batch_norm_bwd_input(grad, y, torch.ones(4, 3), None, False, None, 1, backend)
    torch.testing.assert_close(dy, grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_around_a_map_is_not_read(dtype, backend):
    """What lies between and behind the elements is NaN, for every rest of a vector."""
    for channels, width in ((1, 37), (3, 5), (17, 3), (33, 1)):
        for channels_last in (False, True):
            memory = torch.full((2, 40, 9, 42), torch.nan, dtype=dtype)
            memory = memory.to(memory_format=torch.channels_last) if channels_last else memory
            y, grad = (memory.clone()[:, 2 : 2 + channels, 1:-2, 3 : 3 + width] for _ in range(2))
            for x in (y, grad):
                x.copy_(random_map(tuple(x.shape), dtype) + 0.5)
            weight = torch.randn(channels, dtype=vector_dtype(dtype))
            bias = 8 * weight.abs()  # every pixel passes: none lies where rounding decides
            ours = tail(y, grad, weight, bias, None, None, True, backend)
            dense = tail(y.contiguous(), grad.contiguous(), weight, bias, None, None, True, "reference")
            for name in ("out", "dy"):
                error, bound = relative_error(ours[name], dense[name]), 32 * torch.finfo(dtype).eps
                assert error <= bound, (name, channels, width, channels_last)
            for name in ("dweight", "dbias"):  # by what is added up, since a sum can be zero by chance
                error = (ours[name] - dense[name]).norm() / grad.abs().double().sum((0, 2, 3)).norm()
                assert error <= 1e-5, (name, channels, width, channels_last)


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_of_none(backend):
    y = torch.empty(0, 3, 5, 7)
    operands = (y, torch.ones(4, 3), torch.empty(0, 3), True)
    with ak.use_backend(backend):
        assert torch.equal(ops.batch_norm_moments(y), torch.zeros(3, 3, dtype=torch.float64))
        assert ops.batch_norm_apply(*operands).shape == y.shape
    assert torch.equal(ops.batch_norm_bwd_sums(y, *operands, backend), torch.zeros(2, 3))
    assert ops.batch_norm_bwd_input(y, *operands, torch.zeros(2, 3), 1, backend).shape == y.shape


@pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "slice"])
@pytest.mark.parametrize("shape", [(3, 70, 41, 40), (1, 3, 97, 97), (1, 1100, 20, 20)], ids=str)
def test_threads_do_not_change_a_bit(shape, layout):
    y, grad = (random_map(shape, torch.float32, layout) for _ in range(2))
    weight, bias, factor = torch.randn(shape[1]), torch.randn(shape[1]), torch.rand(shape[:2])
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5, 2):
            torch.set_num_threads(count)
            results.append(tail(y, grad, weight, bias, None, factor, True, "native"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], value) for name, value in other.items())


@pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))
def test_offsets_beyond_32_bits():
    """Only the touched pages of the 17 GB take memory."""
    try:
        memory = torch.empty(2**32 + 2**20, dtype=torch.float32)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    y = memory.as_strided((2, 3, 2, 40), (2**32, 80, 40, 1)).copy_(torch.randn(2, 3, 2, 40))
    weight, bias = torch.randn(3), torch.randn(3)
    far = tail(y, y, weight, bias, None, None, True, "native")
    near = tail(y.contiguous(), y.contiguous(), weight, bias, None, None, True, "native")
    assert all(torch.equal(far[name], value) for name, value in near.items())


def test_a_step_refuses_a_gradient():
    y, norm = torch.randn(1, 4, 9, 9, requires_grad=True), torch.ones(4, 4)
    out = ops.batch_norm_moments(y)
    with pytest.raises(NotImplementedError, match="has no derivative of its own"):
        out.sum().backward()
    in_place = y * 2
    ops.batch_norm_apply_(in_place, norm, None, True)
    with pytest.raises(NotImplementedError, match="has no derivative of its own"):
        in_place.sum().backward()
    out = ops.batch_norm_apply(y.detach(), norm.clone().requires_grad_(), None, True)
    with pytest.raises(NotImplementedError, match="has no derivative of its own"):
        out.sum().backward()


@pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))
def test_wrong_arguments_are_named():
    y, norm, out = torch.randn(1, 4, 3, 3), torch.ones(4, 4), torch.empty(1, 4, 3, 3)
    apply = torch.ops.annnet_native.batch_norm_apply
    with pytest.raises(ValueError, match=r"norm: expected shape \[4, 4\] .*, got \[4, 5\]"):
        apply(y, torch.ones(4, 5), None, True, out)
    with pytest.raises(TypeError, match="norm: expected dtype Float, got Double"):
        apply(y, norm.double(), None, True, out)
    with pytest.raises(ValueError, match=r"channel_scale: expected shape \[1, 4\], got \[4\]"):
        apply(y, norm, torch.ones(4), True, out)
    with pytest.raises(ValueError, match=r"weight: expected shape \[4\], got \[5\]"):
        torch.ops.annnet_native.batch_norm_table(y, *torch.ones(2, 4), torch.ones(5), None, None, EPS, norm)
    vectors = torch.ones(2, 4).double(), *(None,) * 6
    with pytest.raises(ValueError, match=r"found: expected shape \[3, 4\]"):
        torch.ops.annnet_native.batch_norm_update(y, *vectors, EPS, 0.1, 1, norm)


def test_the_steps_equal_a_batch_norm_module_in_float64():
    module = torch.nn.BatchNorm2d(5).double()
    torch.nn.init.normal_(module.weight)
    y = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        table = ops.batch_norm_update(y, None, module.weight, module.bias, None, None, None, None, EPS, 0.1, 1)
        out = ops.batch_norm_apply(y, table, None, True)
    torch.testing.assert_close(out, F.relu(module(y)))
