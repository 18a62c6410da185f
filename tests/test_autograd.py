"""Blocks under everything that autograd offers, compared with the plain block; the operators where they differ."""

import copy

import pytest
import torch
from block_rule import CLASSES, assert_same, build, draw_maps, output_weights
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import annnet_kernels as ak
from annnet_kernels.ops import NormalizedAttention
from annnet_kernels.ops.normalized import Levels, Share
from annnet_kernels.parallel.row_shards import RectifiedAttention

pytestmark = [
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:annnet_kernels. .* torch.vmap:UserWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(params=CLASSES)
def kind(request):
    return request.param


def leaves(kind):
    return [x.requires_grad_() for x in draw_maps(kind)]


def step(block, maps, weights, forward=None):
    """Output, gradients and buffers of one call."""
    block = copy.deepcopy(block)
    inputs = [x.detach().clone().requires_grad_() for x in maps]
    out = block(*inputs) if forward is None else forward(block, inputs)
    (out * weights).sum().backward()
    gradients = {f"grad {name}": p.grad for name, p in block.named_parameters()}
    gradients |= {f"grad input {i}": x.grad for i, x in enumerate(inputs)}
    return {"out": out.detach(), **gradients, **dict(block.named_buffers())}


# ------------------------------------------------------------------------------------------------------- torch.func


@pytest.mark.parametrize("training", [True, False])
def test_functional_call_under_grad(kind, training):
    """Buffers are handed over, since PyTorch refuses to change captured ones under ``grad``."""
    results = []
    blocks, maps, weights = build(kind), draw_maps(kind), output_weights(kind)
    for block in blocks:
        block.train(training)
        parameters = {name: p.detach() for name, p in block.named_parameters()}

        def loss(parameters, maps, block=block):
            buffers = {name: b.clone() for name, b in block.named_buffers()}
            out = torch.func.functional_call(copy.deepcopy(block), (parameters, buffers), maps)
            return (out * weights).sum(), {name: b.detach() for name, b in buffers.items()}

        (dparameters, dmaps), buffers = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(parameters, tuple(maps))
        results.append({**dparameters, **{f"map {i}": d for i, d in enumerate(dmaps)}, **buffers})
    assert_same(*results)
    assert all(float(gradient.norm()) > 1e-3 for name, gradient in results[0].items() if name.endswith("W.weight"))


def test_jacobians_by_vmap_over_the_backward_pass(kind):
    fused, plain = (block.eval() for block in build(kind))
    maps = [x[:1, :, :2, :3] for x in draw_maps(kind)]
    last = len(maps) - 1
    torch.testing.assert_close(torch.func.jacrev(fused, argnums=last)(*maps), torch.func.jacrev(plain, last)(*maps))


@pytest.mark.tool("torch.vmap over a block", "runs plain", "with a warning; over the two operators it works")
@pytest.mark.parametrize("in_dim", [0, 1])
def test_vmap_over_a_block(kind, in_dim):
    fused, plain = (block.eval() for block in build(kind))
    maps = [torch.stack([x, x + 1, -x], dim=in_dim) for x in draw_maps(kind)]
    with pytest.warns(UserWarning, match=r"runs its published forward, because of torch\.vmap over the block"):
        got = torch.func.vmap(fused, in_dims=in_dim)(*maps)
    torch.testing.assert_close(got, torch.func.vmap(plain, in_dims=in_dim)(*maps))
    alone = torch.stack([fused(*(x.select(in_dim, i) for x in maps)) for i in range(3)])
    torch.testing.assert_close(got, alone)


@pytest.mark.tool(
    "torch.func ensembles (stack_module_state, vmap, grad)", "runs plain", "training with dropout included"
)
@pytest.mark.parametrize("training", [True, False])
def test_an_ensemble_of_blocks(kind, training):
    """Statistics are per member, as the stacked buffers are."""
    maps, weights, found = draw_maps(kind), output_weights(kind), []
    members = [build(kind, dropout=0.5) for _ in range(2)]
    for blocks in zip(*members, strict=True):
        for block in blocks:
            block.train(training)
        parameters, buffers = torch.func.stack_module_state(list(blocks))
        template = copy.deepcopy(blocks[0]).to("meta")

        def loss(parameters, buffers, maps, template=template):
            return (torch.func.functional_call(template, (parameters, buffers), maps) * weights).sum()

        torch.manual_seed(5)
        each = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(0, 0, None), randomness="different")
        gradients, values = each(parameters, buffers, tuple(maps))
        found.append({"loss": values.detach(), **gradients, **{name: b.detach() for name, b in buffers.items()}})
    assert_same(*found)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("of", ["maps", "parameters"])
