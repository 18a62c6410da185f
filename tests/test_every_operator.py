"""What every operator ``annnet::*`` must do as one of PyTorch's: opcheck in all dense layouts, and no forward mode."""

import pytest
import torch
from helpers import random_map
from torch.autograd import forward_ad

import annnet_kernels  # noqa: F401

B, CK, CV, H, W = 2, 4, 6, 5, 3
LEVELS = [1, 2], [1, 3]
TOKENS = 7
LAYOUTS = ("nchw", "channels_last", "transposed")


def calls(layout, dtype=torch.float32):
    """Arguments of a call of every operator; the layout is that of the maps."""

    def a_map(channels):
        return random_map((B, channels, H, W), dtype, layout)

    def tokens(channels):
        return torch.randn(B, channels, TOKENS, dtype=dtype)

    query, y, grad_map = a_map(CK), a_map(CK), a_map(CV)
    norm, constant = torch.rand(4, CK, dtype=dtype), torch.randn(CV, dtype=dtype)
    logsumexp, scale = torch.randn(B, H * W, dtype=dtype), torch.rand(B, CK, dtype=dtype)
    tail = (y, norm, scale, True)
    attend = (query, norm, tokens(CK), tokens(CV))
    sums = torch.randn(2, CK, dtype=dtype)
    labels, class_weight = torch.randint(0, CK, (B, 9, 11)), torch.rand(CK, dtype=dtype)
    pixel_grad = torch.randn(B, 9, 11, dtype=dtype)
    moments = torch.stack((torch.full((CK,), 30.0), *torch.rand(2, CK))).double()
    running = torch.rand(3, CK)
    return {
        "pyramid_pool": (query, None, *LEVELS),
        "pyramid_pool_bwd": (tokens(CK), None, [H, W], *LEVELS, layout == "channels_last", None),
        "pyramid_pool_bwd_": (
            tokens(CK),
            random_map((B, CK, H, W), dtype, dense(layout)),
            [H, W],
            *LEVELS,
            layout == "channels_last",
            None,
        ),
        "matrix_products": (
            [torch.randn(5, CK, dtype=dtype), torch.randn(CV, CK, dtype=dtype)],
            [0, ~2],
            [~1, 2],
            [0, -1],
        ),
        "bn_relu_bwd_sums": (y, norm, tokens(CK), a_map(CK), *LEVELS, None),
        "bn_relu_bwd_input": (y, norm, tokens(CK), None, sums, 10, *LEVELS, None),
        "asymmetric_attention": (query, None, tokens(CK), tokens(CV), None, None, 0.7, False),
        "asymmetric_attention_bwd": (
            grad_map,
            query,
            None,
            tokens(CK),
            tokens(CV),
            logsumexp,
            0.7,
            [True, False, True],
            None,
        ),
        "asymmetric_attention_": (*attend, random_map((B, CV, H, W), dtype, dense(layout)), constant, 0.7, True),
        "batch_norm_moments": (y,),
        "batch_norm_table": (y, *torch.rand(2, CK), norm[0], None, norm[1], 1e-5),
        "batch_norm_update": (y, moments, norm[0], None, norm[1], *running[:2], torch.tensor(3), 1e-5, None, 2),
        "batch_norm_apply": tail,
        "batch_norm_apply_": (random_map((B, CK, H, W), dtype, dense(layout)), *tail[1:]),
        "batch_norm_bwd_sums": (a_map(CK), *tail, None),
        "batch_norm_bwd_input": (a_map(CK), *tail, sums, 10, None),
        "upsampled_cross_entropy": (query, labels, class_weight, 3, 0.1, False, True, True),
        "upsampled_cross_entropy_bwd": (query, labels, class_weight, pixel_grad, 3, 0.1, False, None),
        "upsampled_argmax": (query, [9, 11], True),
    }


def dense(layout):
    """What is written in place must be NCHW or channels_last."""
    return "nchw" if layout == "transposed" else layout


OPERATORS = sorted(calls("nchw"))
DIFFERENTIABLE = ("pyramid_pool", "pyramid_pool_bwd", "asymmetric_attention", "upsampled_cross_entropy")


def operator(name):
    return getattr(torch.ops.annnet, name).default


def test_no_operator_is_left_out():
    known = {schema.name for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("annnet::")}
    assert known == {f"annnet::{name}" for name in OPERATORS}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, layout):
    torch.library.opcheck(operator(name), calls(layout)[name])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_opcheck_with_gradients(name, layout):
    arguments = calls(layout, torch.float64)[name]
    for index in tensors_of(arguments):
        arguments[index].requires_grad_()
    torch.library.opcheck(operator(name), arguments)


def tensors_of(arguments):
    """Where the operands are that could have a derivative."""
    return [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.is_floating_point()]


def first_of(argument):
    """An operand, or the first of a list of operands."""
    return argument[0] if isinstance(argument, list) else argument


@pytest.mark.parametrize("recording", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_tangent_on_any_operand_is_refused(name, recording):
    """A zero or missing tangent would be a wrong derivative without a word."""
    arguments = calls("nchw")[name]
    for index in tensors_of(arguments):
        with forward_ad.dual_level(), torch.set_grad_enabled(recording):
            operand = arguments[index].clone()
            dual = forward_ad.make_dual(operand, torch.randn_like(operand))
            with pytest.raises(NotImplementedError, match=f"{name}: forward-mode differentiation is not implemented"):
                operator(name)(*arguments[:index], dual, *arguments[index + 1 :])


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))])
@pytest.mark.parametrize("name", OPERATORS)
def test_transforms_of_the_bare_operator_are_refused(name, transform):
    arguments = calls("nchw")[name]

    def loss(x):
        results = operator(name)([x, *arguments[0][1:]] if isinstance(arguments[0], list) else x, *arguments[1:])
        return x.sum() if results is None else (results if isinstance(results, torch.Tensor) else results[0]).sum()

    with pytest.raises(NotImplementedError, match=rf"{name}: the bare operator has no torch\.func derivatives"):
        transform(loss)(first_of(arguments[0]).clone())
