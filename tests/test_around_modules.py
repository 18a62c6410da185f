"""What tools do to the modules inside of a block, and around it: the block runs whatever plain PyTorch runs.

Every test is of our own blocks and of replaced ones, against the plain block in float64, and says in a marker which
tool it is of and what holds: ``python tests/compatibility.py`` writes ``docs/compatibility.md`` from these.
"""

import copy
import sys
import warnings

import pytest
import torch
import torch.nn.utils.prune
from block_rule import CLASSES, HIGH, KEY, LOW, VALUE, assert_same, build, draw_maps, output_weights, results
from torch import nn

import annnet_kernels as ak
from annnet_kernels import requirements

pytestmark = pytest.mark.usefixtures("one_thread")

OURS = {f"{kind}, {way}": (kind, way) for kind in CLASSES for way in ("own", "replaced")}


@pytest.fixture(params=OURS)
def pair(request):
    """A fused block, its plain twin with the same parameters, and the kind of both."""
    kind, way = OURS[request.param]
    fused, plain = build(kind)
    if way == "replaced":
        fused = copy.deepcopy(plain)
        assert ak.replace_blocks(fused).replaced
    return fused, plain, kind


def assert_equal_calls(fused, plain, kind, tolerance=1e-9, modes=(True, False), dtype=torch.float64):
    """Output, gradients and buffers, in training and evaluation; what is random draws the same."""
    maps, weights = [x.to(dtype) for x in draw_maps(kind)], output_weights(kind)
    for training in modes:
        found = []
        for block in (fused, plain):
            torch.manual_seed(2)
            found.append(results(block.train(training), maps, weights))
        assert_same(*found, tolerance=tolerance)


def changed_alike(pair, change):
    for block in pair[:2]:
        torch.manual_seed(1)
        change(block)
    return pair


# ------------------------------------------------------------------------------------------------------ DataParallel


def broadcast_on_a_cpu(tensors, devices, detach=False):
    """As DataParallel's: the first device has the tensors themselves, the others copies that pass gradients back."""
    copies = [tensors, *([t.detach().clone() if detach else t * 1 for t in tensors] for _ in devices[1:])]
    return [list(tensors_of_device) for tensors_of_device in copies]


@pytest.mark.tool(
    "torch.nn.DataParallel", "works", "replicas: outputs, gradients and statistics as plain, folds left aside"
)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_replicas_of_data_parallel(pair, training, monkeypatch):
    monkeypatch.setattr(sys.modules["torch.nn.parallel.replicate"], "_broadcast_coalesced_reshape", broadcast_on_a_cpu)
    fused, plain, kind = pair
    maps, weights, found = draw_maps(kind), output_weights(kind), []
    for block in (fused, plain):
        block.train(training)
        if block is fused and not training:
            ak.fold_for_inference(block)
        replicas = nn.parallel.replicate(block, [0, 1])
        assert all(replica.__dict__.get("_fold") is None for replica in replicas)
        outputs = [replica(*maps) for replica in replicas]
        sum((out * weights).sum() for out in outputs).backward()
        gradients = {f"grad {name}": p.grad for name, p in block.named_parameters()}
        found.append(
            {"first": outputs[0].detach(), "second": outputs[1].detach(), **gradients, **dict(block.named_buffers())}
        )
    assert_same(*found)
    assert "collapsed" in repr(nn.parallel.replicate(fused, [0, 1])[1])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_replicas_of_a_network(training, monkeypatch):
    from checkpoint_states import net

    monkeypatch.setattr(sys.modules["torch.nn.parallel.replicate"], "_broadcast_coalesced_reshape", broadcast_on_a_cpu)
    model, x = net().train(training), torch.randn(2, 3, 33, 40)
    expected = copy.deepcopy(model)(x)
    got = nn.parallel.replicate(model, [0, 1])[1](x)
    for out, want in zip(got, expected, strict=True) if training else [(got, expected)]:
        torch.testing.assert_close(out, want)


# -------------------------------------------------------------------------------------------------- exchanged modules