def test_forward_mode_is_refused(kind, of, training):
    fused, _ = build(kind)
    maps = draw_maps(kind)
    fused.train(training)
    for recording in (True, False):
        with forward_ad.dual_level(), torch.set_grad_enabled(recording):
            parameters = {name: p.detach() for name, p in fused.named_parameters()}
            if of == "maps":
                maps = [forward_ad.make_dual(x, torch.randn_like(x)) for x in maps]
            else:
                parameters = {n: forward_ad.make_dual(p, torch.randn_like(p)) for n, p in parameters.items()}
            with pytest.raises(NotImplementedError, match=r"jvp function|forward-mode differentiation"):
                torch.func.functional_call(copy.deepcopy(fused), parameters, tuple(maps))


def test_forward_mode_transforms_of_the_functions_are_refused():
    x, tokens = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 5)
    for function in (ak.pyramid_pool, lambda x: ak.asymmetric_attention(x, tokens, tokens)):
        for transform in (lambda f: torch.func.jvp(f, (x,), (x,)), lambda f: torch.func.jacfwd(f)(x)):
            with pytest.raises(NotImplementedError, match="jvp function"):
                transform(function)


# ------------------------------------------------------------------------------------------------------------ modes


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(kind, use_reentrant):
    """Statistics move once more in the second forward, as the plain block's do."""
    maps, weights = draw_maps(kind), output_weights(kind)

    def forward(block, inputs):
        return checkpoint(block, *inputs, use_reentrant=use_reentrant)

    assert_same(*(step(block, maps, weights, forward) for block in build(kind)))


@pytest.mark.parametrize("training", [True, False])
def test_inference_mode(kind, training):
    fused, plain = (block.train(training) for block in build(kind))
    maps = draw_maps(kind)
    with torch.inference_mode():
        out = fused(*maps)
    assert out.is_inference()
    torch.testing.assert_close(out, plain(*maps).detach())
    assert_same(dict(fused.named_buffers()), dict(plain.named_buffers()))


def test_anomaly_mode_names_where_nan_appears(kind):
    block, maps, weights = build(kind)[0], draw_maps(kind), output_weights(kind)
    expected = step(block, maps, weights)
    with torch.autograd.set_detect_anomaly(True):
        assert_same(step(block, maps, weights), expected)
    weights[0, :, 0, 0] = torch.inf  # behind a ReLU some channel is positive
    with (
        torch.autograd.set_detect_anomaly(True),
        pytest.warns(UserWarning, match="in <module>|in step"),  # where the forward was called
        pytest.raises(RuntimeError, match=r"NormalizedTailBackward.* returned nan values"),
    ):
        step(block, maps, weights)


@pytest.mark.parametrize("recompute", [False, True])
def test_saved_tensors_may_be_kept_elsewhere(kind, recompute):
    block, maps, weights = build(kind)[0], draw_maps(kind), output_weights(kind)
    expected = step(block, maps, weights)
    block.recompute = recompute
    moved = []

    def pack(x):
        moved.append(x.numel())
        return x.numpy(force=True).copy()

    def forward(block, inputs):
        with torch.autograd.graph.saved_tensors_hooks(pack, torch.from_numpy):
            return block(*inputs)

    assert_same(step(block, maps, weights, forward), expected)
    assert sum(moved) > maps[-1].numel()
    with torch.autograd.graph.save_on_cpu():
        assert_same(step(block, maps, weights), expected)


