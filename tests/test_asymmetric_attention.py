"""annnet::asymmetric_attention through the public function: error, gradients, layouts, PyTorch's transforms."""

from __future__ import annotations

import pytest
import torch
from attention_rule import TOKEN_LAYOUTS, assert_accurate, plain_attention, random_tokens
from helpers import LAYOUTS, assert_as_accurate_as_plain, random_map
from torch.autograd import forward_ad

import annnet_kernels as ak
from annnet_kernels.layouts import is_channels_last
from annnet_kernels.runtime import native

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NATIVE = pytest.param(
    "native", marks=pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))
)
BACKENDS = ("reference", NATIVE)

# batch, key channels, value channels, height, width, tokens
SHAPES = (
    (1, 96, 160, 13, 20, 110),
    (2, 19, 48, 13, 17, 7),
    (2, 80, 19, 1, 37, 64),  # one row
    (2, 48, 96, 1, 1, 128),  # one pixel
    (1, 48, 80, 12, 11, 1),  # one token: the softmax is constant
    (1, 256, 512, 9, 11, 50),
    (1, 512, 2048, 3, 5, 13),
    (1, 2048, 19, 3, 5, 13),
    (1, 24, 20, 5, 7, 1024),
    (1, 1, 1, 2, 2, 2),
)


def operands(dtype=torch.float64, layout="nchw", batch=2):
    """query, key, value."""
    query = random_map((batch, 5, 4, 3), dtype, layout)
    return query, random_tokens(batch, 5, 7, dtype), random_tokens(batch, 6, 7, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy_of_shapes(shape, dtype):
    assert_accurate(shape, dtype, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accuracy_of_the_reference(dtype):
    for shape in SHAPES[1:5]:
        assert_accurate(shape, dtype, "reference")
    assert ak.last_backend("asymmetric_attention") == ak.last_backend("asymmetric_attention_bwd") == "reference"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("map_layout", "token_layout"),
    [*((layout, "tokens") for layout in LAYOUTS), *(("channels_last", layout) for layout in TOKEN_LAYOUTS)],
)
def test_accuracy_of_layouts(map_layout, token_layout, backend):
    assert_accurate((2, 19, 37, 13, 9, 23), torch.float32, backend, map_layout, token_layout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [8.0, 300.0])
def test_accuracy_of_peaked_softmax(magnitude, dtype, backend):
    """Logits of standard deviation 8, then in the hundreds: few pixels are not one-hot, and single draws scatter."""
    assert_accurate((1, 64, 48, 9, 13, 110), dtype, backend, magnitude=magnitude, seeds=11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_accuracy_of_unusual_scales(scale, backend):
    assert_accurate((1, 16, 24, 9, 11, 30), torch.float32, backend, scale=scale)


def test_scale_defaults_to_the_root_of_the_key_channels():
    query, key, value = operands()
    torch.testing.assert_close(ak.asymmetric_attention(query, key, value), plain_attention(query, key, value, 5**-0.5))
    mean = value.mean(dim=2)[:, :, None, None].expand(-1, -1, 4, 3)
    torch.testing.assert_close(ak.asymmetric_attention(query, key, value, 0.0), mean)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend):
    for layout in ("channels_last",) if backend == "reference" else ("nchw", "channels_last"):
        leaves = [x.requires_grad_() for x in operands(layout=layout)]
        with ak.use_backend(backend):
            assert torch.autograd.gradcheck(lambda *x: ak.asymmetric_attention(*x, 0.7), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_non_finite_pixel_spoils_only_its_own_output(bad, backend):
    query, key, value = operands(torch.float32)
    with ak.use_backend(backend):
        clean = ak.asymmetric_attention(query, key, value)
        query[1, 2, 3, 1] = bad
        out = ak.asymmetric_attention(query, key, value)
    assert out[1, :, 3, 1].isnan().all()
    out[1, :, 3, 1] = clean[1, :, 3, 1] = 0
    torch.testing.assert_close(out, clean)


def test_output_and_gradients_keep_the_memory_format():
    for layout, channels_last in (("nchw", False), ("channels_last", True), ("slice", False)):
        leaves = [x.requires_grad_() for x in operands(torch.float32, layout)]
        out = ak.asymmetric_attention(*leaves)
        dquery, dkey, dvalue = torch.autograd.grad(out.sum(), leaves)
        assert is_channels_last(out) == is_channels_last(dquery) == channels_last
        assert dkey.stride() == (7 * 5, 1, 5)
        assert dvalue.stride() == (7 * 6, 1, 6)


def test_only_operands_and_row_statistics_are_kept():
    kept = []
    leaves = [x.requires_grad_() for x in operands(torch.float32)]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)), lambda x: x):
        ak.asymmetric_attention(*leaves)
    assert sorted(kept) == sorted([(2, 5, 4, 3), (2, 5, 7), (2, 6, 7), (2, 12)])