class Adapted(nn.Module):
    """A layer around the one that was there, as adapters are: it has no attribute of a convolution."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base
        self.down = nn.Conv2d(base.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


CONVOLUTIONS = ("stages.0.f_query.0", "stages.0.f_key.0", "stages.0.f_value", "stages.0.W", "conv_bn_dropout.0")


def exchange(block, path, make):
    parent, _, name = path.rpartition(".")
    owner = block.get_submodule(parent)
    if not isinstance(getattr(owner, name), Adapted):  # one module may have two paths
        setattr(owner, name, make(getattr(owner, name)))


@pytest.mark.tool(
    "adapters (LoRA) around inner convolutions", "runs plain", "one or all of them; the repr names the module"
)
@pytest.mark.parametrize("paths", [*((path,) for path in CONVOLUTIONS), CONVOLUTIONS], ids=str)
def test_adapters_around_convolutions(pair, paths):
    def adapt(block):
        for path in paths:
            exchange(block, path, Adapted)
        block.double()

    fused, plain, kind = changed_alike(pair, adapt)
    assert "published forward, because of Adapted in the place of Conv2d" in repr(fused)
    assert_equal_calls(fused, plain, kind)


@pytest.mark.tool("peft LoraConfig", "runs plain", "the repr names peft's class", package="peft")
def test_lora_of_peft(pair):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    targets = ["f_key.0", "f_query.0", "f_value", "W", "conv_bn_dropout.0"]

    def adapt(block):
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        peft.inject_adapter_in_model(config, block)
        block.double().requires_grad_(True)

    fused, plain, kind = changed_alike(pair, adapt)
    assert "published forward, because of peft.tuners.lora.layer.Conv2d in the place of Conv2d" in repr(fused)
    assert_equal_calls(fused, plain, kind)


IDENTITIES = (
    "stages.0.f_query.0",
    "stages.0.f_query.1",
    "stages.0.f_key.1.0",
    "stages.0.f_query.1.1",
    "conv_bn_dropout.1",
    "conv_bn_dropout.2",
)


@pytest.mark.tool(
    "nn.Identity in the place of a module", "works", "plain where a projection loses its norm and activation"
)
@pytest.mark.parametrize("path", IDENTITIES)
def test_identities(pair, path):
    def empty(block):
        if path == "stages.0.f_query.0":
            block.stages[0].key_channels = HIGH
            block.stages[0].f_key[0] = nn.Conv2d(LOW if pair[2] == "AFNB" else HIGH, HIGH, 1)
            for name in ("f_key", "f_query"):
                getattr(block.stages[0], name)[1][0] = nn.BatchNorm2d(HIGH)
        exchange(block, path, lambda _: nn.Identity())
        block.double()

    fused, plain, kind = changed_alike(pair, empty)
    if path in ("stages.0.f_query.0", "stages.0.f_query.1"):
        assert "published forward, because of Identity in the place of" in repr(fused)
    assert_equal_calls(fused, plain, kind)


def every_convolution(function):
    def change(block):
        for module in list(block.modules()):
            if type(module) is nn.Conv2d:
                function(module)

    return change


def delete_dropout(block):
    del block.conv_bn_dropout[2]


def random_activation(block):
    block.stages[0].f_query[1][1] = nn.RReLU()


def drops_between(block):
    block.stages[0].f_query[1][1] = nn.Sequential(nn.ReLU(), nn.Dropout2d(0.3))


def fuse_for_evaluation(block):
    block.eval()
    query = block.stages[0].f_query
    query[0], query[1][0] = nn.utils.fusion.fuse_conv_bn_eval(query[0], query[1][0]), nn.Identity()


def swap(block):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        block.float().double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


CHANGES = {
    "weight_norm": (every_convolution(nn.utils.parametrizations.weight_norm), "works"),
    "spectral_norm": (every_convolution(nn.utils.parametrizations.spectral_norm), "works"),
    "spectral_norm by hooks": (every_convolution(nn.utils.spectral_norm), "runs plain"),
    "prune": (every_convolution(lambda conv: nn.utils.prune.l1_unstructured(conv, "weight", 0.3)), "runs plain"),
    "without its dropout": (delete_dropout, "works"),
    "RReLU": (random_activation, "works"),
    "dropout in a projection": (drops_between, "works"),
    "share_memory": (nn.Module.share_memory, "works"),
    "swap_tensors": (swap, "works"),
}


@pytest.mark.tool("torch.nn.utils.parametrizations, prune, spectral_norm", "works", "plain where they are hooks")
@pytest.mark.parametrize("change", CHANGES)
def test_what_pytorch_does_to_modules(pair, change):
    function, expected = CHANGES[change]
    fused, plain, kind = changed_alike(pair, function)
    assert ("published forward" in repr(fused.eval())) == (expected == "runs plain"), repr(fused)
    assert_equal_calls(fused, plain, kind)


@pytest.mark.tool("torch.nn.utils.fusion", "works", "convolution and norm made one for evaluation")
def test_a_fused_convolution_and_norm(pair):
    fused, plain, kind = changed_alike(pair, fuse_for_evaluation)
    assert_equal_calls(fused, plain, kind, modes=(False,))


@pytest.mark.filterwarnings("ignore:.*deprecated.*")
@pytest.mark.tool(
    "torch.ao.quantization.prepare_qat, prepare", "runs plain", "eager mode: fake quantisation and observers"
)
@pytest.mark.parametrize("way", ["qat", "observers"])
def test_eager_quantisation(pair, way):
    quantization = pytest.importorskip("torch.ao.quantization", reason="this PyTorch has no eager quantisation")

    def prepare(block):
        block.float().train(way == "qat")
        block.qconfig = quantization.get_default_qat_qconfig("x86") if way == "qat" else quantization.default_qconfig
        (quantization.prepare_qat if way == "qat" else quantization.prepare)(block, inplace=True)

    fused, plain, kind = changed_alike(pair, prepare)
    expected = "torch.ao.nn.qat.modules.conv.Conv2d in the place of" if way == "qat" else "Conv2d carries forward hooks"
    assert f"published forward, because of {expected}" in repr(fused)
    assert_equal_calls(fused, plain, kind, 1e-4, modes=(way == "qat",), dtype=torch.float32)


class OtherTensor(torch.Tensor):
    """A weight that computes by itself, as quantised ones do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        out = super().__torch_function__(function, types, args, kwargs or {})
        return 2 * out if function is torch.nn.functional.conv2d or function is torch.conv2d else out


