"""annnet::pyramid_pool through the public function: error, every order of derivative, PyTorch's transforms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYOUTS, random_map
from hypothesis import given, settings, strategies as st
from pool_rule import GRAD_LAYOUTS, assert_pool_accurate, assert_rectified_accurate, levels, random_norm
from torch.autograd import forward_ad

import annnet_kernels as ak
from annnet_kernels.layouts import is_channels_last
from annnet_kernels.runtime import native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))
)
BACKENDS = ("reference", NATIVE)
SIZES = (1, (2, 3), 6)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_of_layouts(layout, dtype, backend):
    assert_pool_accurate((1, 9, 17, 24), dtype, backend, layout)
    if backend is not None:
        assert ak.last_backend("pyramid_pool") == ak.last_backend("pyramid_pool_bwd") == backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grad_layout", GRAD_LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 7, 5, 3), (1, 5, 1, 20), (2, 20, 65, 33)], ids=str)
def test_accuracy_of_shapes_and_gradients(shape, grad_layout, backend):
    assert_pool_accurate(shape, torch.float32, backend, "channels_last", grad_layout)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 20), st.integers(1, 20)),
    sizes=st.lists(st.integers(1, 12) | st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=4),
    layout=st.sampled_from(LAYOUTS),
)
def test_every_level_is_an_adaptive_average_pooling(shape, sizes, layout):
    x = random_map(shape, torch.float64, layout)
    expected = torch.cat([F.adaptive_avg_pool2d(x, size).flatten(2) for size in sizes], dim=2)
    torch.testing.assert_close(ak.pyramid_pool(x, sizes), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives_of_first_and_second_order(backend):
    for layout in ("nchw", "channels_last"):
        x = random_map((1, 2, 4, 3), torch.float64, layout).requires_grad_()
        with ak.use_backend(backend):
            assert torch.autograd.gradcheck(lambda x: ak.pyramid_pool(x, (1, (2, 3))), x)
            assert torch.autograd.gradgradcheck(lambda x: ak.pyramid_pool(x, (1, (2, 3))), x)


def test_the_gradient_keeps_the_memory_format():
    for layout, channels_last in (("nchw", False), ("channels_last", True), ("slice", False)):
        x = random_map((2, 3, 5, 4), torch.float32, layout).requires_grad_()
        (dx,) = torch.autograd.grad(ak.pyramid_pool(x).sum(), x)
        assert is_channels_last(dx) == channels_last


def test_tokens_are_token_major():
    assert ak.pyramid_pool(torch.randn(2, 5, 9, 9)).stride() == (110 * 5, 1, 5)


def test_nothing_but_the_shape_is_kept():
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda x: x):
        ak.pyramid_pool(torch.randn(2, 3, 9, 9, requires_grad=True))
    assert kept == []


def test_batch_of_none():
    x = torch.empty(0, 3, 9, 9, requires_grad=True)
    tokens = ak.pyramid_pool(x)
    assert tokens.shape == (0, 3, 110)
    assert torch.autograd.grad(tokens.sum(), x)[0].shape == x.shape


def test_deterministic_mode_is_accepted():
    x = torch.randn(1, 3, 9, 9, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        ak.pyramid_pool(x).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_backward_uses_the_backend_of_its_forward():
    x = torch.randn(1, 3, 9, 9, requires_grad=True)
    with ak.use_backend("reference"):
        tokens = ak.pyramid_pool(x)
    tokens.sum().backward()
    assert ak.last_backend("pyramid_pool_bwd") == "reference"


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def loss(x):
        return (ak.pyramid_pool(x, SIZES) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((9, 11), (12, 7)):
        x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
        (expected,) = torch.autograd.grad(loss(x), x)
        torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)


def test_functional_transforms():
    x = torch.randn(4, 2, 3, 7, 5, dtype=torch.float64)

    def loss(x):
        return (ak.pyramid_pool(x, SIZES) ** 2).sum()

    each = [torch.func.grad(loss)(image) for image in x]
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), torch.stack(each))
    tokens = [ak.pyramid_pool(image, SIZES) for image in x]
    torch.testing.assert_close(torch.func.vmap(lambda x: ak.pyramid_pool(x, SIZES))(x), torch.stack(tokens))
    moved = torch.func.vmap(lambda x: ak.pyramid_pool(x, SIZES), in_dims=2)(x.movedim(0, 2))
    torch.testing.assert_close(moved, torch.stack(tokens))


def test_gradients_of_a_batch_of_upstreams():
    """The forward saw no transform, the backward runs under one."""
    x = random_map((2, 3, 9, 7), torch.float64).requires_grad_()
    out = ak.pyramid_pool(x, SIZES)
    upstreams = torch.randn(4, *out.shape, dtype=torch.float64)
    (batched,) = torch.autograd.grad(out, x, upstreams, retain_graph=True, is_grads_batched=True)
    each = [torch.autograd.grad(out, x, upstream, retain_graph=True)[0] for upstream in upstreams]
    torch.testing.assert_close(batched, torch.stack(each))


def test_a_gradient_is_recorded_only_where_one_is_asked_for():
    x = random_map((1, 3, 9, 7), torch.float64).requires_grad_()
    for create_graph in (False, True):
        (dx,) = torch.autograd.grad(ak.pyramid_pool(x, SIZES).square().sum(), x, create_graph=create_graph)
        assert dx.requires_grad == create_graph


def test_forward_mode_is_refused():
    x = torch.randn(1, 2, 7, 5)
    with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        ak.pyramid_pool(forward_ad.make_dual(x, torch.randn_like(x)))


def test_flop_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    x = torch.randn(2, 3, 7, 5, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ak.pyramid_pool(x).sum().backward()
    assert counter.get_total_flops() == 2 * x.numel()


# The steps of the blocks' Functions that read a rectified map


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_accuracy_of_rectified_layouts(layout, dtype, backend):
    assert_rectified_accurate((2, 9, 17, 24), dtype, backend, layout)
    for operator in ("pyramid_pool", "bn_relu_bwd_sums", "bn_relu_bwd_input"):
        assert ak.last_backend(operator) == backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("absent", ["with_tokens", "with_map", "with_statistics"])
def test_accuracy_of_what_may_be_absent(absent, backend):
    assert_rectified_accurate((2, 16, 17, 24), torch.float32, backend, **{absent: False})


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_backward_of_batch_norm_relu_and_pooling(backend):
    """With the batch's own statistics, the three operators give autograd's gradients of F.batch_norm, relu, pooling."""
    y, weight, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 5, 9, 7), 5, 5))
    heights, widths = levels(SIZES)
    z = F.batch_norm(y, None, None, weight, bias, training=True).relu()
    grad_map, grad_tokens = torch.randn_like(z), torch.randn(3, 5, 43, dtype=torch.float64)
    tokens = torch.cat([F.adaptive_avg_pool2d(z, size).flatten(2) for size in SIZES], dim=2)
    expected = torch.autograd.grad([z, tokens], [y, weight, bias], [grad_map, grad_tokens])
    with torch.no_grad(), ak.use_backend(backend):
        variance, mean = torch.var_mean(y, (0, 2, 3), correction=0)
        operands = (y, torch.stack((mean, (variance + 1e-5).rsqrt(), weight, bias)))
        torch.testing.assert_close(torch.ops.annnet.pyramid_pool(*operands, heights, widths), tokens)
        gradients = (grad_tokens, grad_map)
        sums = torch.ops.annnet.bn_relu_bwd_sums(*operands, *gradients, heights, widths, backend)
        means = sums / (3 * 9 * 7)
        dy = torch.ops.annnet.bn_relu_bwd_input(*operands, *gradients, means, 1, heights, widths, backend)
    torch.testing.assert_close((dy, sums[1], sums[0]), expected)


def test_a_step_refuses_a_gradient():
    y, norm = torch.randn(1, 4, 9, 9, requires_grad=True), random_norm(4)
    out = torch.ops.annnet.pyramid_pool(y, norm, [1], [1])
    with pytest.raises(NotImplementedError, match="has no derivative of its own"):
        out.sum().backward()
    out = torch.ops.annnet.bn_relu_bwd_sums(y, norm, None, y, [1], [1], None)
    with pytest.raises(NotImplementedError, match="has no derivative of its own"):
        out.sum().backward()