def test_gradients_that_nobody_asked_for_are_none():
    for wanted in range(3):
        leaves = operands(torch.float32)
        leaves[wanted].requires_grad_()
        ak.asymmetric_attention(*leaves).sum().backward()
        assert [x.grad is not None for x in leaves] == [i == wanted for i in range(3)]


def test_batch_of_none():
    leaves = [x.requires_grad_() for x in operands(batch=0)]
    out = ak.asymmetric_attention(*leaves)
    assert out.shape == (0, 6, 4, 3)
    assert [g.shape for g in torch.autograd.grad(out.sum(), leaves)] == [x.shape for x in leaves]


def test_a_backward_uses_the_backend_of_its_forward():
    leaves = [x.requires_grad_() for x in operands()]
    with ak.use_backend("reference"):
        out = ak.asymmetric_attention(*leaves)
    out.sum().backward()
    assert ak.last_backend("asymmetric_attention_bwd") == "reference"


def test_autocast_casts_all_operands():
    leaves = [x.requires_grad_() for x in operands(torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        out = ak.asymmetric_attention(*leaves)
        assert ak.asymmetric_attention(*operands(torch.float64)).dtype == torch.float64
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, ak.asymmetric_attention(*(x.bfloat16() for x in leaves)))
    out.float().sum().backward()
    assert [x.grad.dtype for x in leaves] == [torch.float32] * 3


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic):
    def loss(query, key, value):
        return (ak.asymmetric_attention(query, key, value) ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for size in ((4, 3), (7, 5)):
        _, key, value = operands()
        leaves = [x.requires_grad_() for x in (torch.randn(2, 5, *size, dtype=torch.float64), key, value)]
        expected = torch.autograd.grad(loss(*leaves), leaves)
        torch.testing.assert_close(torch.autograd.grad(compiled(*leaves), leaves), expected)


def test_functional_transforms():
    queries, keys, values = (torch.stack([x, x + 1, x - 1]) for x in operands())

    def loss(query, key, value):
        return (ak.asymmetric_attention(query, key, value, 0.7) ** 2).sum()

    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    each = [gradient(*triple) for triple in zip(queries, keys, values, strict=True)]
    batched = torch.func.vmap(gradient)(queries, keys, values)
    for ours, expected in zip(batched, zip(*each, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(expected))
    shared = torch.func.vmap(lambda q: ak.asymmetric_attention(q, keys[0], values[0], 0.7), in_dims=2)
    expected = torch.stack([ak.asymmetric_attention(q, keys[0], values[0], 0.7) for q in queries])
    torch.testing.assert_close(shared(queries.movedim(0, 2)), expected)


def test_second_derivatives_are_refused():
    leaves = [x.requires_grad_() for x in operands()]
    out = ak.asymmetric_attention(*leaves)
    (dquery,) = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(NotImplementedError, match="asymmetric_attention: second derivatives are not implemented"):
        dquery.sum().backward()


def test_forward_mode_is_refused():
    query, key, value = operands()
    with forward_ad.dual_level(), pytest.raises((NotImplementedError, RuntimeError), match=r"jvp|forward"):
        ak.asymmetric_attention(forward_ad.make_dual(query, torch.randn_like(query)), key, value)


def test_the_logsumexp_is_not_differentiable():
    leaves = [x.requires_grad_() for x in operands()]
    query, key, value = leaves
    out, logsumexp, _ = torch.ops.annnet.asymmetric_attention(query, None, key, value, None, None, 0.7, False)
    assert out.requires_grad
    assert not logsumexp.requires_grad
    truth = (leaves[0].flatten(2).transpose(1, 2) @ leaves[1] * 0.7).logsumexp(dim=2)
    torch.testing.assert_close(logsumexp, truth)


def test_flop_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    query, key, value = operands(torch.float32)
    pairs = 2 * 2 * 12 * 7  # 2 per multiply-add · batch · pixels · tokens
    for needs, products in (
        ((True, True, True), 5 + 6 + 5 + 5 + 6),
        ((True, False, False), 5 + 6 + 5),
        ((False, False, True), 5 + 6),
    ):
        leaves = [x.detach().requires_grad_(needed) for x, needed in zip((query, key, value), needs, strict=True)]
        with FlopCounterMode(display=False) as counter:
            out = ak.asymmetric_attention(*leaves)
            assert counter.get_total_flops() == pairs * (5 + 6)
            out.sum().backward()
        assert counter.get_total_flops() == pairs * (5 + 6 + products)


# The norm of the query, and what is added


def published(y, norm, key, value, skip, constant, grad):
    """Batch norm with the given table, ReLU, attention, sum: outputs and gradients in the dtype of y."""
    mean, invstd, weight, bias = norm[:, None, :, None, None]
    z = ((y.to(mean.dtype) - mean) * invstd * weight + bias).to(y.dtype).relu().requires_grad_()
    leaves = [z, *(x.detach().requires_grad_() for x in (key, value))]
    out = plain_attention(*leaves, 0.2)
    gradients = torch.autograd.grad(out, leaves, grad)
    return dict(
        zip(
            ("out", "dz", "dkey", "dvalue"), (out + skip + constant.to(y.dtype)[:, None, None], *gradients), strict=True
        )
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last", "slice"])
def test_norm_skip_and_constant(layout, dtype, backend):
    table_dtype = torch.promote_types(dtype, torch.float32)

    def run(seed):
        y, skip, grad = (random_map((2, c, 11, 13), dtype, layout) for c in (21, 35, 35))
        key, value = (random_tokens(2, c, 43, dtype) for c in (21, 35))
        norm, constant = (torch.randn(*shape, dtype=table_dtype) for shape in ((4, 21), (35,)))
        with ak.use_backend(backend):
            operands = y, norm, key, value, skip, constant, 0.2, True
            out, logsumexp, moments = torch.ops.annnet.asymmetric_attention(*operands)
            torch.testing.assert_close(moments, torch.ops.annnet.batch_norm_moments(out))
        gradients = torch.ops.annnet.asymmetric_attention_bwd(
            grad, y, norm, key, value, logsumexp, 0.2, [True, True, True], backend
        )
        ours = dict(zip(("out", "dz", "dkey", "dvalue"), (out, *gradients), strict=True))
        tensors = (y, norm, key, value, skip, constant, grad)
        return ours, published(*tensors), published(*(x.double() for x in tensors))

    assert_as_accurate_as_plain(run, dtype)
    assert ak.last_backend("asymmetric_attention") == backend


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_in_place_is_the_same_sum(layout, dtype, backend):
    y, skip = (random_map((2, c, 11, 13), dtype, layout) for c in (21, 35))
    key, value = (random_tokens(2, c, 43, dtype) for c in (21, 35))
    norm, constant = (
        torch.randn(*shape, dtype=torch.promote_types(dtype, torch.float32)) for shape in ((4, 21), (35,))
    )
    with ak.use_backend(backend):
        operands = y, norm, key, value, skip, constant, 0.2, True
        out, *beside = torch.ops.annnet.asymmetric_attention(*operands)
        version = skip._version
        in_place = torch.ops.annnet.asymmetric_attention_(*operands)
    assert torch.equal(skip, out)
    assert skip._version > version
    for ours, other in zip(in_place, beside, strict=True):
        assert torch.equal(ours, other)