@pytest.mark.tool("tensor subclasses as weights (torchao)", "runs plain", "the repr names the class")
def test_a_weight_of_another_class(pair):
    def change(block):
        weight = block.stages[0].W.weight.detach().as_subclass(OtherTensor)
        block.stages[0].W.weight = nn.Parameter(weight)

    fused, plain, kind = changed_alike(pair, change)
    assert "published forward, because of Conv2d holds a weight of class OtherTensor" in repr(fused)
    maps = draw_maps(kind)
    torch.testing.assert_close(torch.Tensor(fused.eval()(*maps).detach()), torch.Tensor(plain.eval()(*maps).detach()))


# ------------------------------------------------------------------------------------------------- offloaded weights


def offload(module):
    """As accelerate does: parameters on ``meta``, fetched by a forward around the module's own."""
    kept = {name: p.detach().clone() for name, p in module.named_parameters(recurse=False)}
    own = module.forward
    for name, parameter in kept.items():
        module._parameters[name] = nn.Parameter(parameter.to("meta"))

    def forward(x):
        for name, parameter in kept.items():
            module._parameters[name] = nn.Parameter(parameter)
        out = own(x)
        for name, parameter in kept.items():
            module._parameters[name] = nn.Parameter(parameter.to("meta"))
        return out

    module.forward = forward


@pytest.mark.tool("parameters on meta until a forward fetches them", "runs plain", "the repr names the module")
def test_offloaded_parameters(pair):
    fused, plain, kind = pair
    for module in list(fused.modules()):
        if next(module.parameters(recurse=False), None) is not None:
            offload(module)
    maps = draw_maps(kind)
    with torch.no_grad():
        torch.testing.assert_close(fused.eval()(*maps), plain.eval()(*maps))
    assert "published forward, because of Conv2d with a forward of its own" in repr(fused)