@pytest.mark.parametrize("recompute", [False, True])
def test_changes_in_place_behind_the_call_are_detected(kind, recompute):
    fused, _ = build(kind)
    fused.recompute = recompute
    changed = [("map", i) for i in range(len(draw_maps(kind)))]
    changed += [("parameter", name) for name in ("stages.0.f_query.0.weight", "stages.0.W.weight")]
    for what, which in changed:
        inputs = [x * 1 for x in leaves(kind)]
        out = fused(*inputs)
        with torch.no_grad():
            (inputs[which] if what == "map" else fused.get_parameter(which)).add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_changes_in_place_behind_the_operators_are_detected_where_they_matter():
    for index in range(3):
        operands = [torch.randn(shape, requires_grad=True) * 1 for shape in ((1, 4, 3, 3), (1, 4, 5), (1, 4, 5))]
        out = ak.asymmetric_attention(*operands)
        with torch.no_grad():
            operands[index].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    x = torch.randn(1, 4, 3, 3, requires_grad=True)
    changed = x * 1
    tokens = ak.pyramid_pool(changed)  # linear: keeps no map, so that one may be overwritten
    changed.detach().zero_()
    expected = torch.autograd.grad(ak.pyramid_pool(x).sum(), x)
    torch.testing.assert_close(torch.autograd.grad(tokens.sum(), x), expected)


def test_an_output_may_be_changed_in_place(kind):
    """The tail keeps its input, not its output, so ``add_`` behind a block is right and needs no copy."""
    block, maps, weights = build(kind)[0], draw_maps(kind), output_weights(kind)
    changed = step(block, maps, weights, lambda block, inputs: block(*inputs).mul_(2))
    expected = step(block, maps, 2 * weights)
    del changed["out"], expected["out"]
    assert_same(changed, expected)


class Calls(TorchDispatchMode):
    """The operators that are called."""

    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, operator, types, arguments=(), keywords=None):
        self.operators.append(operator)
        return operator(*arguments, **(keywords or {}))


def attend(*maps):
    """Attention of the first map over tokens of the last."""
    tokens = ak.pyramid_pool(maps[-1])
    return ak.asymmetric_attention(maps[-1], tokens, tokens)


@pytest.mark.parametrize("of", ["block", "functions"])
def test_no_gradient_is_made_for_outputs_without_one(kind, of):
    """Unless told otherwise PyTorch hands a backward pass zeros for them: on a GPU a launch each."""
    maps = leaves(kind)
    out = build(kind)[0](*maps) if of == "block" else attend(*maps)
    with Calls() as calls:
        torch.autograd.grad(out, maps[-1], torch.ones_like(out))
    assert any("asymmetric_attention" in str(operator) for operator in calls.operators)
    assert torch.ops.aten.zeros.default not in calls.operators


class Nothing(torch.autograd.Function):
    """The identity without a gradient."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize("function", [NormalizedAttention, RectifiedAttention])
def test_where_no_gradient_comes_to_a_step_of_a_block_it_is_zero(function):
    """Other processes may wait for sums of it."""
    y, table, tokens = torch.randn(1, 4, 3, 5, requires_grad=True), torch.ones(4, 4), torch.randn(1, 4, 7)
    parameters, addends, constants = (None,) * 2, (None,) * 2, (Share(None, None), Levels([], []), None)
    for expected, pass_on in ((False, Nothing.apply), (True, torch.clone)):
        out, *_ = function.apply(y, table, *parameters, tokens, tokens, *addends, *constants, None)
        pass_on(out).sum().backward()
        assert bool(y.grad.any()) is expected


def test_where_no_gradient_comes_to_the_operators_none_goes_on(kind):
    maps = leaves(kind)
    out = Nothing.apply(attend(*maps))
    with Calls() as calls:
        out.sum().backward()
    assert not any("asymmetric_attention" in str(operator) for operator in calls.operators)
    assert all(x.grad is None or not x.grad.any() for x in maps)


def test_evaluation_inspects_no_signature(kind, monkeypatch):
    """PyTorch's own ``Function.apply`` does, for tens of microseconds each time."""
    fused, _ = build(kind)
    fused.eval()

    def inspected(*_, **__):
        raise AssertionError("a signature")

    monkeypatch.setattr("inspect.signature", inspected)
    with torch.no_grad():
        fused(*draw_maps(kind))
