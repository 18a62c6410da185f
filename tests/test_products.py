"""The C++ matrix product, and the pointwise convolutions and chains of weights that are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_as_accurate_as_plain, random_map, surrounded
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import annnet_kernels as ak
from annnet_kernels import native
from annnet_kernels.ops import chain_product, matrix_product, pointwise_convolution

pytestmark = pytest.mark.skipif(native.why_not("cpu") is not None, reason=str(native.why_not("cpu")))

# images, rows, depth, columns
SHAPES = (
    (1, 64, 300, 1000),  # whole tiles of rows
    (2, 19, 37, 53),  # no whole tile of anything
    (3, 1, 1, 1),
    (1, 700, 40, 30),  # more rows than columns: pieces of rows
    (1, 9, 2900, 17),  # several runs of the depth
    (5, 8, 128, 97),
)


def _operands(shape: Sequence[int], transposed: str = "") -> tuple[Tensor, Tensor]:
    images, rows, depth, columns = shape
    a, b = torch.randn(images, rows, depth), torch.randn(images, depth, columns)
    if "a" in transposed:
        a = a.transpose(1, 2).contiguous().transpose(1, 2)
    if "b" in transposed:
        b = b.transpose(1, 2).contiguous().transpose(1, 2)
    return a, b


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None, summed: bool = False) -> Tensor:
    product: Tensor = torch.ops.annnet.matrix_product(a, b, bias, summed, None)
    return product


def test_images_share_a_matrix_that_is_expanded() -> None:
    """As all share a weight: it is packed once."""
    a, b = torch.randn(37, 19).t().expand(5, -1, -1), torch.randn(5, 37, 53)
    torch.testing.assert_close(_product(a, b), torch.bmm(a, b), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("transposed", ["", "a", "b", "ab"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_accuracy_of_shapes(shape: tuple[int, int, int, int], transposed: str) -> None:
    def run(seed: int) -> tuple[dict[str, Tensor], ...]:
        a, b = _operands(shape, transposed)
        bias = torch.randn(shape[1])
        each = {"each": _product(a, b, bias), "summed": _product(a, b, bias, summed=True)}
        wide = torch.bmm(a.double(), b.double())
        plain = torch.bmm(a, b)
        return (
            each,
            {"each": plain + bias[:, None], "summed": plain.sum(0, keepdim=True) + bias[:, None]},
            {"each": wide + bias[:, None], "summed": wide.sum(0, keepdim=True) + bias[:, None]},
        )

    assert_as_accurate_as_plain(run, torch.float32)


@pytest.mark.parametrize("transposed", ["", "a", "b"])
def test_touches_nothing_beyond_its_operands(transposed: str) -> None:
    """Operands lie in memory full of NaN, the output in memory that must not change."""
    a, b = _operands((2, 19, 37, 53), transposed)
    expected = _product(a, b)
    out, memory = surrounded(torch.zeros_like(expected), 7.0)
    before = memory.clone()
    torch.ops.annnet_native.matrix_product(
        surrounded(a, float("nan"))[0], surrounded(b, float("nan"))[0], None, False, out
    )
    assert torch.equal(out, expected)
    out.zero_()
    assert torch.equal(memory, before)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_no_bit_depends_on_the_number_of_threads(shape: tuple[int, int, int, int]) -> None:
    a, b = _operands(shape)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results += [_product(a, b), _product(a, b, summed=True)]
    finally:
        torch.set_num_threads(before)
    for result in results[2::2]:
        assert torch.equal(result, results[0])
    for result in results[3::2]:
        assert torch.equal(result, results[1])


def test_a_value_that_is_not_finite_stays_in_its_row_and_column() -> None:
    a, b = _operands((1, 19, 37, 53))
    a[0, 3, 5], b[0, 7, 11] = torch.nan, torch.inf
    spoiled = ~_product(a, b)[0].isfinite()
    assert spoiled[3].all()
    assert spoiled[:, 11].all()
    assert spoiled.sum() == 53 + 19 - 1


def test_sums_of_nothing() -> None:
    bias = torch.randn(3)
    assert torch.equal(_product(torch.randn(2, 3, 0), torch.randn(2, 0, 4), bias), bias[:, None].expand(2, 3, 4))
    assert torch.equal(_product(torch.randn(0, 3, 2), torch.randn(0, 2, 4), summed=True), torch.zeros(1, 3, 4))
    assert _product(torch.randn(0, 3, 2), torch.randn(0, 2, 4)).shape == (0, 3, 4)


def test_direct_calls_are_checked() -> None:
    a, b = _operands((2, 3, 4, 5))
    with pytest.raises(ValueError, match="b: expected shape"):
        _product(a, b[:, :3])
    with pytest.raises(TypeError, match="a: expected dtype"):
        torch.ops.annnet_native.matrix_product(a.double(), b.double(), None, False, torch.empty(2, 3, 5).double())
    with pytest.raises(TypeError, match="b: expected the dtype of a"):
        _product(a, b.double())
    with pytest.raises(ValueError, match="bias: expected shape"):
        _product(a, b, torch.randn(4))
    x, weight = torch.randn(2, 3, 5, 7), torch.randn(4, 3, 1, 1)
    out = torch.zeros(2, 4, 7, 5).transpose(2, 3)
    with pytest.raises(ValueError, match="out: expected dense NCHW"):
        torch.ops.annnet_native.pointwise_convolution(x, weight, None, out)
    dx, empty, needs = torch.zeros(2, 3, 7, 5).transpose(2, 3), torch.empty(0), [True, False, False]
    with pytest.raises(ValueError, match="dx: expected dense NCHW"):
        torch.ops.annnet_native.pointwise_convolution_bwd(out, x, weight, needs, dx, empty, empty)
    with pytest.raises(ValueError, match="out: expected contiguous"):
        torch.ops.annnet_native.matrix_product(a, b, None, False, torch.empty(2, 5, 3).transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_are_pytorch_s(dtype: torch.dtype) -> None:
    """The operators take them too; asked for the kernels, they say why not."""
    x, weight, bias = torch.randn(2, 4, 3, 5).to(dtype), torch.randn(6, 4, 1, 1).to(dtype), torch.randn(6).to(dtype)
    out = torch.ops.annnet.pointwise_convolution(x, weight, bias)
    assert ak.last_backend("pointwise_convolution") == "reference"
    torch.testing.assert_close(out, F.conv2d(x, weight, bias))
    needs = [True, True, True]
    gradients = torch.ops.annnet.pointwise_convolution_bwd(out, x, weight, needs, None)
    geometry = [1, 1], [0, 0], [1, 1], False, [0, 0], 1
    expected = torch.ops.aten.convolution_backward(out, x, weight, [6], *geometry, needs)
    torch.testing.assert_close(gradients, expected)
    a, b = x.flatten(2), x.flatten(2).transpose(1, 2)
    torch.testing.assert_close(torch.ops.annnet.matrix_product(a, b, None, False, None), torch.bmm(a, b))
    torch.testing.assert_close(
        torch.ops.annnet.matrix_product(a, b, bias[:4], True, None),
        torch.bmm(a, b).sum(0, keepdim=True) + bias[:4, None],
    )
    with ak.use_backend("native"), pytest.raises(RuntimeError, match="kernels for float32 alone"):
        torch.ops.annnet.pointwise_convolution(x, weight, bias)


@pytest.mark.parametrize("layout", ["nchw", "slice", "transposed", "expanded"])
@pytest.mark.parametrize("biased", [True, False])
def test_pointwise_convolution_is_as_accurate(layout: str, biased: bool) -> None:
    """Output and gradients, the weight being a slice, as the half of a bottleneck is."""

    def results(convolve: object, x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor) -> dict[str, Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
        out = convolve(leaves[0], leaves[1][:, 5:], leaves[2] if biased else None)  # type: ignore[operator]
        out.backward(grad)
        names = ("x", "weight", "bias")
        return {"out": out, **{name: leaf.grad for name, leaf in zip(names, leaves, strict=False)}}

    def run(seed: int) -> tuple[dict[str, Tensor], ...]:
        x = random_map((2, 40, 23, 25), torch.float32, layout)
        weight, bias, grad = torch.randn(24, 45, 1, 1), torch.randn(24), random_map((2, 24, 23, 25), torch.float32)
        tensors = x, weight, bias if biased else None, grad
        wide = tuple(None if t is None else t.double() for t in tensors)
        with ak.use_backend("native"):
            ours = results(pointwise_convolution, *tensors)
        assert ak.last_backend("pointwise_convolution") == ak.last_backend("pointwise_convolution_bwd") == "native"
        return ours, results(F.conv2d, *tensors), results(F.conv2d, *wide)

    assert_as_accurate_as_plain(run, torch.float32)


@pytest.mark.parametrize("case", ["channels_last", "bfloat16", "float64", "reference", "autocast", "small"])
def test_what_the_library_does_better_or_alone_is_left_to_it(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = getattr(torch, case) if case in ("bfloat16", "float64") else torch.float32
    shape = (2, 8, 5, 7) if case == "small" else (2, 8, 23, 25)
    x = random_map(shape, dtype, "channels_last" if case == "channels_last" else "nchw").requires_grad_()
    weight, bias = torch.randn(4, 8, 1, 1, dtype=dtype), torch.randn(4, dtype=dtype)
    monkeypatch.setattr("annnet_kernels.backends._last_used", {})
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"),
        ak.use_backend("reference" if case == "reference" else None),
    ):
        out, expected = pointwise_convolution(x, weight, bias), F.conv2d(x, weight, bias)
    assert torch.equal(out, expected)
    assert out.stride() == expected.stride()
    out.sum().backward()
    assert ak.last_backend("pointwise_convolution") is None
    with ak.use_backend("native"):
        pointwise_convolution(torch.randn(2, 8, 23, 25), torch.randn(4, 8, 1, 1), None)
    assert ak.last_backend("pointwise_convolution") == "native"


@pytest.mark.parametrize("requests", [("reference", None), (None, "reference"), ("native", "reference")], ids=str)
def test_checkpointing_may_find_another_request(requests: tuple[str | None, str | None]) -> None:
    """As what each pass keeps must agree, it does not depend on who makes the products."""
    block = ak.AFNB(12, 16, 16, 8, 8)
    torch.nn.init.normal_(block.stages[0].W.weight)
    low, high = torch.randn(1, 12, 24, 25, requires_grad=True), torch.randn(1, 16, 24, 25, requires_grad=True)
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        block.zero_grad()
        with ak.use_backend(requests[0]):
            out = checkpoint(block, low, high, use_reentrant=False) if checkpointed else block(low, high)
        with ak.use_backend(requests[1]):
            out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        gradients.append([p.grad.clone() for p in block.parameters() if p.grad is not None])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3)


def test_backward_follows_its_forward() -> None:
    a, b = torch.randn(7, 12, requires_grad=True), torch.randn(12, 5, requires_grad=True)
    with ak.use_backend("native"):
        product = matrix_product(a, b)
    with ak.use_backend("triton"):
        product.sum().backward()
    assert ak.last_backend("matrix_product") == "native"
    torch.testing.assert_close(a.grad, b.detach().sum(1).expand(7, 12))


def test_matrix_product_gives_a_weight_its_own_layout() -> None:
    a, weight = torch.randn(7, 12, requires_grad=True), torch.randn(5, 12, requires_grad=True)
    grad = torch.randn(7, 5)
    matrix_product(a, weight.t()).backward(grad)
    torch.testing.assert_close(a.grad, grad @ weight.detach())
    torch.testing.assert_close(weight.grad, grad.t() @ a.detach())
    transposed = weight.detach().t().requires_grad_()
    matrix_product(a, transposed).backward(grad)
    assert transposed.grad is not None
    assert transposed.grad.stride() == transposed.stride()


@pytest.mark.parametrize("sizes", [(110, 64, 16, 32, 32), (880, 64, 16, 32, 32), (3, 5), (2, 9, 4)], ids=str)
def test_chain_takes_the_fewest_operations(sizes: tuple[int, ...]) -> None:
    matrices = [torch.randn(m, n) for m, n in pairwise(sizes)]
    with FlopCounterMode(display=False) as ours:
        product = chain_product(matrices)
    with ak.use_backend("reference"), FlopCounterMode(display=False) as plain:
        expected = torch.linalg.multi_dot(matrices) if len(matrices) > 1 else matrices[0]
    assert ours.get_total_flops() == plain.get_total_flops()
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-3)