@pytest.mark.tool("accelerate cpu_offload, disk_offload", "runs plain", "as plain", package="accelerate")
@pytest.mark.parametrize("way", ["cpu_offload", "disk_offload"])
def test_offloading_of_accelerate(pair, way, tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    fused, plain, kind = pair
    fused.eval(), plain.eval()
    arguments = {"offload_dir": str(tmp_path)} if way == "disk_offload" else {}
    getattr(accelerate, way)(fused, execution_device=torch.device("cpu"), **arguments)
    assert fused.stages[0].W.weight.is_meta
    maps = draw_maps(kind)
    with torch.no_grad():
        torch.testing.assert_close(fused(*maps), plain(*maps))
    assert "published forward, because of Conv2d with a forward of its own" in repr(fused)


# --------------------------------------------------------------------------------------------------- global hooks

REGISTER = {
    "forward": (nn.modules.module.register_module_forward_hook, lambda module, args, out: None),
    "forward pre": (nn.modules.module.register_module_forward_pre_hook, lambda module, args: None),
    "backward": (nn.modules.module.register_module_full_backward_hook, lambda module, grads, out_grads: None),
    "backward pre": (nn.modules.module.register_module_full_backward_pre_hook, lambda module, out_grads: None),
}


@pytest.mark.tool("global module hooks", "runs plain", "while one is registered, with a warning; every module is seen")
@pytest.mark.parametrize("which", REGISTER)
def test_global_hooks_see_every_module(pair, which):
    fused, plain, kind = pair
    register, hook = REGISTER[which]
    maps, found = [x.requires_grad_() for x in draw_maps(kind)], []
    for block in (fused, plain):
        seen = []
        handle = register(lambda module, *rest, seen=seen: seen.append(type(module).__name__) or hook(module, *rest))
        try:
            if block is fused:
                with pytest.warns(UserWarning, match=f"runs its published forward, because of global {which} hooks"):
                    out = block(*maps)
                assert f"published forward, because of global {which} hooks" in repr(block)
            else:
                out = block(*maps)
            out.sum().backward()
        finally:
            handle.remove()
        found.append([name.removeprefix("Plain") for name in seen])
    assert found[0] == found[1]
    assert len(found[0]) > 10
    assert "collapsed" in repr(fused)


@pytest.mark.tool("torch.utils.flop_counter, ModuleTracker", "works", "the block stays collapsed and is counted")
def test_the_flop_counter_counts_the_collapsed_block(pair):
    from torch.utils.flop_counter import FlopCounterMode

    fused, plain, kind = pair
    maps, counts = draw_maps(kind), []
    for block in (fused, plain):
        with FlopCounterMode(display=False) as counter:
            block(*maps)
            if block is fused:
                assert "collapsed" in repr(fused)
        counts.append(counter.get_total_flops())
    assert min(counts) > 0
    assert counts[0] != counts[1]


# ------------------------------------------------------------------------------------------------ settings and tools


@pytest.mark.tool("attributes of the published stage", "runs plain", "key_channels and value_channels are not ignored")
def test_an_attribute_that_the_published_forward_reads(pair):
    def change(block):
        block.stages[0].key_channels = 3

    fused, plain, kind = changed_alike(pair, change)
    assert f"published forward, because of key_channels=3, where Conv2d puts out {KEY} channels" in repr(fused)
    assert_equal_calls(fused, plain, kind)
    fused.stages[0].key_channels = KEY
    assert "collapsed" in repr(fused)


def test_the_value_width_is_refused_as_plain_refuses_it():
    fused, plain = build("APNB")
    for block in (fused, plain):
        block.stages[0].value_channels = VALUE + 1
        with pytest.raises(RuntimeError, match="is invalid for input of size"):
            block(*draw_maps("APNB"))


@pytest.mark.tool("torch.nn.utils.skip_init", "works", "constructors take device and dtype")
@pytest.mark.parametrize("kind", CLASSES)
def test_skip_init_and_device(kind):
    cls, _, channels = CLASSES[kind]
    _, plain = build(kind)
    made = nn.utils.skip_init(cls, *channels, KEY, VALUE, dropout=0.0, dtype=torch.float64)
    made.load_state_dict(plain.state_dict())
    assert_equal_calls(made, plain, kind)
    empty = cls(*channels, KEY, VALUE, device="meta", dtype=torch.bfloat16)
    assert all(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    assert empty.stages[0].W.weight.dtype == empty.stages[0].f_key[1][0].running_mean.dtype == torch.bfloat16


@pytest.mark.tool("nn.Module.compile", "works", "copies of a compiled block included")
def test_a_block_compiled_in_place(pair):
    fused, plain, kind = pair
    torch._dynamo.reset()
    fused.compile(backend="aot_eager", fullgraph=True)
    assert_equal_calls(fused, plain, kind)
    twin = copy.deepcopy(fused)
    assert_equal_calls(twin, plain, kind, modes=(False,))
    torch._dynamo.reset()


def test_a_reason_that_passes_is_said_once_for_each_block():
    fused, _ = build("APNB")
    maps = draw_maps("APNB")
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: None)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                fused(*maps)
    finally:
        handle.remove()
    assert [str(w.message) for w in caught] == [
        "annnet_kernels: APNB runs its published forward, because of global forward hooks"
    ]


def test_every_rule_has_a_reason_in_its_docstring():
    assert all(rule.__doc__ for rule in requirements.TO_COLLAPSE)
    assert requirements.sharded_weights not in requirements.ONCE_GATHERED
